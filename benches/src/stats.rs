//! Medians of measurements taken in turns.

use std::time::{Duration, Instant};

use crate::Result;

/// A generator of numbers, the same on every machine (splitmix64).
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Shuffles.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, (self.next_u64() % (i as u64 + 1)) as usize);
        }
    }
}

/// The value below which `share` of all lie.
pub fn quantile(mut all: Vec<f64>, share: f64) -> f64 {
    all.sort_by(f64::total_cmp);
    let at = ((all.len() as f64 * share) as usize).min(all.len().saturating_sub(1));
    all.get(at).copied().unwrap_or(f64::NAN)
}

/// The median.
pub fn median(all: Vec<f64>) -> f64 {
    quantile(all, 0.5)
}

/// Milliseconds.
pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Microseconds.
pub fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// How long `work` takes.
pub fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(Duration, T)> {
    let start = Instant::now();
    let done = work()?;
    Ok((start.elapsed(), done))
}

/// What is measured once: a time in the unit of its row.
pub type Side<'a> = &'a mut dyn FnMut() -> Result<f64>;

/// Another way to take samples than in turns, such as criterion's.
pub trait Sampler {
    /// Samples of `side`, which are times in `unit` ("ms" or "us").
    fn sample(&self, label: &str, unit: &str, side: Side<'_>) -> Result<Vec<f64>>;
}

/// Runs all of `sides` once to warm up, then `times` times in turns; the samples of each.
pub(crate) fn in_turns<const N: usize>(times: usize, mut sides: [Side<'_>; N]) -> Result<[Vec<f64>; N]> {
    let mut samples: [Vec<f64>; N] = std::array::from_fn(|_| Vec::with_capacity(times));
    for turn in 0..=times {
        for (side, samples) in sides.iter_mut().zip(&mut samples) {
            let sample = side()?;
            if turn > 0 {
                samples.push(sample);
            }
        }
    }
    Ok(samples)
}
