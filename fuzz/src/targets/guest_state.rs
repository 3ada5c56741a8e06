//! The device state of Dormouse's own VMM: as it came, and with its length and hash made right.
use dormouse_guest::state::{MAGIC, State};

pub(crate) fn check(bytes: &[u8]) {
    let _ = State::decode(bytes);
    let Some((kind, sections)) = bytes.split_first() else { return };
    let mut state = MAGIC.to_vec();
    state.extend([1, 0, kind % 4, 0]);
    state.extend((sections.len() as u32 + 48).to_le_bytes());
    state.extend(sections);
    state.extend(blake3::hash(&state).as_bytes());
    if let Ok(decoded) = State::decode(&state) {
        assert_eq!(decoded.encode(), state);
    }
}
