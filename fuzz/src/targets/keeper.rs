//! What is said to a holder of descriptors, and the records it keeps.
use dormouse_keeper::VmRecord;
use dormouse_keeper::holder::message::{Request, Response, decode, encode};

pub(crate) fn check(bytes: &[u8]) {
    if let Ok((request, record)) = decode::<Request>(bytes) {
        let again = encode(&request, record).expect("no longer than it was");
        assert_eq!(decode::<Request>(&again).expect("understood before"), (request, record));
    }
    let _ = decode::<Response>(bytes);
    if let Ok(record) = VmRecord::decode(bytes)
        && let Ok(again) = record.encode()
    {
        let read = VmRecord::decode(&again).expect("just written");
        assert_eq!(format!("{read:?}"), format!("{record:?}"));
    }
}
