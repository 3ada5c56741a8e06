//! The guest whose memory is measured with, and the stores it is in.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::OnceLock;

use dormouse_chunkstore::{ImageSource, ImportRequest, NoProgress, Store, StoreOptions, TouchedRun};
use dormouse_core::{ImageId, ImageKind, Name, PAGE_BYTES, PageCount, PageIndex};
use dormouse_restore::{
    Mapping, Memory, PageSize, PageSource, Plan, Policy, RegionSpec, Restore, RestoreHandle, Uffd,
    UffdOptions,
};
use tempfile::TempDir;

use crate::stats::{Rng, Sampler, Side, in_turns};
use crate::{BenchError, Options, Result};

/// Memory measured with: 128 MiB.
pub const GUEST_PAGES: u64 = 32 * 1024;

/// What the memory is called in snapshots.
pub const MEMORY: &str = "memory";

/// What all measurements share.
pub struct Bench {
    /// Fewer repetitions.
    pub quick: bool,
    dir: TempDir,
    bytes: Vec<u8>,
    nonzero: Vec<u64>,
    local: OnceLock<Store>,
    sampler: Option<Box<dyn Sampler>>,
}

impl Bench {
    /// Reads or makes the guest's memory.
    pub fn new(options: &Options) -> Result<Self> {
        let given = options.image.clone().or_else(|| {
            let set = std::env::var_os("DORMOUSE_VMSET")?;
            let path = PathBuf::from(set).join("2-work.mem");
            path.is_file().then_some(path)
        });
        let limit = GUEST_PAGES as usize * PAGE_BYTES;
        let mut bytes = match given {
            Some(path) => fs::read(&path).map_err(BenchError::file(format!("reading {}", path.display())))?,
            None => of_this_machine(limit),
        };
        bytes.resize(limit, 0);
        let dir = tempfile::tempdir().map_err(BenchError::file("making a temporary directory"))?;
        fs::write(dir.path().join("guest.mem"), &bytes)
            .map_err(BenchError::file("writing the guest's memory"))?;
        let zero = |page: &u64| {
            let at = *page as usize * PAGE_BYTES;
            dormouse_core::page::is_zero(&bytes[at..at + PAGE_BYTES])
        };
        let nonzero = (0..GUEST_PAGES).filter(|p| !zero(p)).collect();
        Ok(Bench { quick: options.quick, dir, bytes, nonzero, local: OnceLock::new(), sampler: None })
    }

    /// Takes samples by `sampler` instead of in turns.
    pub fn sampled_by(self, sampler: Box<dyn Sampler>) -> Self {
        Bench { sampler: Some(sampler), ..self }
    }

    /// Another way to take samples, if there is one.
    pub fn sampler(&self) -> Option<&dyn Sampler> {
        self.sampler.as_deref()
    }

