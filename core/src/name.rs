//! Names people give: of snapshots, and of the images and blobs within one.

use std::fmt;

use crate::{error::FormatError, limits::NAME_BYTES_MAX};

fn check(what: &'static str, name: &str) -> Result<(), FormatError> {
    let why = if name.is_empty() {
        "it is empty"
    } else if name.len() > NAME_BYTES_MAX {
        "it is longer than 128 bytes"
    } else if !name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-')) {
        "only letters, digits, '.', '_' and '-' may be used"
    } else if !name.as_bytes()[0].is_ascii_alphanumeric() {
        "it must begin with a letter or a digit"
    } else {
        return Ok(());
    };
    Err(FormatError::BadName { what, name: name.chars().take(80).collect(), why })
}

macro_rules! name_type {
    ($(#[$doc:meta])* $ty:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $ty(String);

        impl $ty {
            /// Checks the rules: 1 to 128 of `A-Z a-z 0-9 . _ -`, beginning with a letter or digit.
            pub fn new(name: impl Into<String>) -> Result<Self, FormatError> {
                let name = name.into();
                check($what, &name)?;
                Ok($ty(name))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $ty {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl std::str::FromStr for $ty {
            type Err = FormatError;
            fn from_str(s: &str) -> Result<Self, FormatError> {
                $ty::new(s)
            }
        }
    };
}

name_type! {
    /// The name of a snapshot: the key of its reference.
    Name, "snapshot"
}
name_type! {
    /// The name of an image or a device-state blob within a snapshot.
    ImageId, "image"
}
