//! Bodies as somebody might send them: each part of a good one cut, changed, left out or said twice.

use super::*;

const WAKE: &str = r#"{"id":"a","snapshot":"vm","firecracker":"/bin/f","api_socket":"/run/s","console":"/c","policy":"hold","give_up_after_s":120,"prefetch":false,"record_window_s":0}"#;
const LISTEN: &str =
    r#"{"snapshot":"vm","socket":"/run/s","uid":4294967295,"policy":"kill","give_up_after_s":1}"#;
const STANDBY: &str = r#"{"name":"x","request_id":"é\u0000","parent":"p","disks":[{"id":"root","file":"/d"}],"keep_running":false,"level":19}"#;

/// Reads `body` as each request and takes it apart as its handler would; whether one could be done.
fn is_taken(body: &[u8]) -> bool {
    let wake = serde_json::from_slice::<WakeRequest>(body).is_ok_and(|r| r.args(None).is_ok());
    let listen = serde_json::from_slice::<ListenRequest>(body).is_ok_and(|r| r.args().is_ok());
    let standby = serde_json::from_slice::<StandbyRequest>(body);
    let standby = standby.is_ok_and(|r| r.args(Path::new("/run/s")).is_ok());
    let stop = serde_json::from_slice::<StopRequest>(body).is_ok();
    let nothing = serde_json::from_slice::<Nothing>(body).is_ok();
    wake || listen || standby || stop || nothing
}

#[test]
fn no_body_makes_it_panic() {
    let mut taken = 0;
    for good in [WAKE, LISTEN, STANDBY, r#"{"grace_s":5}"#] {
        let good = good.as_bytes();
        for at in 0..good.len() {
            assert!(!is_taken(&good[..at]), "cut to {at}");
            for byte in [b'"', b'\\', b'{', b'}', b'[', b'0', b'9', b'-', b'.', b'/', b',', 0, 0xff] {
                let changed = [&good[..at], &[byte], &good[at + 1..]].concat();
                let added = [&good[..at], &[byte], &good[at..]].concat();
                taken += usize::from(is_taken(&changed)) + usize::from(is_taken(&added));
            }
            for end in at..good.len() {
                taken += usize::from(is_taken(&[&good[..at], &good[end..]].concat()));
            }
        }
        let twice = [&good[..good.len() - 1], b",", &good[1..]].concat();
        assert!(!is_taken(&twice), "what is said twice is not clear");
        let deep = [vec![b'['; 100_000], good.to_vec(), vec![b']'; 100_000]].concat();
        assert!(!is_taken(&deep));
    }
    assert!(taken > 0, "some changes make no difference");
}
