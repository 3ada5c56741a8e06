//! A keyring: as it came, and with its body put into a sound envelope that its user's key sealed.
#![no_main]
use dormouse_core::{Domain, DomainKey, Keyring, envelope};
use libfuzzer_sys::fuzz_target;

const KIND: envelope::Kind = envelope::Kind { magic: *b"DORMKEYS", what: "keyring", body_bytes_max: 256 };

fuzz_target!(|bytes: &[u8]| {
    let user = DomainKey::new([7; 32]);
    let _ = Keyring::decode(&user, bytes);
    if bytes.len() > 256 {
        return;
    }
    let object = envelope::wrap(KIND, &Domain::encrypted(&user), bytes.to_vec());
    if let Ok(keyring) = Keyring::decode(&user, &object) {
        assert_eq!(keyring.encode(&user), object);
        assert!(Keyring::decode(&DomainKey::new([8; 32]), &object).is_err(), "another key opens it");
    }
});
