//! The bytes of a piece as they arrive, from one request or from two that race.

use std::ops::Range;

use bytes::Bytes;

/// Bytes that begin at the piece's start, in the parts in which they came.
#[derive(Debug, Default)]
pub(super) struct Parts {
    /// Each with its offset.
    parts: Vec<(u64, Bytes)>,
    len: u64,
}

impl Parts {
    /// Bytes there so far.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Appends what `bytes`, which begin at `offset`, bring that is not there yet; whether that is anything.
    pub(super) fn append(&mut self, offset: u64, bytes: &Bytes) -> bool {
        let known = self.len.saturating_sub(offset).min(bytes.len() as u64) as usize;
        let new = bytes.slice(known..);
        // A gap cannot be: each request begins at the start and its parts come in order.
        if new.is_empty() || offset + known as u64 != self.len {
            return false;
        }
        let at = self.len;
        self.len += new.len() as u64;
        self.parts.push((at, new));
        true
    }

    /// Calls `each` with what there is of `range`, in order.
    pub(super) fn for_each(&self, range: Range<u64>, mut each: impl FnMut(Bytes)) {
        let from = self.parts.partition_point(|(at, part)| at + part.len() as u64 <= range.start);
        for (at, part) in self.parts.iter().skip(from).take_while(|(at, _)| *at < range.end) {
            let start = range.start.saturating_sub(*at) as usize;
            let end = (range.end - at).min(part.len() as u64) as usize;
            each(part.slice(start..end.max(start)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_racing_requests_make_one_piece() {
        let whole: Vec<u8> = (0..100).collect();
        let part = |r: Range<usize>| Bytes::from(whole[r].to_vec());
        let mut parts = Parts::default();
        assert!(parts.append(0, &part(0..30)));
        assert!(!parts.append(0, &part(0..20)), "the second request is behind");
        assert!(parts.append(20, &part(20..60)), "and overtakes the first");
        assert!(!parts.append(30, &part(30..50)));
        assert!(parts.append(60, &part(60..100)));
        assert_eq!(parts.len(), 100);
        for range in [0..100, 29..31, 59..60, 10..10, 95..200] {
            let mut got = Vec::new();
            parts.for_each(range.clone(), |b| got.extend_from_slice(&b));
            assert_eq!(got, whole[range.start as usize..range.end.min(100) as usize], "{range:?}");
        }
    }
}
