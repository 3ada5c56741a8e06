//! The building blocks of a resume under criterion: `cargo bench -p dormouse-benches`.
#![allow(missing_docs, reason = "made by criterion's macros")]

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use dormouse_benches::{Bench, Options, guest::GUEST_PAGES, raw};
use dormouse_chunkstore::{HotRun, HotStream};
use dormouse_core::{PAGE_BYTES, PageIndex};
use dormouse_restore::plan::Plan;
use dormouse_restore::{Extent, PageSize, RegionSpec};

fn hot(bench: &Bench, pages: usize) -> HotStream {
    let bytes = bench.bytes()[..pages * PAGE_BYTES].to_vec();
    HotStream { runs: vec![HotRun { image: 0, first: PageIndex(0), bytes }] }
}

fn installs(c: &mut Criterion) {
    let bench = Bench::new(&Options::default()).expect("a guest's memory");
    let hot = hot(&bench, 4096);
    c.bench_function("raw_copy_16mib", |b| {
        b.iter(|| black_box(raw::copy_all(&hot, GUEST_PAGES).expect("userfaultfd")))
    });
    let plain = raw::PlainFrames::of(hot.runs[0].bytes.chunks(256 << 10), 3).expect("zstd");
    c.bench_function("plain_zstd_16mib", |b| b.iter(|| plain.decode_all(2)));
    c.bench_function("install_hot_16mib", |b| {
        b.iter(|| dormouse_benches::install::hot(&bench, 16).ok());
    });
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
    config = Criterion::default().sample_size(10);
    targets = installs, tables
}
criterion_main!(benches);
