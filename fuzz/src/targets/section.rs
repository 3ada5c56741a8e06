//! A page-map section: what decodes encodes back to the same bytes, answers for every page, and can be built again.
use dormouse_core::{
    FrameRef, SECTION_PAGES, Section, SectionBuilder,
    section::{Extent, PagePlace},
};

pub(crate) fn check(raw: &[u8]) {
    let Ok(section) = Section::decode(raw) else { return };
    assert_eq!(section.encode(), raw);
    let (mut next, mut stored) = (0, 0);
    let mut builder = SectionBuilder::new();
    for (first, extent) in section.extents() {
        assert_eq!(first, next);
        match extent {
            Extent::Zero { pages } => {
                (0..pages).for_each(|_| builder.push(None));
                next += pages as usize;
            }
            Extent::Frame { frame, slot, pages } => {
                let frame = section.frames()[frame as usize];
                let pack = section.packs()[frame.pack as usize];
                assert!(slot.get() + pages as usize <= frame.pages());
                assert!(frame.range().end <= u64::from(pack.footer_offset));
                for n in 0..pages as usize {
                    let slot = dormouse_core::Slot::new(slot.get() + n).expect("a slot of its frame");
                    builder.push(Some(PagePlace { pack, frame, slot }));
                }
                next += pages as usize;
                stored += pages;
            }
        }
    }
    assert_eq!((next, stored), (section.end_page(), section.stored_pages()));
    assert!(next as u64 <= SECTION_PAGES && stored > 0);

    // The builder keeps one entry for each frame, so compare what the pages are, where tables allow.
    let unique = {
        let mut seen = std::collections::HashSet::new();
        section.frames().iter().all(|f: &FrameRef| seen.insert((f.pack, f.offset)))
    };
    if unique {
        let built = builder.finish().expect("it has stored pages");
        assert_eq!(built.stored_pages(), stored);
        assert_eq!(Section::decode(&built.encode()).as_ref(), Ok(&built));
        for page in 0..next {
            let place = |s: &Section| match s.extent(page) {
                Extent::Zero { .. } => None,
                Extent::Frame { frame, slot, .. } => {
                    let frame = s.frames()[frame as usize];
                    Some((s.packs()[frame.pack as usize], FrameRef { pack: 0, ..frame }, slot))
                }
            };
            assert_eq!(place(&built), place(&section));
        }
    }
}
