//! Where the key of an encrypted domain comes from: an option, or the environment.

use std::{
    env, fs,
    io::Read as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use dormouse_core::DomainKey;

use crate::{cli::args::GlobalOptions, failure::Failure};

const KEY_BYTES: usize = 32;

/// The key to work with, or `None` for the domain without encryption. Options win over the environment.
pub(crate) fn find(global: &GlobalOptions) -> Result<Option<DomainKey>, Failure> {
    if let Some(path) = &global.key_file {
        return from_file(path).map(Some);
    }
    if let Some(command) = &global.key_command {
        return from_command(command).map(Some);
    }
    let set = |name| env::var_os(name).filter(|v| !v.is_empty());
    match (set("DORMOUSE_KEY_FILE"), set("DORMOUSE_KEY")) {
        (None, None) => Ok(None),
        (Some(path), None) => from_file(&PathBuf::from(path)).map(Some),
        (None, Some(hex)) => parse(hex.as_encoded_bytes(), "DORMOUSE_KEY").map(Some),
        (Some(_), Some(_)) => Err(Failure::usage(
            "both DORMOUSE_KEY_FILE and DORMOUSE_KEY are set; unset the one that is not meant",
        )),
    }
}

pub(crate) fn from_file(path: &Path) -> Result<DomainKey, Failure> {
    let cannot = |e: std::io::Error| {
        Failure::new("key", format!("the key file {} cannot be read: {e}", path.display()))
    };
    let mut bytes = Vec::new();
    // Never more than a key can have: the path may be a device.
    fs::File::open(path).map_err(cannot)?.take(1024).read_to_end(&mut bytes).map_err(cannot)?;
    parse(&bytes, &format!("the key file {}", path.display()))
}

fn from_command(command: &str) -> Result<DomainKey, Failure> {
    let run =
        Command::new("sh").arg("-c").arg(command).stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output =
        run.map_err(|e| Failure::new("key", format!("the key command {command:?} cannot be run: {e}")))?;
    if !output.status.success() {
        let message =
            format!("the key command {command:?} ended with {}; it must print the key", output.status);
        return Err(Failure::new("key", message));
    }
    parse(&output.stdout, &format!("what the key command {command:?} prints"))
}

/// Reads a key: 32 bytes as they are, or 64 hexadecimal digits with white space around them.
fn parse(bytes: &[u8], whence: &str) -> Result<DomainKey, Failure> {
    if let Ok(raw) = <[u8; KEY_BYTES]>::try_from(bytes) {
        return Ok(DomainKey::new(raw));
    }
    // The key must not show up in a message, however wrong it is.
    from_hex(bytes.trim_ascii()).map(DomainKey::new).ok_or_else(|| {
        let message = format!(
            "{whence} holds no key: 64 hexadecimal digits or 32 bytes are needed; \
             `dormouse key generate` makes one"
        );
        Failure::new("key", message)
    })
}

fn from_hex(hex: &[u8]) -> Option<[u8; KEY_BYTES]> {
    if hex.len() != 2 * KEY_BYTES {
        return None;
    }
    let digit = |d: u8| char::from(d).to_digit(16).and_then(|v| u8::try_from(v).ok());
    let mut key = [0; KEY_BYTES];
    for (byte, pair) in key.iter_mut().zip(hex.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(key)
}

/// A new key from the operating system's random source.
pub(crate) fn generate() -> Result<DomainKey, Failure> {
    let mut key = [0; KEY_BYTES];
    fs::File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut key))
        .map_err(|e| Failure::new("key", format!("no random bytes from /dev/urandom: {e}")))?;
    Ok(DomainKey::new(key))
}

/// The form in which keys are written.
pub(crate) fn to_hex(key: &DomainKey) -> String {
    key.expose().iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generated_key_can_be_read_back_in_both_forms() {
        let key = generate().expect("a key");
        for form in
            [to_hex(&key).into_bytes(), format!(" {}\n", to_hex(&key)).into_bytes(), key.expose().to_vec()]
        {
            assert_eq!(parse(&form, "test").expect("the key").expose(), key.expose());
        }
    }

    #[test]
    fn what_is_no_key_is_refused_without_being_shown() {
        for wrong in [&b""[..], b"secret", &[b'g'; 64], &[b'0'; 63], &[b'0'; 65]] {
            let failure = parse(wrong, "the key file x").expect_err("no key");
            assert_eq!(failure.kind, "key");
            assert!(wrong.is_empty() || !failure.message.contains(&*String::from_utf8_lossy(wrong)));
        }
    }
}
