//! Names, hexadecimal identities, pages and their geometry.
#![allow(clippy::unwrap_used)]

use dormouse_core::{limits::NAME_BYTES_MAX, *};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_name_is_what_its_rules_say(text in "[a-zA-Z0-9._/-]{0,6}|.{0,6}") {
        let allowed = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
        let right = text.chars().all(allowed)
            && text.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
        prop_assert_eq!(Name::new(text.clone()).is_ok(), right);
        prop_assert_eq!(text.parse::<ImageId>().is_ok(), right);
    }

    #[test]
    fn identities_come_back_from_their_text(bytes: [u8; 32]) {
        let id = PackId(bytes);
        prop_assert_eq!(PackId::from_hex(&id.to_string()), Some(id));
    }

    #[test]
    fn only_their_own_text_is_an_identity(text in "[0-9a-gA-F+é]{31,33}") {
        let right = text.len() == 32 && text.bytes().all(|b| b"0123456789abcdef".contains(&b));
        prop_assert_eq!(FrameHash::from_hex(&text).is_some(), right);
    }

    #[test]
    fn a_page_is_zero_if_all_its_bytes_are(len in 0usize..200, at in any::<prop::sample::Index>()) {
        let mut page = vec![0; len];
        prop_assert!(is_zero(&page));
        if len > 0 {
            page[at.index(len)] = 1;
            prop_assert!(!is_zero(&page));
        }
    }

    #[test]
    fn sections_divide_an_image(pages in 0u64..=IMAGE_PAGES_MAX) {
        let image = PageCount(pages);
        let sections = image.sections();
        let mut next = 0;
        for s in [0, sections / 2, sections.saturating_sub(1), sections] {
            let range = SectionIndex(s).pages(image);
            prop_assert!(range.end - range.start <= SECTION_PAGES);
            prop_assert!(range.start >= next || range.is_empty());
            next = range.end;
            if !range.is_empty() {
                prop_assert_eq!(PageIndex(range.start).section(), SectionIndex(s));
                prop_assert_eq!(PageIndex(range.end - 1).section(), SectionIndex(s));
                prop_assert_eq!(PageIndex(range.start).in_section(), 0);
            }
        }
        prop_assert_eq!(next, pages);
        prop_assert!(SectionIndex(sections).pages(image).is_empty());
    }
}

#[test]
fn names_that_could_lead_elsewhere_are_refused() {
    for name in ["", ".", "..", "../x", "a/b", "/a", "-a", ".a", "_a", "a b", "a\0", "ä", "a\n"] {
        assert!(matches!(Name::new(name), Err(FormatError::BadName { .. })), "{name:?}");
    }
    assert!(Name::new("a".repeat(NAME_BYTES_MAX)).is_ok());
    assert!(Name::new("a".repeat(NAME_BYTES_MAX + 1)).is_err());
    assert_eq!(Name::new("0-idle.mem_2").unwrap().to_string(), "0-idle.mem_2");
}

#[test]
fn a_bad_name_is_shown_cut_short_and_escaped() {
    let error = Name::new(format!("\u{1b}[2J{}", "x".repeat(5000))).unwrap_err().to_string();
    assert!(error.len() < 300 && !error.contains('\u{1b}'), "{error}");
}
