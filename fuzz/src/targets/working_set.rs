//! The record of a working set, and what is predicted from it.
use dormouse_wake::Record;
use dormouse_wake::predict;

pub(crate) fn check(bytes: &[u8]) {
    if let Ok(record) = Record::decode(bytes) {
        let pages = predict(Some(&record.session), &[], 1000);
        let total: u64 = pages.iter().map(|run| run.end - run.start).sum();
        assert!(total <= 1000 && pages.iter().all(|run| run.start < run.end));
        let coverage = &record.session.coverage;
        for share in [coverage.coverage(), coverage.overfetch()].into_iter().flatten() {
            assert!((0.0..=1.0).contains(&share));
        }
        let _ = coverage.wants_another_set();
    }
}
