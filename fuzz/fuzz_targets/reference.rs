//! A reference: as it came, and with its body put into a sound envelope, plain and sealed.
#![no_main]
use dormouse_core::{Domain, DomainKey, Reference, envelope};
use libfuzzer_sys::fuzz_target;

const KIND: envelope::Kind =
    envelope::Kind { magic: *b"DORMREF\0", what: "reference", body_bytes_max: 64 << 10 };

fuzz_target!(|bytes: &[u8]| {
    for domain in [Domain::plain(), Domain::encrypted(&DomainKey::new([7; 32]))] {
        if let Ok(reference) = Reference::decode(&domain, None, bytes) {
            let _ = Reference::decode(&domain, Some(&reference.name), bytes).expect("its own name");
        }
        if bytes.len() > 60 << 10 {
            continue;
        }
        let object = envelope::wrap(KIND, &domain, bytes.to_vec());
        if let Ok(reference) = Reference::decode(&domain, None, &object) {
            assert_eq!(reference.encode(&domain), object);
        }
    }
});
