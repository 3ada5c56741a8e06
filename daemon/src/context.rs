//! What the global options mean: the store to open, the key to open it with, where caches go.

use std::{
    env,
    io::{self, Write},
    path::PathBuf,
};

use dormouse_chunkstore::{Store, StoreOptions};
use dormouse_core::Name;
use serde::Serialize;

use crate::{cli::args::GlobalOptions, failure::Failure, key, output, progress::Bar};

pub(crate) use crate::machine::vmm::runtime_dir;

/// Handed to every command.
#[derive(Debug)]
pub(crate) struct Context {
    global: GlobalOptions,
}

impl Context {
    pub(crate) fn new(global: GlobalOptions) -> Self {
        Context { global }
    }

    /// The global options as given.
    pub(crate) fn global(&self) -> &GlobalOptions {
        &self.global
    }

    /// Opens the store.
    pub(crate) fn open_store(&self) -> Result<Store, Failure> {
        Ok(Store::open(&self.store_url()?, self.store_options()?)?)
    }

    /// The store's URL as given.
    pub(crate) fn store_url(&self) -> Result<String, Failure> {
        match &self.global.store {
            Some(url) => Ok(url.clone()),
            None => default_store(),
        }
    }

    /// How to open it.
    pub(crate) fn store_options(&self) -> Result<StoreOptions, Failure> {
        let no_encryption = self.global.no_encryption;
        let key = if no_encryption { None } else { key::find(&self.global)? };
        Ok(StoreOptions { key, cache_dir: self.cache_dir(), no_encryption, ..Default::default() })
    }

    /// A progress bar.
    pub(crate) fn progress(&self, doing: &str) -> Bar {
        Bar::new(doing, self.global.quiet)
    }

    /// Prints a command's result. See [`output::print`].
    pub(crate) fn print<T: Serialize>(
        &self,
        document: &T,
        text: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<(), Failure> {
        output::print(self.global.json, document, text)
    }

    /// Caches are a convenience: without a place for them they are kept in memory.
    pub(crate) fn cache_dir(&self) -> Option<PathBuf> {
        self.global.cache_dir.clone().or_else(|| Some(base_dir("XDG_CACHE_HOME", ".cache")?.join("dormouse")))
    }
}

/// A snapshot's name from the command line.
pub(crate) fn name(text: &str) -> Result<Name, String> {
    Name::new(text).map_err(|e| e.to_string())
}

/// The store of somebody who has set nothing up.
fn default_store() -> Result<String, Failure> {
    let dir = base_dir("XDG_DATA_HOME", ".local/share").ok_or_else(|| {
        Failure::usage("no place for snapshots: neither HOME nor XDG_DATA_HOME is set; pass --store URL")
    })?;
    let dir = dir.join("dormouse");
    let text = dir.to_str().ok_or_else(|| {
        Failure::usage(format!("the default store {} is not UTF-8; pass --store URL", dir.display()))
    })?;
    Ok(text.to_owned())
}

/// A base directory as the XDG specification has it: relative values of the variable count as unset.
fn base_dir(variable: &str, below_home: &str) -> Option<PathBuf> {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    absolute(variable).or_else(|| Some(absolute("HOME")?.join(below_home)))
}
