//! Peers that say what makes no sense, too much, or nothing: a named error, and nobody else disturbed.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use dormouse_cloud_hypervisor::{ReceiveError, receive};

use super::peer::{
    ABANDON, COMPLETE, CONFIG, MEMORY_FD, OK, PAGE_FAULT, START, STATE, Slot, Vm, ask, ask_memory_fd, config,
    memfd, request, send_fds,
};
use super::scene::{PATIENCE, SLOTS, Scene, own_uid, received_from};

/// Of silent peers.
const SHORT: Duration = Duration::from_millis(200);

fn refused(part: &str, what: impl FnOnce(UnixStream) + Send) {
    let error = received_from(PATIENCE, what).expect_err("must be refused").to_string();
    assert!(error.contains(part), "{error:?} does not say {part:?}");
}

/// A peer that has sent the slots of `config`, each with a file of `bytes` bytes; the answer to the configuration,
/// and if it was taken, to the end.
fn with_slots(stream: &UnixStream, slots: &[Slot], files: &[(u32, File)]) {
    assert_eq!(ask(stream, START, &[]).unwrap(), OK);
    for (slot, file) in files {
        assert_eq!(ask_memory_fd(stream, *slot, file).unwrap(), OK);
    }
    if ask(stream, CONFIG, &config(slots)).is_ok_and(|status| status == OK) {
        assert_eq!(ask(stream, STATE, b"{}").unwrap(), OK);
        not_taken(ask(stream, COMPLETE, &[]));
    }
}

/// It was refused, or nobody listened any more.
fn not_taken(answer: std::io::Result<u16>) {
    assert!(!answer.is_ok_and(|status| status == OK));
}

fn slot(slot: u32, gpa: u64, bytes: u64) -> Slot {
    Slot { slot, gpa, bytes, file_offset: 0 }
}

#[test]
fn nonsense_is_named() {
    refused("command 48059", |mut s| s.write_all(&[0xbb; 16]).unwrap());
    refused("version 1", |mut s| {
        let mut head = request(START, 0);
        head[2] = 1;
        s.write_all(&head).unwrap();
    });
    refused("where Start belongs", |s| not_taken(ask(&s, STATE, b"{}")));
    refused("where MemoryFd or Config belongs", |s| {
        assert_eq!(ask(&s, START, &[]).unwrap(), OK);
        not_taken(ask(&s, COMPLETE, &[]));
    });
    refused("16 bytes with Start", |mut s| s.write_all(&request(START, 16)).unwrap());
    refused("where", |mut s| {
        assert_eq!(ask(&s, START, &[]).unwrap(), OK);
        s.write_all(&request(PAGE_FAULT, 16)).unwrap();
    });
    refused("not as Cloud Hypervisor sends it", |s| {
        assert_eq!(ask(&s, START, &[]).unwrap(), OK);
        assert_eq!(ask_memory_fd(&s, 0, &memfd(4096)).unwrap(), OK);
        not_taken(ask(&s, CONFIG, b"{\"vm_config\": ["));
    });
    refused("gave up", |s| {
        assert_eq!(ask(&s, START, &[]).unwrap(), OK);
        assert_eq!(ask(&s, ABANDON, &[]).unwrap(), OK, "it may");
    });
    refused("local=on", |s| with_slots(&s, &[slot(0, 0, 4096)], &[]));
}

#[test]
fn too_much_is_refused_before_it_is_read() {
    for command in [CONFIG, STATE] {
        refused("cannot be", move |mut s| {
            assert_eq!(ask(&s, START, &[]).unwrap(), OK);
            s.write_all(&request(command, u64::MAX)).unwrap();
        });
    }
    refused("8 bytes with MemoryFd", |mut s| {
        assert_eq!(ask(&s, START, &[]).unwrap(), OK);
        s.write_all(&request(MEMORY_FD, 8)).unwrap();
    });
    // More files than slots, and more slots than a VM can have.
    refused("2 memory files", |s| with_slots(&s, &[slot(0, 0, 4096)], &[(0, memfd(4096)), (1, memfd(4096))]));
    let many: Vec<Slot> = (0..513).map(|n| slot(n, u64::from(n) << 12, 4096)).collect();
    refused("513 memory slots", move |s| with_slots(&s, &many, &[(0, memfd(4096))]));
    let files = (0..17).map(|n| (n, memfd(4096))).collect::<Vec<_>>();
    let slots: Vec<Slot> = (0..17).map(|n| slot(n, u64::from(n) << 12, 4096)).collect();
    refused("17 memory files", move |s| with_slots(&s, &slots, &files));
}

