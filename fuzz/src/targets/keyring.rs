//! A keyring: as it came, and with its body put into a sound envelope that its user's key sealed.
use dormouse_core::{Domain, DomainKey, Keyring, domain::SEAL_OVERHEAD_BYTES, envelope};

const KIND: envelope::Kind = envelope::Kind { magic: *b"DORMKEYS", what: "keyring", body_bytes_max: 256 };

pub(crate) fn check(bytes: &[u8]) {
    let user = DomainKey::new([7; 32]);
    let _ = Keyring::decode(&user, bytes);
    if bytes.len() + SEAL_OVERHEAD_BYTES > KIND.body_bytes_max {
        return; // No writer seals so much.
    }
    let object = envelope::wrap(KIND, &Domain::encrypted(&user), bytes.to_vec());
    if let Ok(keyring) = Keyring::decode(&user, &object) {
        assert_eq!(keyring.encode(&user), object);
        assert!(Keyring::decode(&DomainKey::new([8; 32]), &object).is_err(), "another key opens it");
    }
}
