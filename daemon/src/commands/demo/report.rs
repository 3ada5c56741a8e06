//! What a demo measured: one document, or a text readable at a glance.

use std::io::{self, Write};

use dormouse_chunkstore::Usage;
use serde::Serialize;

use super::{Kind, guest::Woke};
use crate::{human, table::Table};

#[derive(Debug, Serialize)]
pub(super) struct Report {
    guest: Kind,
    snapshot: Stored,
    resume: Resume,
    pages: Pages,
}

#[derive(Debug, Serialize)]
struct Stored {
    logical_bytes: u64,
    nonzero_bytes: u64,
    stored_bytes: u64,
    dollars_per_month: f64,
    price_per_gb_month: f64,
}

#[derive(Debug, Serialize)]
struct Resume {
    /// Wakes measured.
    runs: usize,
    /// Wakes before those, in which the machine's working set was learnt.
    unmeasured_runs: usize,
    /// From the request, with no process there yet, to the machine's first answer.
    p50_ms: f64,
    p99_ms: f64,
    /// From the request to the end of each phase.
    phases: Phases,
}

#[derive(Debug, Serialize)]
struct Phases {
    process: Spread,
    open: Spread,
    handshake: Spread,
    first_instruction: Spread,
    first_answer: Spread,
    first_full_verified_pass: Spread,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Spread {
    p50_ms: f64,
    p99_ms: f64,
}

/// Over all measured wakes together.
#[derive(Debug, Serialize)]
struct Pages {
    faulted: u64,
    prefetched: u64,
    wrong: u64,
}

impl Report {
    pub(super) fn new(kind: Kind, usage: &Usage, price: f64, dollars: f64, wakes: &[Woke]) -> Self {
        let spread = |phase: fn(&Woke) -> f64| Spread::of(wakes.iter().map(phase));
        let sum = |count: fn(&Woke) -> u64| wakes.iter().map(count).sum();
        let answer = spread(|w| w.first_answer);
        Report {
            guest: kind,
            snapshot: Stored {
                logical_bytes: usage.logical_bytes,
                nonzero_bytes: usage.nonzero_bytes,
                stored_bytes: usage.stored_bytes,
                dollars_per_month: dollars,
                price_per_gb_month: price,
            },
            resume: Resume {
                runs: wakes.len(),
                unmeasured_runs: 1,
                p50_ms: answer.p50_ms,
                p99_ms: answer.p99_ms,
                phases: Phases {
                    process: spread(|w| w.process),
                    open: spread(|w| w.open),
                    handshake: spread(|w| w.handshake),
                    first_instruction: spread(|w| w.first_instruction),
                    first_answer: answer,
                    first_full_verified_pass: spread(|w| w.first_full_verified_pass),
                },
            },
            pages: Pages {
                faulted: sum(|w| w.faulted),
                prefetched: sum(|w| w.prefetched),
                wrong: sum(|w| w.wrong),
            },
        }
    }

    /// Whether the machine found every page right.
    pub(super) fn all_right(&self) -> bool {
        self.pages.wrong == 0
    }

    pub(super) fn print_text(&self, out: &mut dyn Write) -> io::Result<()> {
        let Report { guest, snapshot, resume, pages } = self;
        let runs = resume.runs;
        let guest = match guest {
            Kind::Kvm => "A virtual machine on /dev/kvm",
            Kind::Process => "A process in place of a virtual machine",
        };
        writeln!(out, "{guest} went on standby and woke {runs} times.\n")?;
        let mut table = Table::new(["on standby", ">", ""]);
        table.row(["logical".into(), human::bytes(snapshot.logical_bytes), String::new()]);
        table.row(["non-zero".into(), human::bytes(snapshot.nonzero_bytes), String::new()]);
        let share = human::percent(snapshot.stored_bytes, snapshot.nonzero_bytes);
        table.row([
            "stored".into(),
            human::bytes(snapshot.stored_bytes),
            format!("{share} of what is not zero"),
        ]);
        let price = format!("at {} a GB and month", human::dollars(snapshot.price_per_gb_month));
        table.row(["a month".into(), human::dollars(snapshot.dollars_per_month), price]);
        writeln!(out, "{table}")?;

        let mut table = Table::new(["since the request", ">p50", ">p99"]);
        let phases = &resume.phases;
        for (phase, spread) in [
            ("process started", phases.process),
            ("snapshot open", phases.open),
            ("handshake done", phases.handshake),
            ("first instruction", phases.first_instruction),
            ("first answer", phases.first_answer),
            ("all pages verified", phases.first_full_verified_pass),
        ] {
            table.row([phase.to_owned(), millis(spread.p50_ms), millis(spread.p99_ms)]);
        }
        writeln!(out, "{table}")?;
        let each = |count: u64| count / runs.max(1) as u64;
        let (faulted, prefetched) = (each(pages.faulted), each(pages.prefetched));
        writeln!(out, "pages a wake: {faulted} faulted, {prefetched} prefetched")?;
        writeln!(out, "wrong pages:  {}\n", pages.wrong)?;
        writeln!(
            out,
            "Resume latency: p50 {}, p99 {}, from the request, with no process there yet, to the first\n\
             answer, for which the machine reads 256 pages scattered over its memory. A first wake, not\n\
             counted above, learnt which pages those are.",
            millis(resume.p50_ms),
            millis(resume.p99_ms)
        )
    }
}

impl Spread {
    /// By nearest rank; of 20 values the 99th percentile is the largest.
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = values.collect();
        sorted.sort_by(f64::total_cmp);
        let rank = |share: f64| {
            let rank = (share * sorted.len() as f64).ceil() as usize;
            let value = sorted.get(rank.max(1) - 1).copied().unwrap_or(0.0);
            (value * 1e3).round() / 1e3
        };
        Spread { p50_ms: rank(0.5), p99_ms: rank(0.99) }
    }
}

fn millis(ms: f64) -> String {
    format!("{ms:.1} ms")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let spread = Spread::of((1..=20).rev().map(f64::from));
        assert_eq!((spread.p50_ms, spread.p99_ms), (10.0, 20.0));
        let one = Spread::of(std::iter::once(3.0));
        assert_eq!((one.p50_ms, one.p99_ms), (3.0, 3.0));
    }
}
