//! Waking a guest in a real Cloud Hypervisor: through Dormouse and through the VMM's own example of a daemon, on demand and
//! eagerly. `cargo bench -p dormouse --bench cloud_hypervisor`
//!
//! `DORMOUSE_CLOUD_HYPERVISOR` names the VMM, `DORMOUSE_CH_OFFLOAD_DAEMON` its `offload_daemon`; without the latter there is
//! nothing to compare with. Timed from the request, with the VMM started and without a VM, and no other process there yet,
//! until the guest, which touches 16 MiB, has once verified all of it. Both wake the same state.
#![allow(clippy::unwrap_used, reason = "a benchmark")]

#[path = "../tests/cloud_hypervisor/machine.rs"]
mod machine;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use dormouse_benches::Row;
use dormouse_benches::stats::{median, ms};

use machine::{Binaries, Machine, wait_for};

const TURNS: usize = 9;

struct Bed {
    dir: tempfile::TempDir,
    binaries: Binaries,
    daemon: Option<PathBuf>,
}

impl Bed {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn dormouse(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dormouse"));
        command.args(args).env("DORMOUSE_STORE", self.path("store")).env("HOME", self.dir.path());
        command.env("XDG_RUNTIME_DIR", self.path("run")).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(Stdio::null());
        command
    }

    /// The VMM's own daemon, which takes or gives a VM at `socket`.
    fn daemon(&self, daemon: &Path, args: &[&str]) -> Child {
        let mut command = Command::new(daemon);
        command.args(args).args(["--socket", &self.text("offload.sock")]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// Has `machine` receive a VM from the daemon. The thread ends when it has.
    fn give(&self, daemon: &Path, machine: &Machine, on_demand: bool, run: bool) -> Child {
        let socket = self.path("offload.sock");
        let _ = std::fs::remove_file(&socket);
        let (client, listens) = (machine.client(), socket.clone());
        thread::spawn(move || client.receive_migration(&listens, on_demand));
        while !socket.exists() {
            thread::sleep(Duration::from_micros(100));
        }
        let directory = self.text("offloaded");
        let mut args = vec!["restore", "--input-dir", &directory];
        args.extend(run.then_some("--resume"));
        args.extend(on_demand.then_some("--ondemand"));
        self.daemon(daemon, &args)
    }

    /// A guest that has filled its memory, with the daemon and in the store: the same state.
    fn sleep(&self) {
        let serial = self.path("serial");
        let mut machine = Machine::boot(&self.binaries.sleeps, self.dir.path(), &serial);
        if let Some(daemon) = &self.daemon {
            let mut saved = self.daemon(daemon, &["snapshot", "--output-dir", &self.text("offloaded")]);
            while !self.path("offload.sock").exists() {
                thread::sleep(Duration::from_millis(1));
            }
            machine.client().send_migration(&self.path("offload.sock")).unwrap();
            assert!(saved.wait().unwrap().success());
            assert!(machine.ended());
            machine = Machine::start(&self.binaries.sleeps, self.dir.path(), "again", &[]);
            assert!(self.give(daemon, &machine, false, false).wait().unwrap().success());
        }
        let args = ["standby", "cloud-hypervisor", "vm", "--api-socket", machine.api()];
        assert!(self.dormouse(&args).status().unwrap().success(), "the guest cannot be put on standby");
    }

    /// Wakes by `wake`, until the guest has verified its memory; then waits until the daemon has done.
    fn wake(&self, wake: impl FnOnce(&Machine) -> Child) -> f64 {
        let serial = self.path("serial");
        std::fs::remove_file(&serial).unwrap();
        let machine = Machine::start(&self.binaries.wakes, self.dir.path(), "wake", &[]);
        let begun = Instant::now();
        let mut daemon = wake(&machine);
        wait_for(&serial, '.', 1);
        let verified = ms(begun.elapsed());
        assert!(!machine::said(&serial).contains('X'), "a wrong page");
        daemon.wait().unwrap();
        verified
    }

    fn by_dormouse(&self, eager: bool) -> f64 {
        self.wake(|machine| {
            let args = ["resume", "cloud-hypervisor", "vm", "--api-socket", machine.api()];
            self.dormouse(&args).args(eager.then_some("--eager")).spawn().unwrap()
        })
    }
}

fn main() {
    let Some(binaries) = Binaries::of_environment() else {
        eprintln!("SKIPPED: DORMOUSE_CLOUD_HYPERVISOR does not name a Cloud Hypervisor binary");
        return;
    };
    let daemon = std::env::var_os("DORMOUSE_CH_OFFLOAD_DAEMON").map(PathBuf::from);
    let bed = Bed { dir: tempfile::tempdir().unwrap(), binaries, daemon };
    bed.sleep();
    let mut samples: [Vec<f64>; 4] = Default::default();
    let mut first = 0.0;
    for turn in 0..=TURNS {
        // The turn that does not count records the working set.
        let mut woken = vec![bed.by_dormouse(false), bed.by_dormouse(true)];
        if let Some(daemon) = &bed.daemon {
            woken.push(bed.wake(|machine| bed.give(daemon, machine, true, true)));
            woken.push(bed.wake(|machine| bed.give(daemon, machine, false, true)));
        }
        if turn > 0 {
            samples.iter_mut().zip(woken).for_each(|(all, one)| all.push(one));
        } else {
            first = woken[0];
        }
    }
    println!("the first time, without a stream: {first:.1} ms on demand");
    let [on_demand, eager, theirs_on_demand, theirs_eager] =
        samples.map(|all| if all.is_empty() { f64::NAN } else { median(all) });
    let rows = [
        Row::at_most("ch_verified_on_demand", "ms", on_demand, theirs_on_demand, 0.35),
        Row::reported("ch_verified_eager", "ms", eager, theirs_eager),
        Row::reported("ch_on_demand_by_eager", "ms", on_demand, eager),
    ];
    println!("{:<34} {:>9} {:>9} {:>6} {:>7}", "ROW", "DORMOUSE", "OTHER", "RATIO", "TARGET");
    for row in rows {
        let target = row.target.map_or("-".to_owned(), |t| t.to_string());
        println!("{:<34} {:>9.1} {:>9.1} {:>6.2} {target:>7}", row.name, row.value, row.floor, row.ratio);
    }
}
