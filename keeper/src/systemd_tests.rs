use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};

use super::*;
use crate::holder::tests::{Sleeper, vm};

/// What systemd does with a service's messages, as sd_notify(3) and `service_add_fd_store` have it.
struct Manager {
    directory: tempfile::TempDir,
    store: Arc<Mutex<Vec<(String, OwnedFd)>>>,
    messages: Arc<Mutex<Vec<String>>>,
}

impl Manager {
    fn start() -> Self {
        let directory = tempfile::tempdir().expect("directory");
        let socket = UnixDatagram::bind(directory.path().join("notify")).expect("socket");
        let (store, messages) = (Arc::default(), Arc::default());
        let manager = Manager { directory, store: Arc::clone(&store), messages: Arc::clone(&messages) };
        std::thread::spawn(move || serve(&socket, &store, &messages));
        manager
    }

    fn keeper(&self, inherited: Vec<(String, OwnedFd)>) -> SystemdKeeper {
        SystemdKeeper::new(&self.directory.path().join("notify"), inherited).expect("an address")
    }

    /// What the service is given when it is started again: the store, in an order of systemd's own.
    fn given_at_start(&self) -> Vec<(String, OwnedFd)> {
        let store = self.store.lock().expect("store");
        store.iter().rev().map(|(name, fd)| (name.clone(), fd.try_clone().expect("descriptor"))).collect()
    }
}

fn serve(socket: &UnixDatagram, store: &Mutex<Vec<(String, OwnedFd)>>, messages: &Mutex<Vec<String>>) {
    let mut buffer = [0; 4096];
    while let Ok((bytes, descriptors)) = descriptors::receive(socket.as_fd(), &mut buffer) {
        let message = String::from_utf8_lossy(&buffer[..bytes]).into_owned();
        let value = |key: &str| message.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('='));
        let mut store = store.lock().expect("store");
        match value("FDNAME") {
            Some(name) if value("FDSTORE") == Some("1") => {
                store.extend(descriptors.into_iter().map(|fd| (name.to_owned(), fd)));
            }
            Some(name) if value("FDSTOREREMOVE") == Some("1") => store.retain(|(n, _)| n != name),
            // A barrier is passed by closing what came with it.
            _ => drop(descriptors),
        }
        messages.lock().expect("messages").push(message);
    }
}

fn userfaultfd() -> Option<OwnedFd> {
    match crate::sys::userfaultfd::create() {
        Ok(fd) => Some(fd),
        Err(error) => {
            assert!(std::env::var_os("DORMOUSE_REQUIRE_UFFD").is_none(), "may not be skipped: {error}");
            dormouse_testkit::skipped!("{error}");
            None
        }
    }
}

fn inode(fd: &OwnedFd) -> u64 {
    rustix::fs::fstat(fd).expect("stat").st_ino
}

#[test]
fn what_systemd_stores_comes_back_in_any_order() {
    let (manager, process) = (Manager::start(), Sleeper::start());
    let keeper = manager.keeper(Vec::new());
    let vms = ["a", "b"].map(|id| KeptVm { uffd: userfaultfd().expect("userfaultfd"), ..vm(id, &process.0) });
    for vm in &vms {
        keeper.keep(vm).expect("kept");
        // Once it is said to be kept, it is.
        assert!(manager.given_at_start().iter().any(|(n, _)| *n == format!("dormouse-{}", vm.record.id)));
    }
    assert!(manager.messages.lock().expect("messages").iter().any(|m| m.contains("FDPOLL=0")));
    drop(keeper);

    let again = manager.keeper(manager.given_at_start());
    let taken = again.take_all().expect("taken");
    assert_eq!(taken.len(), 2);
    for (taken, kept) in taken.iter().zip(&vms) {
        assert_eq!(taken.record.id, kept.record.id);
        assert_eq!(inode(&taken.states), inode(&kept.states));
        assert_eq!(inode(&taken.process), inode(&kept.process));
    }
    assert!(again.take_all().expect("asked").is_empty(), "only once");
    again.release(&taken[0].record.id).expect("released");
    again.barrier().expect("passed");
    let left: Vec<_> = manager.given_at_start().into_iter().map(|(name, _)| name).collect();
    assert_eq!(left, vec!["dormouse-b"; 4]);
}

#[test]
fn a_vm_of_which_something_is_missing_is_not_taken_up() {
    let (manager, process) = (Manager::start(), Sleeper::start());
    let Some(uffd) = userfaultfd() else { return };
    manager.keeper(Vec::new()).keep(&KeptVm { uffd, ..vm("a", &process.0) }).expect("kept");
    for missing in 0..4 {
        let mut given = manager.given_at_start();
        given.remove(missing);
        assert!(manager.keeper(given).take_all().expect("asked").is_empty(), "without {missing}");
    }
    let mut given = manager.given_at_start();
    given.push(("dormouse-a".into(), std::fs::File::open("/dev/null").expect("open").into()));
    assert!(manager.keeper(given).take_all().expect("asked").is_empty(), "with something else");
    assert_eq!(manager.keeper(manager.given_at_start()).take_all().expect("asked").len(), 1);
}

#[test]
fn a_manager_that_is_not_there_keeps_nothing() {
    let process = Sleeper::start();
    let keeper = SystemdKeeper::new(Path::new("/nonexistent/notify"), Vec::new()).expect("an address");
    assert!(matches!(keeper.keep(&vm("a", &process.0)), Err(KeepError::Io { .. })));
}
