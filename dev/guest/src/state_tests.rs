use super::*;
use proptest::prelude::*;

fn sample() -> State {
    State {
        kind: StateKind::KvmX86_64,
        sections: vec![(Section::Regs, vec![1, 2, 3]), (Section::MpState, vec![])],
    }
}

#[test]
fn the_bytes_of_version_1_do_not_change() {
    let bytes = sample().encode();
    assert_eq!(
        bytes[..35],
        *b"DORMVMST\x01\0\x01\0\x43\0\0\0\x02\0\0\0\x03\0\0\0\x01\x02\x03\x09\0\0\0\0\0\0\0",
        "bump VERSION if this has to change"
    );
}

#[test]
fn any_flipped_bit_is_noticed() {
    let good = sample().encode();
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(State::decode(&bad).is_err(), "bit {bit}");
    }
    for length in 0..good.len() {
        assert!(State::decode(&good[..length]).is_err(), "cut to {length}");
    }
}

#[test]
fn a_section_twice_there_is_refused() {
    let mut state = sample();
    state.sections.push((Section::Regs, vec![]));
    let error = State::decode(&state.encode()).expect_err("twice");
    assert!(matches!(error, StateError::BadSection { tag: 2, .. }), "{error}");
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = State::decode(&bytes);
        let mut signed = MAGIC.to_vec();
        signed.extend([1, 0, 1, 0]);
        signed.extend((bytes.len() as u32 + 48).to_le_bytes());
        signed.extend(&bytes);
        let hash = blake3::hash(&signed);
        signed.extend(hash.as_bytes());
        if let Ok(state) = State::decode(&signed) {
            prop_assert_eq!(state.encode(), signed);
        }
    }
}
