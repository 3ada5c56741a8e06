//! Page-map sections: for 16 Ki pages (64 MiB) of an image, which frame and slot holds each.
//!
//! A section is stored as a frame of its own. Decoded, it is a table of packs, a table of frames, and runs in
//! page order. A run is `length << 1 | has_frames`; a run of zero pages is nothing more, a run of stored pages
//! adds the zigzag distance of its first place from where the previous such run ended. A *place* is
//! `frame * 32 + slot`, so pages stored in sequence are one run, however many frames they fill.

use std::collections::HashMap;

use crate::{
    error::FormatError,
    frame::FrameRef,
    id::PackId,
    pack::PackRef,
    page::{FRAME_PAGES_MAX, SECTION_PAGES, Slot},
    wire::{Reader, Writer},
};

const WHAT: &str = "page-map section";
const SECTION_VERSION: u8 = 1;
const FRAMES_MAX: usize = SECTION_PAGES as usize;

/// Consecutive pages of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    first_page: u16,
    pages: u16,
    /// The first page's place, or `None` for zero pages.
    place: Option<u32>,
}

/// What a section says of a page and those right after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// This many zero pages.
    Zero {
        /// How many.
        pages: u64,
    },
    /// This many pages in consecutive slots of one frame.
    Frame {
        /// Index into [`Section::frames`].
        frame: u32,
        /// Slot of the first page.
        slot: Slot,
        /// How many.
        pages: u64,
    },
}

/// A decoded section.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Section {
    packs: Vec<PackRef>,
    frames: Vec<FrameRef>,
    runs: Vec<Run>,
}

impl Section {
    /// The packs its frames lie in.
    pub fn packs(&self) -> &[PackRef] {
        &self.packs
    }

    /// The frames it refers to; each one's `pack` indexes [`Section::packs`].
    pub fn frames(&self) -> &[FrameRef] {
        &self.frames
    }

    /// What is at `page` (its number within the section). Past the last run all pages are zero.
    ///
    /// # Panics
    /// If `page` is not below [`SECTION_PAGES`], as an index out of range would: any answer would be a wrong one.
    pub fn extent(&self, page: usize) -> Extent {
        assert!((page as u64) < SECTION_PAGES, "page {page} is not in a section");
        let page = page as u32;
        let after = self.runs.partition_point(|r| u32::from(r.first_page) <= page);
        let Some(run) = after.checked_sub(1).map(|i| self.runs[i]) else {
            let next = self.runs.first().map_or(SECTION_PAGES, |r| u64::from(r.first_page));
            return Extent::Zero { pages: next - u64::from(page) };
        };
        let into = page - u32::from(run.first_page);
        if into >= u32::from(run.pages) {
            let next = self.runs.get(after).map_or(SECTION_PAGES, |r| u64::from(r.first_page));
            return Extent::Zero { pages: next - u64::from(page) };
        }
        let left = u64::from(u32::from(run.pages) - into);
        match run.place {
            None => Extent::Zero { pages: left },
            Some(first) => {
                let place = first + into;
                let slot = Slot::of_place(place);
                let in_frame = (FRAME_PAGES_MAX - slot.get()) as u64;
                Extent::Frame { frame: place / FRAME_PAGES_MAX as u32, slot, pages: left.min(in_frame) }
            }
        }
    }

    /// The whole extent that `page` is in: back to where its run or frame begins as well as on from `page`.
    ///
    /// # Panics
    /// As [`Section::extent`].
    pub fn extent_around(&self, page: usize) -> (usize, Extent) {
        let back = match self.extent(page) {
            Extent::Zero { .. } => {
                let before = self.runs.partition_point(|r| usize::from(r.first_page) <= page);
                let run = before.checked_sub(1).map(|i| self.runs[i]);
                run.map_or(page, |r| match r.place {
                    None => page - usize::from(r.first_page),
                    Some(_) => page - usize::from(r.first_page) - usize::from(r.pages),
                })
            }
            Extent::Frame { slot, .. } => {
                let before = self.runs.partition_point(|r| usize::from(r.first_page) <= page);
                let run = before.checked_sub(1).map(|i| self.runs[i]);
                run.map_or(0, |r| slot.get().min(page - usize::from(r.first_page)))
            }
        };
        (page - back, self.extent(page - back))
    }

