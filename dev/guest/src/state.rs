//! A guest's state outside its memory, as bytes: the opaque device state a snapshot carries.
//!
//! ```text
//! offset  bytes  field
//!      0      8  magic "DORMVMST"
//!      8      2  version, 1
//!     10      2  kind: 1 = one KVM x86-64 vCPU, 2 = process guest
//!     12      4  total length, this header and the trailing hash included
//!     16      -  sections: tag u16, reserved u16 (0), length u32, then as many bytes
//!    end-32  32  BLAKE3 of everything before
//! ```
//! All integers are little-endian. Sections are in ascending order of tag, each at most once. A tag outside
//! [`Section`] is an error: state left out is state lost.

/// First bytes of every state.
pub const MAGIC: &[u8; 8] = b"DORMVMST";
/// The version written and read here.
pub const VERSION: u16 = 1;
/// Most bytes a state may have.
pub const STATE_BYTES_MAX: usize = 256 * 1024;
const HEADER_BYTES: usize = 16;
const HASH_BYTES: usize = 32;
const SECTION_HEADER_BYTES: usize = 8;

/// Who wrote a state and can load it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum StateKind {
    /// One x86-64 vCPU of `dormouse-minivm`.
    KvmX86_64 = 1,
    /// [`crate::native::NativeGuest`].
    Process = 2,
}

/// The parts of a state; each holds the bytes of the kernel's structure of that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
#[expect(missing_docs, reason = "each is the kernel's structure of that name")]
pub enum Section {
    Cpuid = 1,
    Regs = 2,
    Sregs = 3,
    Xsave = 4,
    Xcrs = 5,
    DebugRegs = 6,
    Msrs = 7,
    VcpuEvents = 8,
    MpState = 9,
}

impl Section {
    const ALL: [Self; 9] = [
        Self::Cpuid,
        Self::Regs,
        Self::Sregs,
        Self::Xsave,
        Self::Xcrs,
        Self::DebugRegs,
        Self::Msrs,
        Self::VcpuEvents,
        Self::MpState,
    ];

    fn from_tag(tag: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|s| *s as u16 == tag)
    }
}

/// A decoded state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Who can load it.
    pub kind: StateKind,
    /// Its sections, in ascending order, each once.
    pub sections: Vec<(Section, Vec<u8>)>,
}

/// Why bytes are not a usable state.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StateError {
    /// Too short, too long, or not as long as it says.
    #[error("guest state of {given} bytes where {expected} were expected: the blob is cut short or padded")]
    Length {
        /// Bytes given.
        given: usize,
        /// Bytes expected.
        expected: usize,
    },
    /// Does not start with [`MAGIC`].
    #[error("not a guest state of Dormouse's own VMM: it starts with {start:02x?}")]
    Magic {
        /// The first eight bytes.
        start: [u8; 8],
    },
    /// Written by another version.
    #[error("guest state version {version}; this build reads version {VERSION}")]
    Version {
        /// The version it says.
        version: u16,
    },
    /// The trailing hash does not match.
    #[error("guest state is damaged: its BLAKE3 hash does not match its content")]
    Damaged,
    /// A kind this build does not know.
    #[error("guest state of unknown kind {kind}")]
    Kind {
        /// The kind it says.
        kind: u16,
    },
    /// A kind the caller cannot load.
    #[error("guest state was saved by a {found:?} guest; this one is {wanted:?}")]
    OtherKind {
        /// The state's kind.
        found: StateKind,
        /// The kind asked for.
        wanted: StateKind,
    },
    /// A section that is unknown, out of order, twice there, or longer than what is left.
    #[error("guest state section with tag {tag} at byte {at}: {what}")]
    BadSection {
        /// Its tag.
        tag: u16,
        /// Its offset.
        at: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// A section is missing or has the wrong size for the kernel's structure.
    #[error("guest state section {section:?}: {what}")]
    Content {
        /// Which.
        section: Section,
        /// What is wrong.
        what: &'static str,
    },
}