#[test]
fn impossible_slots_are_named() {
    let one = || vec![(0, memfd(8192))];
    refused("slot 0: is empty or not made of whole pages", |s| with_slots(&s, &[slot(0, 0, 100)], &one()));
    refused("slot 0: is empty or not made of whole pages", |s| with_slots(&s, &[slot(0, 7, 4096)], &one()));
    refused("past the end of addresses", |s| with_slots(&s, &[slot(0, u64::MAX - 4095, 8192)], &one()));
    let two = || vec![(0, memfd(8192)), (1, memfd(8192))];
    refused("slot 1: overlaps another in memory", |s| {
        with_slots(&s, &[slot(0, 0, 8192), slot(1, 4096, 8192)], &two());
    });
    refused("slot 1: no memory file came", |s| {
        with_slots(&s, &[slot(0, 0, 8192), slot(1, 8192, 8192)], &one());
    });
    // Two slots that show the same bytes of one file.
    refused("overlaps another in its file", |s| {
        let file = memfd(8192);
        let files = [(0, file.try_clone().unwrap()), (1, file)];
        with_slots(&s, &[slot(0, 0, 8192), slot(1, 8192, 8192)], &files);
    });
}

#[test]
fn what_is_no_memory_file_is_refused() {
    let with = |file: fn() -> File| move |s: UnixStream| with_slots(&s, &[slot(0, 0, 8192)], &[(0, file())]);
    refused("its file has 4096 bytes, but it ends at 8192", with(|| memfd(4096)));
    refused("its file has 12288 bytes, of which slots use 8192", with(|| memfd(12288)));
    refused("CharacterDevice, not a memory file", with(|| File::open("/dev/zero").unwrap()));
    refused("Directory, not a memory file", with(|| File::open("/").unwrap()));
    refused("Fifo, not a memory file", with(|| File::from(rustix::pipe::pipe().unwrap().0)));
    refused("writing only", |s| {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let file = File::options().write(true).open(file.path()).unwrap();
        with_slots(&s, &[slot(0, 0, 8192)], &[(0, file)]);
    });
    refused("slot 0: came twice", |s| {
        assert_eq!(ask(&s, START, &[]).unwrap(), OK);
        assert_eq!(ask_memory_fd(&s, 0, &memfd(4096)).unwrap(), OK);
        not_taken(ask_memory_fd(&s, 0, &memfd(4096)));
    });
}

#[test]
fn one_descriptor_comes_with_a_slot() {
    for count in [0, 2, 8] {
        refused("descriptors came with a memory slot", move |mut s| {
            assert_eq!(ask(&s, START, &[]).unwrap(), OK);
            s.write_all(&request(MEMORY_FD, 4)).unwrap();
            let files: Vec<File> = (0..count).map(|_| memfd(4096)).collect();
            send_fds(&s, 0, &files.iter().map(|f| f.as_fd()).collect::<Vec<_>>());
            // Kept open until it was looked at.
            not_taken(super::peer::answer(&s));
        });
    }
}

#[test]
fn silence_and_hanging_up_are_told_apart_wherever_they_come() {
    let whole = [request(START, 0), request(MEMORY_FD, 4)].concat();
    for cut in [0, 1, 15, 16, 20, 31] {
        refused("closed the connection", |mut s| s.write_all(&whole[..cut]).unwrap());
        let silent = received_from(SHORT, |mut s| {
            s.write_all(&whole[..cut]).unwrap();
            // Until the other side gives up.
            std::io::copy(&mut s, &mut std::io::sink()).unwrap();
        });
        let error = silent.expect_err("must be refused").to_string();
        assert!(error.contains("and then nothing"), "{cut}: {error}");
    }
    refused("closed the connection after 50 bytes of a payload", |mut s| {
        assert_eq!(ask(&s, START, &[]).unwrap(), OK);
        assert_eq!(ask_memory_fd(&s, 0, &memfd(4096)).unwrap(), OK);
        s.write_all(&request(CONFIG, 100)).unwrap();
        s.write_all(&[b' '; 50]).unwrap();
    });
}

#[test]
fn a_peer_of_another_user_is_sent_away() {
    let (near, far) = UnixStream::pair().unwrap();
    let error = receive(far, own_uid() + 1, PATIENCE).unwrap_err();
    assert!(
        matches!(error, ReceiveError::Wire(_)) && error.to_string().contains("where only user"),
        "{error}"
    );
    drop(near);
}

#[test]
fn after_hostile_peers_a_good_one_is_stored_as_ever() {
    let scene = Scene::new();
    for seed in 0..64_u8 {
        let bytes: Vec<u8> = (0..200).map(|i| seed.wrapping_mul(31).wrapping_add(i)).collect();
        let _ = received_from(SHORT, |mut s| drop(s.write_all(&bytes)));
    }
    scene.sleep(&Vm::new(&SLOTS, 9), "vm", None);
    scene.wake_eagerly("vm").verify(9);
}

#[test]
fn a_vm_that_could_not_be_stored_is_told_to_go_on() {
    let (near, far) = UnixStream::pair().unwrap();
    let vm = Vm::new(&SLOTS, 1);
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| vm.send(&near, true));
        receive(far, own_uid(), PATIENCE).unwrap().refuse().unwrap();
        assert_ne!(sending.join().unwrap().unwrap(), OK);
    });
}