    /// All extents in page order, as (first page within the section, extent), without trailing zero pages.
    pub fn extents(&self) -> impl Iterator<Item = (usize, Extent)> + '_ {
        let end = self.end_page();
        let mut page = 0;
        std::iter::from_fn(move || {
            if page >= end {
                return None;
            }
            let extent = self.extent(page);
            let at = page;
            page += match extent {
                Extent::Zero { pages } | Extent::Frame { pages, .. } => pages as usize,
            };
            Some((at, extent))
        })
    }

    /// The extents that show pages of `frame` (an index into [`Section::frames`]), in page order.
    pub fn extents_of(&self, frame: u32) -> impl Iterator<Item = (usize, Extent)> + '_ {
        let first = u64::from(frame) * FRAME_PAGES_MAX as u64;
        let end = first + FRAME_PAGES_MAX as u64;
        self.runs.iter().filter_map(move |run| {
            let place = u64::from(run.place?);
            let from = place.max(first);
            let to = (place + u64::from(run.pages)).min(end);
            let pages = to.checked_sub(from).filter(|n| *n > 0)?;
            let at = usize::from(run.first_page) + (from - place) as usize;
            Some((at, Extent::Frame { frame, slot: Slot::of_place(from as u32), pages }))
        })
    }

    /// One past the last page that is not zero.
    pub fn end_page(&self) -> usize {
        self.runs.last().map_or(0, |r| usize::from(r.first_page) + usize::from(r.pages))
    }

    /// Pages that are not zero.
    pub fn stored_pages(&self) -> u64 {
        self.runs.iter().filter(|r| r.place.is_some()).map(|r| u64::from(r.pages)).sum()
    }

    /// The section's raw bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u8(SECTION_VERSION);
        PackRef::write_table(&mut w, &self.packs);
        w.varint(self.frames.len() as u64);
        self.frames.iter().for_each(|f| f.write(&mut w));
        w.varint(self.runs.len() as u64);
        let mut expected = 0i64;
        for run in &self.runs {
            w.varint(u64::from(run.pages) << 1 | u64::from(run.place.is_some()));
            if let Some(place) = run.place {
                w.zigzag(i64::from(place) - expected);
                expected = i64::from(place) + i64::from(run.pages);
            }
        }
        w.finish()
    }

    /// Decodes a section's raw bytes.
    pub fn decode(raw: &[u8]) -> Result<Self, FormatError> {
        let mut r = Reader::new(raw, WHAT);
        match r.u8()? {
            SECTION_VERSION => {}
            0 => return Err(r.malformed("version 0")),
            v => {
                let (needs, reads) = (v.into(), SECTION_VERSION.into());
                return Err(FormatError::TooNew { what: WHAT, needs, reads });
            }
        }
        let packs = PackRef::read_table(&mut r)?;
        let n = r.count("frames in a section", FRAMES_MAX, FrameRef::BYTES_MIN)?;
        let mut frames = Vec::with_capacity(n);
        for _ in 0..n {
            let frame = FrameRef::read(&mut r, packs.len())?;
            frame.check_pages()?;
            packs[frame.pack as usize].check_frame(&frame)?;
            frames.push(frame);
        }
        let n = r.count("runs in a section", SECTION_PAGES as usize, 1)?;
        let mut runs: Vec<Run> = Vec::with_capacity(n);
        let (mut page, mut expected) = (0u64, 0i64);
        for _ in 0..n {
            let head = r.varint()?;
            let pages = head >> 1;
            if pages == 0 || page + pages > SECTION_PAGES {
                return Err(r.malformed("a run is empty or reaches past the section"));
            }
            let mut place = None;
            if head & 1 == 1 {
                let first = expected
                    .checked_add(r.zigzag()?)
                    .and_then(|p| u32::try_from(p).ok())
                    .ok_or_else(|| r.malformed("a place is out of range"))?;
                check_run(&frames, first, pages)?;
                expected = i64::from(first) + pages as i64;
                place = Some(first);
            }
            if runs.last().is_some_and(|last| continues(last, place)) {
                return Err(r.malformed("a run is split in two"));
            }
            runs.push(Run { first_page: page as u16, pages: pages as u16, place });
            page += pages;
        }
        r.end()?;
        if runs.last().is_none_or(|last| last.place.is_none()) {
            return Err(r.malformed("zero pages at its end are written out"));
        }
        Ok(Section { packs, frames, runs })
    }
}

