//! Writes, discards and zeroing.

use std::borrow::Cow;

use dormouse_core::PAGE_BYTES;

use super::{Disk, Holder, PIECE_BYTES, PIECE_PAGES, pieces};
use crate::{error::Result, stack::Stack, states::PageState};

const PAGE: u64 = PAGE_BYTES as u64;

/// What a write needs before it can be done.
enum Step {
    Done,
    /// The content of this page in the base, of which the write changes only a part.
    Base(u64),
    /// Room for this many pages.
    Room(u64),
}

/// A page of the base, fetched for a write that changes a part of it. The base never changes, so it stays right.
type Fetched = (u64, Vec<u8>);

impl Disk {
    /// Writes. Whether it survives a crash is settled by the next [`flush`](Self::flush).
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.writable()?;
        self.check_range(offset, bytes.len() as u64)?;
        for piece in pieces(offset, offset + bytes.len() as u64, PIECE_BYTES) {
            let part = (piece.start - offset) as usize..(piece.end - offset) as usize;
            self.write_piece(piece.start, &bytes[part])?;
        }
        Ok(())
    }

    /// Makes a range read as zeros.
    pub fn write_zeroes(&self, offset: u64, length: u64) -> Result<()> {
        self.check_range(offset, length)?;
        let end = offset + length;
        let whole = offset.next_multiple_of(PAGE)..end / PAGE * PAGE;
        if whole.start >= whole.end {
            // At most two pages, and neither of them whole.
            return self.write(offset, &[0; 2 * PAGE_BYTES][..length as usize]);
        }
        self.write(offset, &[0; PAGE_BYTES][..(whole.start - offset) as usize])?;
        self.zero_pages(whole.start / PAGE, whole.end / PAGE)?;
        self.write(whole.end, &[0; PAGE_BYTES][..(end - whole.end) as usize])
    }

    /// Says that a range is not needed. Whole pages of it read as zeros from now on; the rest stays as it is. Until the next
    /// flush a crash may bring back what was there.
    pub fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.writable()?;
        self.check_range(offset, length)?;
        self.zero_pages(offset.div_ceil(PAGE), (offset + length) / PAGE)
    }

    fn zero_pages(&self, first: u64, end: u64) -> Result<()> {
        let overlay = self.writable()?;
        for pages in pieces(first, end, PIECE_PAGES) {
            let freed = {
                let stack = overlay.read();
                let _alone = self.write_lock(pages.start);
                // What is zero in a layer already needs no word more in the map.
                if pages.clone().all(|page| matches!(stack.holder(page), Holder::Zeros)) {
                    stack.live.check_pages(pages)?;
                    continue;
                }
                stack.live.zero(pages)?
            };
            self.budget.give_back(freed * PAGE);
        }
        Ok(())
    }

    fn write_piece(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let overlay = self.writable()?;
        let mut fetched: Vec<Fetched> = Vec::new();
        let mut taken_pages = 0;
        let result = loop {
            let step = {
                let stack = overlay.read();
                let _alone = self.write_lock(offset / PAGE);
                try_write(&stack, offset, bytes, &fetched, &mut taken_pages)
            };
            match step {
                Ok(Step::Done) => break Ok(()),
                Ok(Step::Base(page)) => {
                    let mut content = vec![0; PAGE_BYTES];
                    if let Err(error) = self.base.read(&[page], page, &mut content) {
                        break Err(error);
                    }
                    fetched.push((page, content));
                }
                Ok(Step::Room(pages)) => {
                    if let Err(error) = self.budget.take(pages * PAGE, self.policy.space_wait_max) {
                        break Err(error);
                    }
                    taken_pages += pages;
                }
                Err(error) => break Err(error),
            }
        };
        self.budget.give_back(taken_pages * PAGE);
        result
    }
}

/// Does a write within one piece, or says what it lacks. Room that it uses is taken out of `taken_pages`.
fn try_write(
    stack: &Stack,
    offset: u64,
    bytes: &[u8],
    fetched: &[Fetched],
    taken_pages: &mut u64,
) -> Result<Step> {
    let end = offset + bytes.len() as u64;
    let pages = offset / PAGE..end.div_ceil(PAGE);
    let mut head: Cow<'_, [u8]> = Cow::Borrowed(&[]);
    let mut tail: Cow<'_, [u8]> = Cow::Borrowed(&[]);
    if !offset.is_multiple_of(PAGE) && stack.live.state(pages.start) != PageState::Present {
        match content(stack, pages.start, fetched)? {
            None => return Ok(Step::Base(pages.start)),
            Some(page) => head = Cow::Owned(page[..(offset % PAGE) as usize].to_vec()),
        }
    }
    if !end.is_multiple_of(PAGE) && stack.live.state(pages.end - 1) != PageState::Present {
        match content(stack, pages.end - 1, fetched)? {
            None => return Ok(Step::Base(pages.end - 1)),
            Some(page) => tail = Cow::Owned(page[(end % PAGE) as usize..].to_vec()),
        }
    }
    let needed = stack.live.not_present(pages);
    if needed > *taken_pages {
        return Ok(Step::Room(needed - *taken_pages));
    }
    if head.is_empty() && tail.is_empty() {
        stack.live.write(offset, bytes)?;
    } else {
        stack.live.write(offset - head.len() as u64, &[&*head, bytes, &*tail].concat())?;
    }
    *taken_pages -= needed;
    Ok(Step::Done)
}

/// A page's newest content; `None` if it is the base's and was not fetched yet.
fn content<'a>(stack: &Stack, page: u64, fetched: &'a [Fetched]) -> Result<Option<Cow<'a, [u8]>>> {
    Ok(match stack.holder(page) {
        Holder::Zeros => Some(Cow::Borrowed(&[0; PAGE_BYTES])),
        Holder::Layer(layer) => {
            let mut bytes = vec![0; PAGE_BYTES];
            layer.read(page, &mut bytes)?;
            Some(Cow::Owned(bytes))
        }
        Holder::Base => {
            fetched.iter().find(|(at, _)| *at == page).map(|(_, bytes)| Cow::Borrowed(&bytes[..]))
        }
    })
}
