//! Names: those allowed are safe as one part of a path, and hexadecimal identities have one form.
use dormouse_core::{ImageId, Name, PackId};

pub(crate) fn check(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(name) = Name::new(text) {
        assert_eq!(name.as_str(), text);
        assert!(!text.contains(['/', '\\', '\0']) && !text.starts_with('.') && text.len() <= 128);
    }
    assert_eq!(Name::new(text).is_ok(), ImageId::new(text).is_ok());
    if let Some(id) = PackId::from_hex(text) {
        assert_eq!(id.to_string(), text);
    }
}
