//! The envelope: header fields as they come, checksum made right.
use dormouse_core::{Domain, DomainKey, envelope};

const KIND: envelope::Kind = envelope::Kind { magic: *b"DORMTEST", what: "test", body_bytes_max: 4096 };

pub(crate) fn check(bytes: &[u8]) {
    let mut object = [&KIND.magic, bytes].concat();
    let checksum = blake3::hash(&object);
    object.extend_from_slice(checksum.as_bytes());
    for domain in [Domain::plain(), Domain::encrypted(&DomainKey::new([7; 32]))] {
        if let Ok(body) = envelope::unwrap(KIND, &domain, &object) {
            assert!(!domain.is_encrypted(), "nobody guesses a sealed body");
            assert_eq!(&body[..], &bytes[32..]);
            let again = envelope::wrap(KIND, &domain, body.to_vec());
            // Only the versions may differ: which wrote it, and which is needed to read it.
            assert_eq!(again[12..again.len() - 32], object[12..object.len() - 32]);
        }
        let _ = envelope::unwrap(KIND, &domain, bytes);
    }
}
