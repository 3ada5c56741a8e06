//! Credentials from the files that AWS's tools share, looked at again for every request, so that new ones count at once.
//!
//! `~/.aws/credentials` (`AWS_SHARED_CREDENTIALS_FILE`) and `~/.aws/config` (`AWS_CONFIG_FILE`), of the profile
//! `AWS_PROFILE`, or `default`: keys, or a `credential_process` that prints some. Roles and single sign-on are for that
//! process: `aws configure export-credentials --format process`.

use std::{
    env, fs,
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use async_trait::async_trait;
use object_store::{CredentialProvider, Error as OsError, aws::AwsCredential};
use serde::Deserialize;

/// How long what a process printed is used. It is to print what lasts longer.
const PROCESS_PATIENCE: Duration = Duration::from_secs(5 * 60);
/// Most bytes of a file that are looked at.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// What one profile says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Profile {
    key_id: Option<String>,
    secret: Option<String>,
    token: Option<String>,
    process: Option<String>,
}

/// Tells one content of a file from the next.
type Stamp = Option<(Option<SystemTime>, u64, u64)>;

#[derive(Debug)]
struct Read {
    stamps: [Stamp; 2],
    at: Instant,
    by_process: bool,
    credential: Arc<AwsCredential>,
}

/// The credentials of a profile.
#[derive(Debug)]
pub(super) struct ProfileCredentials {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// The file of credentials, and that of settings.
    files: [PathBuf; 2],
    profile: String,
    read: Mutex<Option<Read>>,
}

impl ProfileCredentials {
    /// Those of the environment's profile; `None` where the environment has credentials itself, or says where else they
    /// are, or where no profile is named and the default one has none.
    pub(super) fn from_env() -> Option<Self> {
        let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
        let any = |names: &[&str]| names.iter().any(|name| set(name).is_some());
        let named = set("AWS_PROFILE").map(|name| name.to_string_lossy().into_owned());
        let elsewhere = [
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        ];
        if any(&["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]) || (named.is_none() && any(&elsewhere)) {
            return None;
        }
        let home = set("HOME").map(PathBuf::from);
        let file = |variable: &str, name: &str| match (set(variable), &home) {
            (Some(path), _) => PathBuf::from(path),
            (None, Some(home)) => home.join(".aws").join(name),
            (None, None) => PathBuf::new(),
        };
        let files = [file("AWS_SHARED_CREDENTIALS_FILE", "credentials"), file("AWS_CONFIG_FILE", "config")];
        let found = Self::new(files, named.clone().unwrap_or_else(|| "default".into()));
        (named.is_some() || found.shared.profile() != Profile::default()).then_some(found)
    }

    fn new(files: [PathBuf; 2], profile: String) -> Self {
        ProfileCredentials { shared: Arc::new(Shared { files, profile, read: Mutex::default() }) }
    }
}

#[async_trait]
impl CredentialProvider for ProfileCredentials {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        if let Some(credential) = self.shared.at_hand() {
            return Ok(credential);
        }
        let (shared, path) = (self.shared.clone(), self.shared.files[0].display().to_string());
        // A process takes its time.
        let renewed = tokio::task::spawn_blocking(move || shared.renew()).await;
        let renewed = renewed.map_err(|why| why.to_string()).and_then(|renewed| renewed);
        renewed.map_err(|why| OsError::Unauthenticated { path, source: why.into() })
    }
}

impl Shared {
    fn stamps(&self) -> [Stamp; 2] {
        let stamp = |path: &PathBuf| {
            fs::metadata(path).ok().map(|meta| (meta.modified().ok(), meta.len(), meta.ino()))
        };
        [stamp(&self.files[0]), stamp(&self.files[1])]
    }

    fn at_hand(&self) -> Option<Arc<AwsCredential>> {
        let read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let read = read.as_ref()?;
        let lasts = !read.by_process || read.at.elapsed() < PROCESS_PATIENCE;
        (lasts && read.stamps == self.stamps()).then(|| read.credential.clone())
    }

    fn profile(&self) -> Profile {
        let text = |path: &PathBuf| {
            let small = fs::metadata(path).is_ok_and(|meta| meta.len() <= FILE_BYTES_MAX);
            small.then(|| fs::read_to_string(path).ok()).flatten().unwrap_or_default()
        };
        let mut profile = parse(&text(&self.files[0]), &self.profile);
        if profile == Profile::default() {
            profile = parse(&text(&self.files[1]), &self.profile);
        }
        profile
    }

    fn renew(&self) -> Result<Arc<AwsCredential>, String> {
        // Those that wait for the same need no process of their own.
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let stamps = self.stamps();
        if let Some(read) = &*read
            && read.stamps == stamps
            && read.by_process
            && read.at.elapsed() < PROCESS_PATIENCE
        {
            return Ok(read.credential.clone());
        }
        let (profile, at) = (self.profile(), Instant::now());
        let by_process = profile.key_id.is_none();
        let credential = match profile {
            Profile { key_id: Some(key_id), secret: Some(secret_key), token, .. } => {
                AwsCredential { key_id, secret_key, token }
            }
            Profile { key_id: None, process: Some(process), .. } => run(&process)?,
            _ => {
                return Err(format!(
                    "profile {:?} has neither keys nor a credential_process in {} or {}",
                    self.profile,
                    self.files[0].display(),
                    self.files[1].display()
                ));
            }
        };
        let credential = Arc::new(credential);
        *read = Some(Read { stamps, at, by_process, credential: credential.clone() });
        Ok(credential)
    }
}

