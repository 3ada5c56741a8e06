//! A guest: memory behind a userfaultfd that goes to the server, and what is done with it.

use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use dormouse_core::PAGE_BYTES;
use dormouse_restore::{Mapping, Memory, PageSize, Uffd, UffdOptions};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::scene::{Rng, number};

/// Pages of its memory.
pub(crate) const PAGES: u64 = 4096;
/// Between two signs of life.
const OPERATIONS: u64 = 16;

/// The word at byte `offset` of page `page` of the image; a third of the pages are zero.
pub(crate) fn word(page: u64, offset: usize) -> u64 {
    if page.is_multiple_of(3) { 0 } else { Rng(page).next().rotate_left(offset as u32 / 64) | 1 }
}

/// What a page should hold.
#[derive(Clone, Copy)]
enum Expected {
    Image,
    Zero,
}

/// Not a test: the guest's process. Says `.` as it goes on, and ends well once it has seen all of its memory.
#[test]
#[ignore = "run by the other tests as a process of its own"]
fn guest() {
    let Some(socket) = std::env::var_os("DORMOUSE_TEST_SOCKET") else { return };
    let mut rng = Rng(number("DORMOUSE_TEST_SEED", 0));
    let uffd = Uffd::create(UffdOptions::default()).unwrap();
    let mapping = Arc::new(Mapping::new(PAGES, PageSize::Small).unwrap());
    let memory = Memory::own(uffd, std::slice::from_ref(&mapping)).unwrap();
    // While there is no server, there is nobody to load from.
    let connection = loop {
        match UnixStream::connect(&socket) {
            Ok(connection) => break connection,
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(1)),
        }
    };
    let regions = format!(
        r#"[{{"base_host_virt_addr":{},"size":{},"offset":0,"page_size":4096}}]"#,
        mapping.addr(),
        mapping.bytes()
    );
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [memory.uffd().as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(&connection, &[IoSlice::new(regions.as_bytes())], &mut control, SendFlags::NOSIGNAL).unwrap();

    let mut signs = std::io::stderr();
    let mut expected = vec![(Expected::Image, None); PAGES as usize];
    let mut unseen = rng.shuffled(PAGES);
    let mut operations = 0u64;
    while let Some(&next) = unseen.last() {
        let page = rng.below(PAGES);
        match rng.below(32) {
            0 => {
                let (first, pages) = (page.min(PAGES - 8), 1 + rng.below(8));
                mapping.discard(first, pages).unwrap();
                (first..first + pages).for_each(|p| expected[p as usize] = (Expected::Zero, None));
            }
            1 => {
                let value = rng.next();
                assert!(mapping.store(page as usize * PAGE_BYTES, value));
                expected[page as usize].1 = Some(value);
            }
            2..8 => check(&mapping, page, expected[page as usize]),
            _ => {
                check(&mapping, next, expected[next as usize]);
                unseen.pop();
            }
        }
        operations += 1;
        if operations.is_multiple_of(OPERATIONS) {
            signs.write_all(b".").unwrap();
        }
    }
    (0..PAGES).for_each(|page| check(&mapping, page, expected[page as usize]));
    std::process::exit(0);
}

fn check(mapping: &Mapping, page: u64, (content, first_word): (Expected, Option<u64>)) {
    for offset in (0..PAGE_BYTES).step_by(8) {
        let found = mapping.load(page as usize * PAGE_BYTES + offset).unwrap();
        let right = match (content, first_word) {
            (_, Some(value)) if offset == 0 => value,
            (Expected::Image, _) => word(page, offset),
            (Expected::Zero, _) => 0,
        };
        if found != right {
            eprintln!("X page {page} at {offset}: {found:#x} instead of {right:#x}");
            std::process::exit(9);
        }
    }
}
