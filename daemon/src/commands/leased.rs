//! Commands of which one at a time may run: ended by a signal, they let the next one begin.

use std::{fs, process, thread};

use dormouse_chunkstore::Store;
use tokio::{
    runtime::{Builder, Runtime},
    signal::unix::{Signal, SignalKind, signal},
};

use crate::failure::Failure;

/// What is caught: the user's Ctrl-C, a service manager's stop, a terminal that is gone.
const KINDS: [(SignalKind, i32); 3] =
    [(SignalKind::interrupt(), 2), (SignalKind::terminate(), 15), (SignalKind::hangup(), 1)];

/// Has the store's lease given back when a signal ends this process. A second signal ends it at once.
pub(crate) fn give_back_on_signals(store: &Store) -> Result<(), Failure> {
    let failed = |e: std::io::Error| Failure::new("threads", format!("no thread could be started: {e}"));
    let runtime = Builder::new_current_thread().enable_io().build().map_err(failed)?;
    let ignored = ignored();
    let caught = {
        let _within = runtime.enter();
        let caught = KINDS.into_iter().filter(|(_, number)| ignored >> (number - 1) & 1 == 0);
        let caught = caught.map(|(kind, number)| Ok((signal(kind)?, number)));
        caught.collect::<std::io::Result<Vec<_>>>().map_err(failed)?
    };
    let store = store.clone();
    let spawned =
        thread::Builder::new().name("dm-signals".into()).spawn(move || wait(&runtime, caught, store));
    spawned.map(drop).map_err(failed)
}

fn wait(runtime: &Runtime, mut caught: Vec<(Signal, i32)>, store: Store) {
    let number = runtime.block_on(next(&mut caught));
    let given_back = thread::Builder::new().name("dm-lease".into()).spawn(move || {
        match store.give_back_lease() {
            Ok(true) => tracing::info!("ended by a signal; the next collector or repacker need not wait"),
            Ok(false) => {}
            Err(why) => {
                tracing::warn!(%why, "ended by a signal; others wait until this process is taken for dead")
            }
        }
        process::exit(128 + number);
    });
    if given_back.is_ok() {
        runtime.block_on(next(&mut caught));
    }
    process::exit(128 + number);
}

/// The number of the next signal.
async fn next(caught: &mut [(Signal, i32)]) -> i32 {
    std::future::poll_fn(|context| {
        for (signal, number) in caught.iter_mut() {
            if signal.poll_recv(context).is_ready() {
                return std::task::Poll::Ready(*number);
            }
        }
        std::task::Poll::Pending
    })
    .await
}

/// Signals that whoever started this process wants ignored, as `nohup` does: a bit each.
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