/// What a file says of a profile; in the file of settings its section is called `profile NAME`.
fn parse(text: &str, name: &str) -> Profile {
    let (mut profile, mut inside) = (Profile::default(), false);
    for line in text.lines().map(str::trim) {
        if let Some(section) = line.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            let section = section.0.trim();
            let section = section.strip_prefix("profile ").map_or(section, str::trim);
            inside = section == name;
        } else if inside
            && !line.starts_with(['#', ';'])
            && let Some((key, value)) = line.split_once('=')
        {
            let value = Some(value.trim().to_owned());
            match key.trim() {
                "aws_access_key_id" => profile.key_id = value,
                "aws_secret_access_key" => profile.secret = value,
                "aws_session_token" => profile.token = value,
                "credential_process" => profile.process = value,
                _ => {}
            }
        }
    }
    profile
}

/// What a `credential_process` prints.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Printed {
    version: u32,
    access_key_id: String,
    secret_access_key: String,
    session_token: Option<String>,
}

fn run(process: &str) -> Result<AwsCredential, String> {
    let mut command = Command::new("sh");
    command.arg("-c").arg(process).stdin(Stdio::null()).stderr(Stdio::inherit());
    let output = command.output().map_err(|e| format!("the credential_process cannot be run: {e}"))?;
    if !output.status.success() {
        return Err(format!("the credential_process ended with {}", output.status));
    }
    // What it printed must not show up in a message.
    match serde_json::from_slice(&output.stdout) {
        Ok(Printed { version: 1, access_key_id: key_id, secret_access_key: secret_key, session_token }) => {
            Ok(AwsCredential { key_id, secret_key, token: session_token })
        }
        _ => Err("the credential_process printed no credentials of version 1".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::runner::Runner;

    fn runner() -> Runner {
        Runner::on(tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap())
    }

    /// In place of what is there, as tools that renew credentials do it.
    fn replace(path: &PathBuf, text: &str) {
        let new = path.with_extension("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, path).unwrap();
    }

    #[test]
    fn credentials_that_are_renewed_count_for_the_next_request() {
        let (dir, runner) = (tempfile::tempdir().unwrap(), runner());
        let files = [dir.path().join("credentials"), dir.path().join("config")];
        let of = ProfileCredentials::new(files.clone(), "work".into());
        let get = || runner.run(of.get_credential());
        let none = get().unwrap_err();
        assert!(matches!(none, OsError::Unauthenticated { .. }), "{none}");
        let keys = |n: u32| {
            format!(
                "[default]\naws_access_key_id=no\n[work]\n# a comment = x\naws_access_key_id = id{n}\n\
                 aws_secret_access_key=a=b/{n}\naws_session_token = t{n}\n[more]\naws_access_key_id=no\n"
            )
        };
        for n in 1..3 {
            replace(&files[0], &keys(n));
            let got = get().unwrap();
            let all = (got.key_id.as_str(), got.secret_key.as_str(), got.token.as_deref());
            assert_eq!(all, (&*format!("id{n}"), &*format!("a=b/{n}"), Some(&*format!("t{n}"))));
            assert!(Arc::ptr_eq(&got, &get().unwrap()), "not read again while it is the same");
        }
    }

    #[test]
    fn a_process_is_asked_once_until_the_profile_changes() {
        let (dir, runner) = (tempfile::tempdir().unwrap(), runner());
        let (files, asked) =
            (["credentials", "config"].map(|name| dir.path().join(name)), dir.path().join("asked"));
        let of = ProfileCredentials::new(files.clone(), "default".into());
        let process = |id: &str| {
            let printed = format!(
                r#"{{"Version": 1, "AccessKeyId": "{id}", "SecretAccessKey": "s", "Expiration": "x"}}"#
            );
            format!("[default]\ncredential_process = echo >> '{}'; echo '{printed}'\n", asked.display())
        };
        replace(&files[1], &process("one"));
        for _ in 0..3 {
            assert_eq!(runner.run(of.get_credential()).unwrap().key_id, "one");
        }
        assert_eq!(fs::read(&asked).unwrap().len(), 1);
        replace(&files[1], &process("two"));
        assert_eq!(runner.run(of.get_credential()).unwrap().key_id, "two");
        for broken in ["false", "echo {}", "echo secret"] {
            replace(&files[1], &format!("[profile default]\ncredential_process = {broken}\n"));
            let why = runner.run(of.get_credential()).unwrap_err().to_string();
            assert!(!why.contains("secret"), "{why}");
        }
    }
}
