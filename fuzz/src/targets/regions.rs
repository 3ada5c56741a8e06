//! The region list Firecracker sends with its userfaultfd, whole and in pieces.
use dormouse_keeper::regions::{REGIONS_MAX, Region, parse_regions};

pub(crate) fn check(bytes: &[u8]) {
    let Ok(regions) = parse_regions(bytes) else { return };
    assert!((1..=REGIONS_MAX).contains(&regions.len()));
    for region in &regions {
        assert!(region.bytes > 0);
        assert_eq!((region.host | region.bytes | region.offset) % region.page_size.bytes(), 0);
        assert!(region.host.checked_add(region.bytes).is_some());
    }
    for space in [Region::host_range, Region::image_range] {
        let mut ranges: Vec<_> = regions.iter().map(space).collect();
        ranges.sort_by_key(|range| range.start);
        assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
    }
    if bytes.len() > 2048 {
        return; // Every cut is tried.
    }
    // Where a message is cut, the rest may still come.
    for cut in 0..bytes.trim_ascii_end().len() {
        match parse_regions(&bytes[..cut]) {
            Err(error) => assert!(error.is_incomplete(), "cut to {cut}: {error}"),
            Ok(_) => panic!("cut to {cut}, it is another list"),
        }
    }
}
