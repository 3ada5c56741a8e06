//! A reference: as it came, and with its body put into a sound envelope, plain and sealed.
use dormouse_core::{Domain, DomainKey, Named, Reference, domain::SEAL_OVERHEAD_BYTES, envelope};

const KIND: envelope::Kind =
    envelope::Kind { magic: *b"DORMREF\0", what: "reference", body_bytes_max: 64 << 10 };

pub(crate) fn check(bytes: &[u8]) {
    for domain in [Domain::plain(), Domain::encrypted(&DomainKey::new([7; 32]))] {
        if let Ok(reference) = Reference::decode(&domain, None, bytes) {
            let _ = Reference::decode(&domain, Some(&reference.name), bytes).expect("its own name");
        }
        if let Ok(named) = Named::decode(&domain, None, bytes) {
            let again = named.encode(&domain, &[7; 16]);
            assert_eq!(Named::decode(&domain, None, &again), Ok(named));
        }
        if bytes.len() + SEAL_OVERHEAD_BYTES > KIND.body_bytes_max {
            continue;
        }
        let object = envelope::wrap(KIND, &domain, bytes.to_vec());
        if let Ok(reference) = Reference::decode(&domain, None, &object) {
            assert_eq!(reference.encode(&domain), object);
        }
    }
}
