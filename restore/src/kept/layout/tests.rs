use proptest::prelude::*;

use super::*;

fn header() -> Header {
    Header { cells: 5000, image: [7; 32], regions: [9; 32] }
}

#[test]
fn what_is_written_is_read() {
    let bytes = header().file_bytes().expect("few");
    assert_eq!(bytes, 8192 + 8192);
    assert_eq!(Header::decode(&header().encode(), bytes), Ok(header()));
}

#[test]
fn states_of_others_are_refused_by_name() {
    let (mine, bytes) = (header(), 16384);
    let other = Header { image: [8; 32], ..mine };
    let error = other.check(&mine).expect_err("another snapshot");
    assert!(error.to_string().contains(&"08".repeat(32)), "{error}");
    for other in [Header { regions: [1; 32], ..mine }, Header { cells: 4999, ..mine }] {
        assert_eq!(other.check(&mine), Err(LayoutError::OtherRegions));
    }
    let mut encoded = mine.encode();
    assert_eq!(
        Header::decode(&encoded, bytes + 4096),
        Err(LayoutError::Size { cells: 5000, bytes: bytes + 4096 })
    );
    encoded[8] = 2;
    assert_eq!(Header::decode(&encoded, bytes), Err(LayoutError::Version { found: 2 }));
    encoded[0] = 0;
    assert_eq!(Header::decode(&encoded, bytes), Err(LayoutError::NotStates));
    let huge = Header { cells: u64::MAX, ..mine };
    assert_eq!(huge.file_bytes(), None);
}

#[test]
fn every_state_left_behind_has_one_to_go_on_from() {
    use PageState as S;
    let go_on = |state: S| recovered(0, state as u8).expect("a state");
    for (left, now) in [
        (S::Absent, S::Absent),
        (S::Awaited, S::Absent),
        (S::Copying, S::Absent),
        (S::Installed, S::Installed),
        (S::Removed, S::Removed),
        (S::Poisoned, S::Poisoned),
    ] {
        assert_eq!(go_on(left), now);
    }
    for byte in 6..=255 {
        assert_eq!(recovered(3, byte), Err(LayoutError::BadState { cell: 3, byte }));
    }
}

#[test]
fn only_removals_are_taken_from_events_left_behind() {
    let mut events = [0; EVENTS_BYTES];
    for (slot, kind) in [(0, 0x12), (1, 0x15), (2, 0x13), (3, 0x16), (5, 0x15)] {
        events[slot * 32] = kind;
        events[slot * 32 + 8..][..8].copy_from_slice(&(slot as u64 * 0x1000).to_ne_bytes());
        events[slot * 32 + 16..][..8].copy_from_slice(&(slot as u64 * 0x1000 + 0x800).to_ne_bytes());
    }
    let ranges: Vec<_> = removed(&events).collect();
    assert_eq!(ranges, [(0x1000, 0x1800), (0x3000, 0x3800), (0x5000, 0x5800)]);
}

proptest! {
    #[test]
    fn any_header_is_read_without_panic(bytes: [u8; 24], file_bytes: u64, magic: bool) {
        let mut header = [0; HEADER_BYTES];
        header[..24].copy_from_slice(&bytes);
        if magic {
            header[..16].copy_from_slice(&Header { cells: 0, image: [0; 32], regions: [0; 32] }.encode()[..16]);
        }
        if let Ok(read) = Header::decode(&header, file_bytes) {
            prop_assert_eq!(read.encode(), header);
            prop_assert_eq!(read.file_bytes(), Some(file_bytes));
        }
    }
}
