//! The map of a disk's overlay: as it came, and with checksums that are right, so that what lies behind them is reached.
use dormouse_disk::{
    map::{Encoder, HEADER_BYTES, Header, RUN_PAYLOAD_BYTES_MAX, RecordKind, decode_runs, recover},
    states::{PageState, PageStates},
};

use crate::input::Input;

/// More pages than this are not asked for, so that what is found can be looked at page by page.
const PAGES_MAX: u64 = 1 << 16;

pub(crate) fn check(bytes: &[u8]) {
    check_file(bytes);
    let Ok((header, sum)) = Header::decode(bytes) else { return };
    let (again, sum_again) = header.encode();
    assert!(again == bytes[..HEADER_BYTES] && sum == sum_again, "a header has another form");
    // The rest of the input as payloads of records.
    let mut input = Input(&bytes[HEADER_BYTES..]);
    let (mut file, mut encoder, mut expected) = (again, Encoder::after(sum), PageStates::new());
    file.extend(encoder.record(RecordKind::CheckpointEnd, &[]));
    while !input.0.is_empty() {
        let payload = input.counted();
        if payload.len() > RUN_PAYLOAD_BYTES_MAX {
            return;
        }
        file.extend(encoder.record(RecordKind::FlushStates, payload));
        if decode_runs(payload, header.identity.pages(), &mut expected).is_err() {
            break;
        }
    }
    let found = recover(&file).expect("a complete checkpoint");
    assert!(found.states.runs() == expected.runs(), "a log says something else than its records");
    check_file(&file);
}

fn check_file(bytes: &[u8]) {
    let Ok(found) = recover(bytes) else { return };
    let pages = found.header.identity.pages();
    assert!(found.whole_bytes <= bytes.len());
    let runs = found.states.runs();
    assert!(runs.iter().all(|run| run.pages > 0 && run.state != PageState::Absent));
    assert!(runs.windows(2).all(|two| two[0].first + two[0].pages <= two[1].first), "runs overlap");
    assert!(runs.last().is_none_or(|run| run.first + run.pages <= pages), "a run lies outside the disk");
    // What was recovered is recovered again from its own checkpoint.
    if pages <= PAGES_MAX {
        let (mut file, sum) = found.header.encode();
        let mut encoder = Encoder::after(sum);
        file.extend(encoder.states(RecordKind::CheckpointStates, &found.states));
        file.extend(encoder.record(RecordKind::CheckpointEnd, &[]));
        let again = recover(&file).expect("a checkpoint is complete");
        assert!(again.states.runs() == runs && again.whole_bytes == file.len());
    }
}
