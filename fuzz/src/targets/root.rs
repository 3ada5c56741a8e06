//! A root object: as it came, and with its body put into a sound envelope.
use dormouse_core::{Domain, Root, RootId, envelope};

const KIND: envelope::Kind = envelope::Kind { magic: *b"DORMROOT", what: "root", body_bytes_max: 1 << 20 };

pub(crate) fn check(bytes: &[u8]) {
    let domain = Domain::plain();
    let _ = Root::decode(&domain, RootId::of(bytes), bytes);
    if bytes.len() > KIND.body_bytes_max {
        return;
    }
    let object = envelope::wrap(KIND, &domain, bytes.to_vec());
    if let Ok(root) = Root::decode(&domain, RootId::of(&object), &object) {
        let (id, again) = root.encode(&domain);
        assert_eq!(Root::decode(&domain, id, &again), Ok(root));
    }
}
