//! Reads that the kernel's page cache answers, or nobody.

use std::{fs::File, io::IoSliceMut};

use rustix::io::{ReadWriteFlags, preadv2};

/// Fills all of `into` from `at` on if that needs no disk; whether it did.
pub(crate) fn read_at_hand(file: &File, into: &mut [IoSliceMut<'_>], at: u64) -> bool {
    let wanted: usize = into.iter().map(|part| part.len()).sum();
    // A read that would wait answers EAGAIN, or stops where it would.
    preadv2(file, into, at, ReadWriteFlags::NOWAIT).is_ok_and(|read| read == wanted)
}
