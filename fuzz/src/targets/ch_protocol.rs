//! Cloud Hypervisor's offload protocol: heads, ranges and the order of requests.
use dormouse_cloud_hypervisor::protocol::{self, GuestRange, Request, Response, SleepSequence};

pub(crate) fn check(bytes: &[u8]) {
    let mut at = SleepSequence::default();
    for message in bytes.as_chunks::<{ protocol::HEAD_BYTES }>().0 {
        if let Ok(response) = Response::decode(message) {
            assert_eq!(Response::decode(&response.encode()), Ok(response));
        }
        if let Ok(range) = GuestRange::decode(message) {
            assert!(range.length > 0 && range.address.checked_add(range.length).is_some());
            assert_eq!(&range.encode(), message);
        }
        if let Ok(request) = Request::decode(message) {
            assert_eq!(Request::decode(&request.encode()), Ok(request));
            assert!(
                request.length <= protocol::STATE_BYTES_MAX || request.command == protocol::Command::Memory
            );
            let Ok(next) = at.step(request.command) else { return };
            assert!(next != SleepSequence::Completed || at == SleepSequence::StateReceived);
            at = next;
        }
    }
}
