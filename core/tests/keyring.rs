//! Keyring objects: opened by their key only, and never wrongly.
#![allow(clippy::unwrap_used)]

mod common;

use common::{every_cut, every_flip, key, other_key};
use dormouse_core::{DomainKey, FormatError, Keyring};

fn wrapped() -> Vec<u8> {
    Keyring::Wrapped(DomainKey::new([3; 32])).encode(&key())
}

#[test]
fn both_kinds_come_back() {
    match Keyring::decode(&key(), &wrapped()).unwrap() {
        Keyring::Wrapped(inner) => assert_eq!(inner.expose(), &[3; 32]),
        other => panic!("{other:?}"),
    }
    let retired = Keyring::Retired { successor: other_key().id() }.encode(&key());
    match Keyring::decode(&key(), &retired).unwrap() {
        Keyring::Retired { successor } => assert_eq!(successor, other_key().id()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn another_key_does_not_open_it() {
    assert_eq!(Keyring::decode(&other_key(), &wrapped()).unwrap_err(), FormatError::WrongKey("keyring"));
}

#[test]
fn the_wrapped_key_is_nowhere_in_the_object() {
    let object = wrapped();
    assert!(!object.windows(8).any(|w| w == [3; 8]));
}

#[test]
fn every_flip_and_every_cut_is_an_error() {
    let object = wrapped();
    every_flip(&object, |bit, bytes| assert!(Keyring::decode(&key(), bytes).is_err(), "bit {bit}"));
    every_cut(&object, |n, bytes| assert!(Keyring::decode(&key(), bytes).is_err(), "{n} bytes"));
}