    /// Samples of the sides of `row`, each with its name, in `unit`.
    pub(crate) fn compare<const N: usize>(
        &self,
        row: &str,
        unit: &str,
        times: usize,
        sides: [(&str, Side<'_>); N],
    ) -> Result<[Vec<f64>; N]> {
        let Some(sampler) = self.sampler() else {
            return in_turns(times, sides.map(|(_, side)| side));
        };
        let mut samples: [Vec<f64>; N] = std::array::from_fn(|_| Vec::new());
        for ((called, side), samples) in sides.into_iter().zip(&mut samples) {
            *samples = sampler.sample(&format!("{row}/{called}"), unit, side)?;
        }
        Ok(samples)
    }

    /// How often something is repeated that takes well below a second.
    pub fn times(&self) -> usize {
        if self.quick { 5 } else { 15 }
    }

    /// The directory for files.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The guest's memory.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The guest's memory as a file.
    pub fn file(&self) -> PathBuf {
        self.dir().join("guest.mem")
    }

    /// A working set of `pages` pages that are not zero: blocks of half a MiB all over memory, in random order.
    pub fn working_set(&self, pages: u64, seed: u64) -> Vec<TouchedRun> {
        let mut blocks: Vec<&[u64]> = self.nonzero.chunk_by(|a, b| a / 128 == b / 128).collect();
        Rng(seed).shuffle(&mut blocks);
        let taken = blocks.into_iter().flatten().take(pages as usize);
        taken.map(|&page| TouchedRun { image: 0, pages: page..page + 1 }).collect()
    }

    /// The guest in a store on local disk, under the name `guest`.
    pub fn local(&self) -> Result<Store> {
        if let Some(store) = self.local.get() {
            return Ok(store.clone());
        }
        let store = self.local_cold()?;
        import(&store, "guest", &self.file(), None)?;
        Ok(self.local.get_or_init(|| store).clone())
    }

    /// The same store, opened anew: nothing of it is in memory.
    pub fn local_cold(&self) -> Result<Store> {
        let dir = self.dir().join("store");
        Ok(Store::open(&dir.to_string_lossy(), StoreOptions::default())?)
    }
}

impl std::fmt::Debug for Bench {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bench").field("quick", &self.quick).field("dir", &self.dir).finish_non_exhaustive()
    }
}

/// Stores `file` as the memory of snapshot `name`.
pub fn import(store: &Store, name: &str, file: &Path, parent: Option<(&str, Vec<u64>)>) -> Result<()> {
    let mut request = ImportRequest::new(self::name(name)?);
    let dirty = parent
        .as_ref()
        .map(|(_, pages)| dormouse_chunkstore::Dirty::Ranges(pages.iter().map(|p| *p..*p + 1).collect()));
    request.parent = parent.map(|(parent, _)| self::name(parent)).transpose()?;
    let id = ImageId::new(MEMORY).map_err(|e| BenchError::wrong(e.to_string()))?;
    request.images.push(ImageSource { id, kind: ImageKind::Memory, path: file.to_owned(), dirty });
    store.import(&request, &NoProgress)?;
    Ok(())
}

/// A snapshot's name.
pub fn name(name: &str) -> Result<Name> {
    Name::new(name).map_err(|e| BenchError::wrong(e.to_string()))
}

/// Guest memory that is not there yet.
pub fn fresh(pages: u64, remove_events: bool) -> Result<(Arc<Mapping>, Memory)> {
    let mapping = Mapping::new(pages, PageSize::Small).map_err(BenchError::file("mapping guest memory"))?;
    let mapping = Arc::new(mapping);
    let uffd = Uffd::create(UffdOptions { remove_events, kernel_faults: false })?;
    let memory = Memory::own(uffd, std::slice::from_ref(&mapping))?;
    Ok((mapping, memory))
}

/// A restore of all of `source`'s pages into fresh memory.
pub fn start(source: Arc<dyn PageSource>, policy: Policy) -> Result<(Arc<Mapping>, RestoreHandle)> {
    let pages = source.page_count();
    let (mapping, memory) = fresh(pages.0, true)?;
    Ok((mapping, Restore::start(plan(source, pages)?, memory, policy)?))
}

/// One region that shows all pages.
pub fn plan(source: Arc<dyn PageSource>, pages: PageCount) -> Result<Plan> {
    let region = RegionSpec { image_first: PageIndex(0), pages, page_size: PageSize::Small };
    Ok(Plan::new(source, &[region])?)
}

/// Something like a guest's memory: programs, libraries and texts of this machine, and zeros between them.
fn of_this_machine(bytes: usize) -> Vec<u8> {
    let mut all = Vec::with_capacity(bytes);
    let mut files: Vec<PathBuf> = std::env::current_exe().into_iter().collect();
    for dir in [
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib64",
        "/usr/bin",
        "/usr/share/doc",
        "/usr/lib",
    ] {
        let mut found: Vec<PathBuf> = fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.path())
            .filter(|p| p.is_file())
            .collect();
        found.sort();
        files.extend(found);
    }
    for file in files {
        let Ok(mut content) = fs::read(&file) else { continue };
        // None of them alone should be what is measured.
        content.truncate(4 << 20);
        let padded = content.len().next_multiple_of(PAGE_BYTES);
        content.resize(padded + padded / 5 / PAGE_BYTES * PAGE_BYTES, 0);
        all.extend(content);
        if all.len() >= bytes {
            break;
        }
    }
    all.truncate(bytes);
    all
}
