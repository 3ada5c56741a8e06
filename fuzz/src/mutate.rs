//! Mutations of an input that are the same in every run.

/// Values at which lengths, counts and flags change their meaning.
const EDGES: [u64; 10] =
    [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 0x7fff_ffff_ffff_ffff];
/// Words of the textual formats that are read: JSON and HTTP.
const WORDS: [&[u8]; 8] = [b"1e999", b"-", b"4e", b"null", b"\\ud800", b"{\"", b"\r\n\r\n", b"[["];

/// Numbers that look random and are not.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Begins a sequence of its own for each `seed`.
    pub fn new(seed: u64) -> Self {
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    /// From 0 to below `end`; 0 if that is 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() as usize).checked_rem(end).unwrap_or(0)
    }
}

/// `input` changed in one to four places; `other` is an input to take parts of.
pub fn mutate(dice: &mut Dice, input: &[u8], other: &[u8]) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..1 + dice.below(4) {
        once(dice, &mut bytes, other);
    }
    bytes
}

fn once(dice: &mut Dice, bytes: &mut Vec<u8>, other: &[u8]) {
    let at = dice.below(bytes.len());
    match dice.below(9) {
        0 | 1 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << dice.below(8)),
        2 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = dice.next() as u8),
        3 => {
            let edge = EDGES[dice.below(EDGES.len())].to_le_bytes();
            let width = 1 << dice.below(4);
            for (byte, new) in bytes.iter_mut().skip(at).zip(&edge[..width]) {
                *byte = *new;
            }
        }
        4 => bytes.truncate(at),
        5 => {
            let end = (at + 1 + dice.below(16)).min(bytes.len());
            bytes.drain(at.min(end)..end);
        }
        6 => {
            let word = WORDS[dice.below(WORDS.len())];
            bytes.splice(at..at, word.iter().copied());
        }
        7 => {
            let end = (at + 1 + dice.below(64)).min(bytes.len());
            let part = bytes[at.min(end)..end].to_vec();
            bytes.splice(at..at, part);
        }
        _ => {
            let from = dice.below(other.len());
            bytes.truncate(at);
            bytes.extend_from_slice(&other[from..]);
        }
    }
}
