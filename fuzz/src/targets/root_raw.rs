//! A root's raw bytes: what parses passes its own check, and encodes back to the same bytes.
use dormouse_core::{Domain, Root};

pub(crate) fn check(raw: &[u8]) {
    if let Ok(root) = Root::parse(raw) {
        assert_eq!(root.check(), Ok(()));
        assert_eq!(root.to_raw(), raw);
        let domain = Domain::plain();
        let (id, object) = root.encode(&domain);
        assert_eq!(Root::decode(&domain, id, &object), Ok(root));
    }
}
