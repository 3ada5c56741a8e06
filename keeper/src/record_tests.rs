use proptest::prelude::*;

use super::*;
use crate::PageSize;

fn record() -> VmRecord {
    VmRecord {
        id: VmId::new("vm-7-00").expect("an id"),
        snapshot: KeptSnapshot { name: "monday".into(), snapshot: "ab".repeat(32), reference: "00".into() },
        regions: vec![Region { host: 0x7000_0000, bytes: 8192, offset: 0, page_size: PageSize::Small }],
        options: KeptOptions { on_failure: OnFailure::Hold, prefetch: false, ..KeptOptions::default() },
        pid: 7,
        uid: 0,
        api_socket: Some("/run/vm.sock".into()),
        notes: BTreeMap::from([("console".into(), "/var/log/vm".into())]),
    }
}

#[test]
fn what_is_kept_is_found_again() {
    let bytes = record().encode().expect("short");
    let read = VmRecord::decode(&bytes).expect("a record");
    assert_eq!(format!("{read:?}"), format!("{:?}", record()));
}

#[test]
fn what_is_wrong_is_refused_by_name() {
    let mut value: Value = serde_json::from_slice(&record().encode().expect("short")).expect("JSON");
    let mut refused = |field: &str, new: Value| {
        let old = std::mem::replace(&mut value[field], new);
        let error = VmRecord::decode(value.to_string().as_bytes()).expect_err(field);
        value[field] = old;
        error.to_string()
    };
    assert!(refused("version", 2.into()).contains("version 2"));
    assert!(refused("id", "a b".into()).contains("1 to 64"));
    assert!(refused("id", "".into()).contains("1 to 64"));
    assert!(refused("regions", Value::Array(Vec::new())).contains("0"));
    assert!(refused("options", Value::Null).contains("WireOptions"));
    let mut long = record();
    long.notes.insert("n".into(), "x".repeat(RECORD_BYTES_MAX));
    assert!(matches!(long.encode(), Err(RecordError::TooLong { .. })));
    let spaces = vec![b' '; RECORD_BYTES_MAX + 1];
    assert!(matches!(VmRecord::decode(&spaces), Err(RecordError::TooLong { .. })));
}

#[test]
fn ids_are_never_the_same() {
    let one = VmId::for_process(3).expect("random");
    assert_ne!(one, VmId::for_process(3).expect("random"));
    assert_eq!(VmId::new(one.as_str()).expect("valid"), one);
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), at in 0usize..400) {
        let _ = VmRecord::decode(&bytes);
        let mut damaged = record().encode().expect("short");
        let at = at % damaged.len();
        damaged[at] = bytes.first().copied().unwrap_or(0);
        let _ = VmRecord::decode(&damaged);
    }
}
