//! Seals: what was sealed opens, and nothing else does.
use dormouse_core::{Domain, DomainKey, domain::SEAL_OVERHEAD_BYTES};

pub(crate) fn check(bytes: &[u8]) {
    let domain = Domain::encrypted(&DomainKey::new([7; 32]));
    assert!(domain.open("frame", bytes).is_err());
    let sealed = domain.seal("frame", bytes.to_vec());
    assert_eq!(sealed.len(), bytes.len() + SEAL_OVERHEAD_BYTES);
    assert_eq!(domain.open("frame", &sealed).as_deref(), Ok(bytes));
    assert!(domain.open("root", &sealed).is_err());
}