impl State {
    /// The bytes of section `section`, if there.
    pub fn section(&self, section: Section) -> Option<&[u8]> {
        self.sections.iter().find(|(s, _)| *s == section).map(|(_, bytes)| bytes.as_slice())
    }

    /// The state as bytes. Sections are written in ascending order.
    pub fn encode(&self) -> Vec<u8> {
        let mut sections: Vec<_> = self.sections.iter().collect();
        sections.sort_by_key(|(section, _)| *section);
        let mut out = Vec::new();
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(self.kind as u16).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        for (section, bytes) in sections {
            out.extend_from_slice(&(*section as u16).to_le_bytes());
            out.extend_from_slice(&[0; 2]);
            out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
            out.extend_from_slice(bytes);
        }
        let total = (out.len() + HASH_BYTES) as u32;
        out[12..16].copy_from_slice(&total.to_le_bytes());
        let hash = blake3::hash(&out);
        out.extend_from_slice(hash.as_bytes());
        out
    }

    /// The state in `bytes`. Pure; never panics, allocates no more than `bytes` holds.
    ///
    /// # Errors
    /// [`StateError`], the hash being checked before any section is looked at.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let given = bytes.len();
        if !(HEADER_BYTES + HASH_BYTES..=STATE_BYTES_MAX).contains(&given) {
            return Err(StateError::Length { given, expected: HEADER_BYTES + HASH_BYTES });
        }
        let (body, hash) = bytes.split_at(given - HASH_BYTES);
        let start: [u8; 8] = array(body, 0);
        if &start != MAGIC {
            return Err(StateError::Magic { start });
        }
        let version = u16::from_le_bytes(array(body, 8));
        if version != VERSION {
            return Err(StateError::Version { version });
        }
        let expected = u32::from_le_bytes(array(body, 12)) as usize;
        if expected != given {
            return Err(StateError::Length { given, expected });
        }
        if blake3::hash(body).as_bytes() != hash {
            return Err(StateError::Damaged);
        }
        let kind = match u16::from_le_bytes(array(body, 10)) {
            1 => StateKind::KvmX86_64,
            2 => StateKind::Process,
            kind => return Err(StateError::Kind { kind }),
        };
        Ok(Self { kind, sections: decode_sections(body)? })
    }

    /// As [`State::decode`], for a caller that can load only `wanted`.
    ///
    /// # Errors
    /// As [`State::decode`], and [`StateError::OtherKind`].
    pub fn decode_for(bytes: &[u8], wanted: StateKind) -> Result<Self, StateError> {
        let state = Self::decode(bytes)?;
        if state.kind == wanted {
            Ok(state)
        } else {
            Err(StateError::OtherKind { found: state.kind, wanted })
        }
    }
}

fn decode_sections(body: &[u8]) -> Result<Vec<(Section, Vec<u8>)>, StateError> {
    let mut sections: Vec<(Section, Vec<u8>)> = Vec::new();
    let mut at = HEADER_BYTES;
    while at < body.len() {
        let rest = &body[at..];
        if rest.len() < SECTION_HEADER_BYTES {
            return Err(StateError::BadSection { tag: 0, at, what: "its header is cut short" });
        }
        let tag = u16::from_le_bytes(array(rest, 0));
        let bad = |what| StateError::BadSection { tag, at, what };
        if array::<2>(rest, 2) != [0; 2] {
            return Err(bad("its reserved bytes are not zero"));
        }
        let length = u32::from_le_bytes(array(rest, 4)) as usize;
        let section = Section::from_tag(tag).ok_or(bad("unknown; a newer build may have written it"))?;
        if sections.last().is_some_and(|(last, _)| *last >= section) {
            return Err(bad("twice there or out of order"));
        }
        let bytes = rest[SECTION_HEADER_BYTES..].get(..length).ok_or(bad("longer than the state"))?;
        sections.push((section, bytes.to_vec()));
        at += SECTION_HEADER_BYTES + length;
    }
    Ok(sections)
}

/// `N` bytes of `bytes` from `at`; the callers have checked that they are there.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    if let Some(from) = bytes.get(at..at + N) {
        out.copy_from_slice(from);
    }
    out
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
