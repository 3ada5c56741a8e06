//! What went wrong, sorted by what the caller can do about it.

use std::fmt;

use dormouse_chunkstore::StoreError;
use dormouse_core::FormatError;
use serde::Serialize;

/// How a command that could be carried out ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// All is well.
    Done,
    /// It was done, and what it found is not well (`verify`). Exit code 1.
    Failed,
}

/// A command failed.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Failure {
    /// A word for programs to tell failures apart by; see docs/CLI.md.
    pub(crate) kind: &'static str,
    /// What happened and what to do, for people.
    pub(crate) message: String,
    /// The object in the store that is missing or damaged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) object: Option<String>,
    /// Whether the same command may succeed later without anybody mending anything.
    pub(crate) retryable: bool,
}

impl Failure {
    pub(crate) fn new(kind: &'static str, message: impl Into<String>) -> Self {
        Failure { kind, message: message.into(), object: None, retryable: false }
    }

    /// The command line makes no sense.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Failure::new("usage", message)
    }

    /// The name of a snapshot is taken.
    pub(crate) fn exists(name: &dormouse_core::Name) -> Self {
        StoreError::Exists { name: name.to_string() }.into()
    }

    /// A file on this machine cannot be read or written.
    pub(crate) fn file(doing: &str, path: &std::path::Path, why: &std::io::Error) -> Self {
        Failure::new("file", format!("{doing} {}: {why}", path.display()))
    }

    /// 2 for wrong usage, 1 for all else.
    pub(crate) fn exit_code(&self) -> u8 {
        if self.kind == "usage" { 2 } else { 1 }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let (kind, object) = match &error {
            StoreError::NoSuchSnapshot { .. } => ("no_such_snapshot", None),
            StoreError::NothingStored { .. } => ("nothing_stored", None),
            StoreError::KeyringLost { .. } => ("missing", Some("keys".into())),
            StoreError::NoSuchPart { .. } => ("no_such_part", None),
            StoreError::UnknownKey { .. } | StoreError::KeyRetired { .. } => ("wrong_key", None),
            StoreError::KeyNeeded { .. } | StoreError::InTheClear { .. } => ("key_missing", None),
            StoreError::Missing { key, .. } => ("missing", Some(key.clone())),
            StoreError::Damaged { key, why } => (damage_kind(why), Some(key.clone())),
            StoreError::Conflict { .. } => ("conflict", None),
            StoreError::Exists { .. } => ("exists", None),
            StoreError::Busy { .. } => ("busy", None),
            StoreError::LostRace { .. } => ("lost_race", None),
            StoreError::Unavailable { .. } | StoreError::InDoubt { .. } => ("unavailable", None),
            StoreError::Denied { .. } => ("denied", None),
            StoreError::Archived { .. } => ("archived", None),
            StoreError::NoSuchStore { .. } => ("no_such_store", None),
            StoreError::Unsupported { .. } => ("unsupported", None),
            StoreError::Config { .. } => ("config", None),
            StoreError::Full { .. } => ("full", None),
            StoreError::File { .. } => ("file", None),
            StoreError::Changed { .. } => ("changed", None),
            StoreError::Format(why) => (damage_kind(why), None),
            StoreError::Bug(_) => ("bug", None),
            StoreError::Usage(_) => ("usage", None),
        };
        Failure { kind, message: error.to_string(), object, retryable: error.is_retryable() }
    }
}

/// Objects that another key or a newer program could read are not damaged.
fn damage_kind(why: &FormatError) -> &'static str {
    match why {
        FormatError::WrongKey(_) => "wrong_key",
        FormatError::KeyMissing(_) => "key_missing",
        FormatError::TooNew { .. } | FormatError::UnknownFlags { .. } => "too_new",
        FormatError::BadName { .. } => "usage",
        _ => "damaged",
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that panics has failed, and says where")]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    fn sources(folder: &Path, each: &mut dyn FnMut(&str)) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.extension() {
                _ if path.is_dir() => sources(&path, each),
                Some(kind) if kind == "rs" => each(&fs::read_to_string(&path).unwrap()),
                _ => {}
            }
        }
    }

    /// Whatever kind of failure the source makes up, people find it in the description of the command line.
    #[test]
    fn every_kind_is_told_in_the_documentation() {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let documented = fs::read_to_string(src.join("../../docs/CLI.md")).unwrap();
        let mut kinds: BTreeSet<String> =
            crate::serve::codes::CODES.iter().map(|(code, ..)| (*code).to_owned()).collect();
        let before = kinds.len();
        sources(&src, &mut |text| {
            let made = text.split("Failure::new(\"").skip(1).chain(text.split("=> (\"").skip(1));
            let made = made.filter_map(|rest| rest.split_once('"')).map(|(kind, _)| kind);
            kinds.extend(
                made.filter(|kind| kind.bytes().all(|b| matches!(b, b'a'..=b'z' | b'_'))).map(str::to_owned),
            );
        });
        assert!(kinds.len() > before + 5, "the source is looked at: {kinds:?}");
        kinds.retain(|kind| !documented.contains(&format!("`{kind}`")));
        assert!(kinds.is_empty(), "docs/CLI.md does not say what to do about {kinds:?}");
    }
}
