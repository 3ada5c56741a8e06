//! What systemd is told. Without systemd, nobody is.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::task::JoinHandle;

/// How much longer than this a stop may take is told again and again.
const EXTENSION: Duration = Duration::from_secs(30);

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "systemd could not be told");
    }
}

/// Requests are answered from now on.
pub(super) fn ready() {
    tell(&[NotifyState::Ready]);
}

/// The end has begun.
pub(super) fn stopping(status: &str) {
    let extension = u32::try_from(EXTENSION.as_micros()).unwrap_or(u32::MAX);
    tell(&[NotifyState::Stopping, NotifyState::Status(status), NotifyState::ExtendTimeoutUsec(extension)]);
}

/// Says again and again that requests are still answered, if systemd asks for it (`WatchdogSec=`).
pub(super) fn watchdog() -> JoinHandle<()> {
    tokio::spawn(async {
        let Some(limit) = sd_notify::watchdog_enabled() else { return };
        loop {
            tell(&[NotifyState::Watchdog]);
            tokio::time::sleep(limit / 3).await;
        }
    })
}
