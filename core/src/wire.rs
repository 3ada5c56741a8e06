//! Little-endian integers and bounded varints, written and read.

use crate::error::FormatError;

/// Appends fields to a byte vector.
#[derive(Debug, Default)]
pub struct Writer(Vec<u8>);

impl Writer {
    /// An empty writer.
    pub fn new() -> Self {
        Self::default()
    }

    /// The bytes written.
    pub fn finish(self) -> Vec<u8> {
        self.0
    }

    /// Bytes written so far.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing was written yet.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One byte.
    pub fn u8(&mut self, v: u8) {
        self.0.push(v);
    }

    /// Two bytes, little-endian.
    pub fn u16(&mut self, v: u16) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }

    /// Four bytes, little-endian.
    pub fn u32(&mut self, v: u32) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }

    /// Eight bytes, little-endian.
    pub fn u64(&mut self, v: u64) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }

    /// LEB128, one to ten bytes.
    pub fn varint(&mut self, mut v: u64) {
        while v >= 0x80 {
            self.0.push(v as u8 | 0x80);
            v >>= 7;
        }
        self.0.push(v as u8);
    }

    /// A signed value, zigzag-coded as a varint.
    pub fn zigzag(&mut self, v: i64) {
        self.varint(((v << 1) ^ (v >> 63)) as u64);
    }

    /// Bytes as they are.
    pub fn bytes(&mut self, v: &[u8]) {
        self.0.extend_from_slice(v);
    }

    /// A varint length, then the bytes.
    pub fn counted(&mut self, v: &[u8]) {
        self.varint(v.len() as u64);
        self.bytes(v);
    }
}

/// Takes fields from a byte slice; every read is checked against its end.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    /// Reads `bytes`; errors call the object `what`.
    pub fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Reader { rest: bytes, what }
    }

    /// Bytes not read yet.
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// The next `n` bytes.
    pub fn bytes(&mut self, n: usize) -> Result<&'a [u8], FormatError> {
        let (head, tail) = self.rest.split_at_checked(n).ok_or(FormatError::Truncated(self.what))?;
        self.rest = tail;
        Ok(head)
    }

    /// The next `N` bytes as an array.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let (head, tail) = self.rest.split_first_chunk().ok_or(FormatError::Truncated(self.what))?;
        self.rest = tail;
        Ok(*head)
    }

    /// One byte.
    pub fn u8(&mut self) -> Result<u8, FormatError> {
        Ok(self.array::<1>()?[0])
    }

    /// Two bytes, little-endian.
    pub fn u16(&mut self) -> Result<u16, FormatError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    /// Four bytes, little-endian.
    pub fn u32(&mut self) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// Eight bytes, little-endian.
    pub fn u64(&mut self) -> Result<u64, FormatError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// LEB128; a value past 64 bits, or not in its shortest form, is malformed.
    pub fn varint(&mut self) -> Result<u64, FormatError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            let part = u64::from(byte & 0x7f);
            if shift == 63 && part > 1 {
                return Err(self.malformed("a varint is longer than 64 bits"));
            }
            value |= part << shift;
            if byte & 0x80 == 0 {
                if byte == 0 && shift > 0 {
                    return Err(self.malformed("a varint is not in its shortest form"));
                }
                return Ok(value);
            }
        }
        Err(self.malformed("a varint is longer than 64 bits"))
    }

    /// A zigzag-coded signed varint.
    pub fn zigzag(&mut self) -> Result<i64, FormatError> {
        let v = self.varint()?;
        Ok((v >> 1) as i64 ^ -((v & 1) as i64))
    }

    /// A varint that must not exceed `limit`.
    pub fn bounded(&mut self, what: &'static str, limit: u64) -> Result<u64, FormatError> {
        let value = self.varint()?;
        if value > limit {
            return Err(FormatError::OverLimit { what, value, limit });
        }
        Ok(value)
    }

    /// A count of items of at least `item_bytes_min` each: bounded by `limit` and by what is left to read,
    /// so that no vector is allocated for items that cannot be there.
    pub fn count(
        &mut self,
        what: &'static str,
        limit: usize,
        item_bytes_min: usize,
    ) -> Result<usize, FormatError> {
        let n = self.bounded(what, limit as u64)? as usize;
        if n.saturating_mul(item_bytes_min) > self.rest.len() {
            return Err(FormatError::Truncated(self.what));
        }
        Ok(n)
    }

    /// A varint length of at most `limit`, then that many bytes.
    pub fn counted(&mut self, what: &'static str, limit: usize) -> Result<&'a [u8], FormatError> {
        let n = self.bounded(what, limit as u64)? as usize;
        self.bytes(n)
    }

    /// Checks that nothing is left.
    pub fn end(&self) -> Result<(), FormatError> {
        if self.rest.is_empty() { Ok(()) } else { Err(FormatError::TrailingBytes(self.what)) }
    }

    /// An error about this object.
    pub fn malformed(&self, why: &'static str) -> FormatError {
        FormatError::Malformed { what: self.what, why }
    }
}
