use super::*;
use proptest::prelude::*;

fn one(host: u64, size: u64, offset: u64, page_size: u64) -> String {
    format!(r#"{{"base_host_virt_addr":{host},"size":{size},"offset":{offset},"page_size":{page_size}}}"#)
}

fn list(regions: &[String]) -> Vec<u8> {
    format!("[{}]", regions.join(",")).into_bytes()
}

fn refused(message: &[u8], part: &str) {
    let error = parse_regions(message).expect_err("must be refused").to_string();
    assert!(error.contains(part), "{error:?} does not say {part:?}");
}

#[test]
fn both_versions_of_the_message_give_the_same() {
    let old =
        br#"[{"base_host_virt_addr":4096,"size":8192,"offset":0,"page_size":4096,"page_size_kib":4096}]"#;
    let new = br#"[{"base_host_virt_addr":4096,"size":8192,"offset":0,"page_size":4096}]"#;
    let expected = [Region { host: 4096, bytes: 8192, offset: 0, page_size: PageSize::Small }];
    assert_eq!(parse_regions(old).expect("1.12"), expected);
    assert_eq!(parse_regions(new).expect("later"), expected);
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let m = 2 << 20;
    refused(b"[]", "0 regions");
    refused(b"{}", "JSON");
    refused(&list(&[one(4096, 0, 0, 4096)]), "size is zero");
    refused(&list(&[one(0, 4096, 0, 4096)]), "no process");
    refused(&list(&[one(4097, 4096, 0, 4096)]), "its address");
    refused(&list(&[one(4096, 4095, 0, 4096)]), "its size");
    refused(&list(&[one(4096, 4096, 1, 4096)]), "its offset");
    refused(&list(&[one(m + 4096, m, 0, m)]), "its address");
    refused(&list(&[one(4096, 4096, 0, 8192)]), "page size");
    refused(&list(&[one(u64::MAX - 4095, 8192, 0, 4096)]), "no process");
    refused(&list(&[one(4096, 8192, u64::MAX - 4095, 4096)]), "no snapshot");
    let twice = one(4096, 4096, 0, 4096);
    refused(&list(&[twice.clone(), twice]), "overlap in memory");
    refused(&list(&[one(4096, 4096, 0, 4096), one(8192, 4096, 0, 4096)]), "overlap in the snapshot");
    refused(&list(&[one(8192, 4096, 0, 4096), one(4096, 8192, 4096, 4096)]), "regions 1 and 0 overlap");
    let many: Vec<String> = (1..258).map(|i| one(i * 4096, 4096, i * 4096, 4096)).collect();
    refused(&list(&many), "257 regions");
    refused(&vec![b' '; MESSAGE_BYTES_MAX + 1], "more than");
    refused(
        br#"[{"base_host_virt_addr":4096,"size":4096,"size":8192,"offset":0,"page_size":4096}]"#,
        "duplicate field",
    );
    refused(
        br#"[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4096,"page_size_kib":4}]"#,
        "differ",
    );
    refused(br#"[{"base_host_virt_addr":4096,"size":4096,"offset":0}]"#, "no page_size");
    refused(br#"[{"base_host_virt_addr":-4096,"size":4096,"offset":0,"page_size":4096}]"#, "JSON");
}

#[test]
fn every_proper_prefix_is_incomplete() {
    let whole = list(&[one(4096, 4096, 0, 4096), one(8192, 4096, 4096, 4096)]);
    for length in 0..whole.len() {
        assert!(parse_regions(&whole[..length]).expect_err("cut").is_incomplete(), "cut to {length}");
    }
}

#[test]
fn a_cut_inside_an_ignored_number_is_incomplete() {
    let field = r#"[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4096,"later":"#;
    for number in ["4e5", "4E+5", "4e-5", "0.5", "-1.25e3", "[[-1], {\"a\": 2.5}]"] {
        let whole = format!("{field}{number}}}]");
        parse_regions(whole.as_bytes()).expect("the field is ignored");
        for length in 0..whole.len() {
            let error = parse_regions(&whole.as_bytes()[..length]).expect_err("cut");
            assert!(error.is_incomplete(), "{}: {error}", &whole[..length]);
        }
    }
}

#[test]
fn what_no_digit_completes_is_malformed() {
    for end in ["4x", "e", "4e5e", "4..", "--", "+", "\"a\"-", "{-"] {
        let cut = format!(r#"[{{"base_host_virt_addr":4096,"later":{end}"#);
        let error = parse_regions(cut.as_bytes()).expect_err("no JSON");
        assert!(!error.is_incomplete(), "{cut}: {error}");
    }
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = parse_regions(&bytes);
    }

    #[test]
    fn whatever_is_accepted_is_disjoint_and_aligned(
        wire in proptest::collection::vec((0u64..64, 0u64..9, 0u64..64, 0u64..4), 1..6),
    ) {
        let regions: Vec<String> =
            wire.iter().map(|&(h, s, o, low)| one(h * 4096 + low / 3, s * 4096, o * 4096, 4096)).collect();
        let Ok(parsed) = parse_regions(&list(&regions)) else { return Ok(()) };
        for (i, a) in parsed.iter().enumerate() {
            prop_assert!(a.bytes > 0 && (a.host | a.bytes | a.offset) % 4096 == 0);
            for b in &parsed[..i] {
                let apart = |a: Range<u64>, b: Range<u64>| a.end <= b.start || b.end <= a.start;
                prop_assert!(apart(a.host_range(), b.host_range()));
                prop_assert!(apart(a.image_range(), b.image_range()));
            }
        }
    }
}
