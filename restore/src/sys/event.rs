//! What the kernel reports, parsed from bytes by a pure function.

/// Bytes in one message (`struct uffd_msg`, packed).
pub const MESSAGE_BYTES: usize = 32;

/// One message of the kernel. Addresses are those of the VM's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A vCPU or thread waits for a missing page.
    Fault {
        /// The address touched, rounded down to a page by the kernel.
        address: u64,
        /// Whether it wanted to write.
        write: bool,
    },
    /// A fault of another kind than a missing page (write-protected, minor), for which nothing is registered.
    OtherFault {
        /// The address touched.
        address: u64,
    },
    /// The VM forked; the kernel has put a descriptor for the child into our process.
    Fork {
        /// Its number.
        descriptor: u32,
    },
    /// A registered range moved.
    Remap {
        /// Its old start.
        from: u64,
        /// Its new start.
        to: u64,
        /// Its bytes.
        bytes: u64,
    },
    /// The guest (or its VMM) gave a range back; its pages read as zero from now on.
    Remove {
        /// The range's start.
        start: u64,
        /// Its end.
        end: u64,
    },
    /// A registered range was unmapped.
    Unmap {
        /// The range's start.
        start: u64,
        /// Its end.
        end: u64,
    },
    /// A message this crate does not know.
    Unknown {
        /// Its number.
        kind: u8,
    },
}

fn u64_at(message: &[u8; MESSAGE_BYTES], at: usize) -> u64 {
    message[at..].first_chunk().map_or(0, |b| u64::from_ne_bytes(*b))
}

/// Reads one message.
pub fn parse(message: &[u8; MESSAGE_BYTES]) -> Event {
    let word = |at| u64_at(message, at);
    match message[0] {
        // Flags: 1 write, 2 write-protected, 4 minor.
        0x12 if word(8) & 6 != 0 => Event::OtherFault { address: word(16) },
        0x12 => Event::Fault { address: word(16), write: word(8) & 1 != 0 },
        0x13 => Event::Fork { descriptor: word(8) as u32 },
        0x14 => Event::Remap { from: word(8), to: word(16), bytes: word(24) },
        0x15 => Event::Remove { start: word(8), end: word(16) },
        0x16 => Event::Unmap { start: word(8), end: word(16) },
        kind => Event::Unknown { kind },
    }
}

/// Reads all whole messages in `bytes`.
pub fn parse_all(bytes: &[u8]) -> impl Iterator<Item = Event> + '_ {
    bytes.as_chunks::<MESSAGE_BYTES>().0.iter().map(parse)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(kind: u8, words: [u64; 3]) -> [u8; MESSAGE_BYTES] {
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[0] = kind;
        for (place, word) in bytes[8..].chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn each_message_is_told_apart() {
        assert_eq!(parse(&message(0x12, [1, 0x7000, 9])), Event::Fault { address: 0x7000, write: true });
        assert_eq!(parse(&message(0x12, [0, 0x7000, 9])), Event::Fault { address: 0x7000, write: false });
        assert_eq!(parse(&message(0x12, [3, 0x7000, 9])), Event::OtherFault { address: 0x7000 });
        assert_eq!(parse(&message(0x13, [5, 0, 0])), Event::Fork { descriptor: 5 });
        assert_eq!(parse(&message(0x14, [1, 2, 3])), Event::Remap { from: 1, to: 2, bytes: 3 });
        assert_eq!(parse(&message(0x15, [1, 2, 3])), Event::Remove { start: 1, end: 2 });
        assert_eq!(parse(&message(0x16, [1, 2, 3])), Event::Unmap { start: 1, end: 2 });
        assert_eq!(parse(&message(0x77, [1, 2, 3])), Event::Unknown { kind: 0x77 });
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(parse_all(&bytes).count(), bytes.len() / MESSAGE_BYTES);
        }
    }
}
