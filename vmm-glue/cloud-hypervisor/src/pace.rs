//! How fast a VMM that goes through its memory is answered.
//!
//! When no fault waits, Cloud Hypervisor asks for one page after another as fast as it is answered, which keeps two cores
//! busy: its handler's and the one that answers. A guest that has its working set does not need that, and needs a core. So
//! for the first second the answers to such requests take their time, as long as the guest does not fault; a guest that
//! does is answered at once, and for a while its VMM too.

use std::time::Duration;

/// For how long from the first request on.
pub(super) const EASED: Duration = Duration::from_secs(1);
/// How long an answer takes then: what a fault waits at most that comes meanwhile.
const REST: Duration = Duration::from_micros(200);
/// So many requests in order, one after another, say that the guest does not fault at the moment.
const QUIET: u32 = 32;

/// The pace for one VM.
#[derive(Debug, Default)]
pub(super) struct Pace {
    in_order: u32,
}

impl Pace {
    /// How long to wait before a request is answered that came so long after the first. `touched` says whether the guest
    /// waits for it.
    pub(super) fn rest(&mut self, touched: bool, since: Duration) -> Option<Duration> {
        self.in_order = if touched { 0 } else { self.in_order.saturating_add(1) };
        (self.in_order > QUIET && since < EASED).then_some(REST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_vmm_whose_guest_does_not_fault_is_kept_waiting_and_only_at_first() {
        let mut pace = Pace::default();
        let mut rests =
            |touched: bool, times: u32| (0..times).filter_map(|_| pace.rest(touched, REST)).count();
        assert_eq!(rests(false, QUIET), 0);
        assert_eq!(rests(false, 5), 5);
        assert_eq!(rests(true, 1), 0, "a fault is answered at once");
        assert_eq!(rests(false, QUIET), 0, "and more may come");
        assert_eq!(rests(false, 1), 1);
        assert_eq!(pace.rest(false, EASED), None);
    }
}