/// Checks that every place of a run is a slot its frame really has.
fn check_run(frames: &[FrameRef], first: u32, pages: u64) -> Result<(), FormatError> {
    let bad = FormatError::Malformed { what: WHAT, why: "a place is not in any frame" };
    let mut place = first as usize;
    let end = place + pages as usize;
    while place < end {
        let (frame, slot) = (place / FRAME_PAGES_MAX, place % FRAME_PAGES_MAX);
        let held = frames.get(frame).map_or(0, FrameRef::pages);
        let take = (end - place).min(FRAME_PAGES_MAX - slot);
        if slot + take > held {
            return Err(bad);
        }
        place += take;
    }
    Ok(())
}

/// Where one page is, in terms that hold outside any section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagePlace {
    /// The pack.
    pub pack: PackRef,
    /// The frame; its `pack` index is ignored.
    pub frame: FrameRef,
    /// The page's slot in the frame.
    pub slot: Slot,
}

/// Builds a section page by page, in page order.
#[derive(Debug, Default)]
pub struct SectionBuilder {
    section: Section,
    next_page: u64,
    packs: HashMap<PackId, u32>,
    frames: HashMap<(u32, u32), u32>,
    open: Option<Run>,
}

impl SectionBuilder {
    /// An empty builder.
    pub fn new() -> Self {
        Self::default()
    }

    /// Pages pushed so far.
    pub fn len(&self) -> u64 {
        self.next_page
    }

    /// Whether nothing was pushed yet.
    pub fn is_empty(&self) -> bool {
        self.next_page == 0
    }

    /// Adds the next page. At most [`SECTION_PAGES`] may be added; further ones are ignored.
    pub fn push(&mut self, page: Option<PagePlace>) {
        if self.next_page >= SECTION_PAGES {
            debug_assert!(false, "a section has {SECTION_PAGES} pages");
            return;
        }
        let place = page.map(|p| self.place(&p));
        let first_page = self.next_page as u16;
        self.next_page += 1;
        match &mut self.open {
            Some(run) if continues(run, place) => run.pages += 1,
            open => {
                let done = open.replace(Run { first_page, pages: 1, place });
                self.section.runs.extend(done);
            }
        }
    }

    fn place(&mut self, page: &PagePlace) -> u32 {
        debug_assert!(page.slot.get() < page.frame.pages(), "a page outside its frame");
        debug_assert_eq!(page.pack.check_frame(&page.frame), Ok(()));
        let section = &mut self.section;
        let pack = *self.packs.entry(page.pack.id).or_insert_with(|| {
            section.packs.push(page.pack);
            section.packs.len() as u32 - 1
        });
        let frame = *self.frames.entry((pack, page.frame.offset)).or_insert_with(|| {
            section.frames.push(FrameRef { pack, ..page.frame });
            section.frames.len() as u32 - 1
        });
        frame * FRAME_PAGES_MAX as u32 + page.slot.get() as u32
    }

    /// The section; `None` if all of it is zero.
    pub fn finish(mut self) -> Option<Section> {
        self.section.runs.extend(self.open.take());
        while self.section.runs.last().is_some_and(|r| r.place.is_none()) {
            self.section.runs.pop();
        }
        (!self.section.runs.is_empty()).then_some(self.section)
    }
}

fn continues(run: &Run, place: Option<u32>) -> bool {
    match (run.place, place) {
        (None, None) => true,
        (Some(first), Some(place)) => first + u32::from(run.pages) == place,
        _ => false,
    }
}
