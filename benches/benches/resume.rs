//! All rows of `dormouse bench` under criterion, with their floors, and what is paid once a restore:
//! `cargo bench -p dormouse-benches -- FILTER`. Ratios are for `dormouse bench`, which takes both sides in turns.
#![allow(missing_docs, reason = "made by criterion's macros")]

use std::cell::RefCell;
use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use dormouse_benches::stats::{Sampler, Side};
use dormouse_benches::{Options, run_by};
use dormouse_core::PageIndex;
use dormouse_restore::plan::Plan;
use dormouse_restore::{Extent, PageSize, RegionSpec};

/// Has criterion take the samples.
struct ByCriterion(RefCell<Criterion>);

impl Sampler for ByCriterion {
    fn sample(&self, label: &str, unit: &str, side: Side<'_>) -> dormouse_benches::Result<Vec<f64>> {
        let seconds = if unit == "us" { 1e-6 } else { 1e-3 };
        let (mut samples, mut failed) = (Vec::new(), None);
        self.0.borrow_mut().bench_function(label, |bencher| {
            bencher.iter_custom(|times| {
                let mut sum = 0.0;
                for _ in 0..times {
                    match side() {
                        Ok(sample) => {
                            sum += sample;
                            samples.push(sample);
                        }
                        Err(error) => failed = Some(error),
                    }
                }
                Duration::from_secs_f64(sum * seconds)
            });
        });
        match failed {
            None if samples.is_empty() => Ok(vec![f64::NAN]),
            None => Ok(samples),
            Some(error) => Err(error),
        }
    }
}

fn short() -> Criterion {
    let short = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(200));
    short.measurement_time(Duration::from_secs(2))
}

fn rows(_: &mut Criterion) {
    let sampler = ByCriterion(RefCell::new(short().configure_from_args()));
    let options = Options { quick: true, ..Options::default() };
    run_by(Box::new(sampler), &options).expect("all rows can be measured here");
}

fn tables(c: &mut Criterion) {
    let pages = dormouse_core::PageCount(16 << 20);
    let region = RegionSpec { image_first: PageIndex(0), pages, page_size: PageSize::Small };
    struct Empty;
    impl dormouse_restore::PageSource for Empty {
        fn page_count(&self) -> dormouse_core::PageCount {
            dormouse_core::PageCount(16 << 20)
        }
        fn locate(&self, _: PageIndex) -> Result<Extent, dormouse_restore::SourceError> {
            Ok(Extent::zero(PageIndex(0), 16 << 20))
        }
        fn fetch(
            &self,
            _: dormouse_restore::FrameToken,
        ) -> Result<dormouse_restore::DecodedFrame, dormouse_restore::SourceError> {
            Ok(Vec::new().into())
        }
    }
    let source = std::sync::Arc::new(Empty);
    c.bench_function("plan_and_table_64gib", |b| {
        b.iter(|| {
            let plan = Plan::new(source.clone(), &[region]).ok();
            black_box(dormouse_restore::table::PageTable::new(plan.map_or(0, |p| p.cells())))
        });
    });
}

criterion_group! {
    name = benches;
    config = short();
    targets = rows, tables
}
criterion_main!(benches);
