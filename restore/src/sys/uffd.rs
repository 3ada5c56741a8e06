//! A userfaultfd: made for our own process, or received from a VMM.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use userfaultfd::{FeatureFlags, UffdBuilder};

use super::abi::{API, ApiCall, FEATURE_EVENT_REMOVE, api};
use super::event::{Event, MESSAGE_BYTES, parse_all};
use super::mapping::Mapping;
use super::region::RegisteredRegion;
use super::shared_file::SharedFile;
use crate::plan::PageSize;

/// Why a userfaultfd could not be had or used.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// The process may not create one.
    #[error(
        "userfaultfd is not permitted here ({0}). As root, do one of: `sysctl -w vm.unprivileged_userfaultfd=1`; give this user access to the device: `chmod 0666 /dev/userfaultfd` (Linux 6.1 or later); give the program the capability: `setcap cap_sys_ptrace+ep PROGRAM`. In a container, also let its seccomp profile pass userfaultfd(2) or hand in the device"
    )]
    NotPermitted(#[source] io::Error),
    /// The kernel has none.
    #[error(
        "this kernel has no userfaultfd ({0}): build it with CONFIG_USERFAULTFD=y; Dormouse needs Linux 5.7 or later"
    )]
    Missing(#[source] io::Error),
    /// The kernel refuses the features asked for.
    #[error("the kernel refused the userfaultfd handshake with features {features:#x}: {error}")]
    Handshake {
        /// `UFFD_FEATURE_*` bits asked for.
        features: u64,
        /// The kernel's word.
        error: io::Error,
    },
    /// The descriptor received is something else.
    #[error(
        "the descriptor received is not a userfaultfd but {found}: the VMM must send its userfaultfd with the handshake"
    )]
    NotUffd {
        /// What it is.
        found: String,
    },
    /// Memory could not be registered.
    #[error(
        "cannot register {bytes} bytes at {address:#x}: {error}; the range must be mapped, aligned and not registered elsewhere"
    )]
    Register {
        /// The range's start.
        address: u64,
        /// Its bytes.
        bytes: u64,
        /// The kernel's word.
        error: io::Error,
    },
    /// A range that a region cannot have.
    #[error(
        "region at {address:#x} of {bytes} bytes is empty, unaligned to its {page_bytes} byte pages, or wraps around"
    )]
    BadRange {
        /// The range's start.
        address: u64,
        /// Its bytes.
        bytes: u64,
        /// Its page size.
        page_bytes: u64,
    },
    /// Two announced regions overlap.
    #[error("the regions announced at {first:#x} and {second:#x} overlap: each address may be in one region")]
    Overlap {
        /// Start of one.
        first: u64,
        /// Start of the other.
        second: u64,
    },
    /// Another call failed.
    #[error("userfaultfd: {what}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The kernel's word.
        error: io::Error,
    },
}

impl UffdError {
    fn creating(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOSYS | libc::ENOENT | libc::ENODEV) => UffdError::Missing(error),
            Some(libc::EPERM | libc::EACCES) => UffdError::NotPermitted(error),
            _ => UffdError::Io { what: "creating", error },
        }
    }
}

/// What a new userfaultfd should do.
#[derive(Clone, Copy, Debug)]
pub struct UffdOptions {
    /// Report ranges given back by the guest. Without it they must not be given back while a restore runs.
    pub remove_events: bool,
    /// Serve faults taken inside the kernel, as those of KVM are. Needs privilege; a VMM without KVM, and
    /// tests, can do without.
    pub kernel_faults: bool,
}

impl Default for UffdOptions {
    fn default() -> Self {
        UffdOptions { remove_events: true, kernel_faults: true }
    }
}

/// A userfaultfd, non-blocking and closed on exec. Clones share it; it is closed with the last of them and
/// with the last region registered through it.
#[derive(Clone, Debug)]
pub struct Uffd(pub(super) Arc<Inner>);

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) uffd: userfaultfd::Uffd,
    removes: bool,
    forks: bool,
}

impl Inner {
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

impl Uffd {
    /// Makes a userfaultfd for this process.
    pub fn create(options: UffdOptions) -> Result<Self, UffdError> {
        let features = if options.remove_events { FEATURE_EVENT_REMOVE } else { 0 };
        let made = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(!options.kernel_faults)
            .require_features(FeatureFlags::from_bits_retain(features))
            .create();
        let uffd = match made {
            Ok(uffd) => uffd,
            // The crate gives up if the device is there but closed to us; the system call may be open.
            Err(userfaultfd::Error::OpenDevUserfaultfd(_)) => create_by_syscall(options, features)?,
            Err(userfaultfd::Error::SystemError(e)) if e as i32 == libc::EINVAL => {
                return Err(UffdError::Handshake { features, error: (e).into() });
            }
            Err(userfaultfd::Error::SystemError(e)) => return Err(UffdError::creating(e.into())),
            Err(e) => return Err(UffdError::Io { what: "creating", error: io::Error::other(e) }),
        };
        Ok(Uffd(Arc::new(Inner { uffd, removes: options.remove_events, forks: false })))
    }

    /// Takes over a userfaultfd received from a VMM, whose handshake with the kernel is done.
    ///
    /// Whether it reports ranges given back is not to be told from outside, so it is taken to.
    pub fn adopt(fd: OwnedFd) -> Result<Self, UffdError> {
        use std::os::fd::AsRawFd;
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
            .map_err(|error| UffdError::Io { what: "looking at the descriptor received", error })?;
        if link.as_os_str() != "anon_inode:[userfaultfd]" {
            return Err(UffdError::NotUffd { found: link.display().to_string() });
        }
        let flags = rustix::fs::fcntl_getfl(&fd)
            .map_err(|e| UffdError::Io { what: "reading its flags", error: e.into() })?;
        // A blocking userfaultfd cannot be polled.
        rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)
            .map_err(|e| UffdError::Io { what: "making it non-blocking", error: e.into() })?;
        let forks = reports_forks(&fd);
        Ok(Uffd(Arc::new(Inner { uffd: wrap(fd), removes: true, forks })))
    }

    /// Whether ranges the guest gives back may be reported.
    pub fn may_report_removes(&self) -> bool {
        self.0.removes
    }

    /// Whether forks of the VMM are reported, which put descriptors into this process.
    pub(crate) fn may_report_forks(&self) -> bool {
        self.0.forks
    }

    /// Registers `memory` so that its missing pages fault to us.
    pub fn register(&self, memory: &Arc<Mapping>) -> Result<RegisteredRegion, UffdError> {
        let (address, bytes) = (memory.addr(), memory.bytes() as u64);
        self.0.uffd.register(address as *mut libc::c_void, memory.bytes()).map_err(|e| {
            UffdError::Register {
                address,
                bytes,
                error: match e {
                    userfaultfd::Error::SystemError(e) => e.into(),
                    e => io::Error::other(e),
                },
            }
        })?;
        RegisteredRegion::new(self, address, bytes, memory.page_size(), Some(memory.clone()))
    }

    /// A range which the VMM that sent this userfaultfd says it has registered. Only arithmetic is checked
    /// here: if the VMM lied, installs fail with [`Outcome::RegionGone`](crate::outcome::Outcome::RegionGone).
    pub fn announced(
        &self,
        address: u64,
        bytes: u64,
        page_size: PageSize,
    ) -> Result<RegisteredRegion, UffdError> {
        RegisteredRegion::new(self, address, bytes, page_size, None)
    }

    /// Reads the messages that wait, at most as many as `into` has room for; empty if none does.
    pub fn read_events<'b>(
        &self,
        into: &'b mut EventBuffer,
    ) -> Result<impl Iterator<Item = Event> + 'b, UffdError> {
        into.read_events(self.0.fd()).map_err(|error| UffdError::Io { what: "reading events", error })
    }

    /// For polling: readable when an event waits.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }

    /// A second descriptor of the same userfaultfd, to be kept where this process's death does not close it.
    pub fn try_clone_fd(&self) -> io::Result<OwnedFd> {
        self.0.fd().try_clone_to_owned()
    }
}

/// Room for messages.
#[derive(Debug)]
pub struct EventBuffer {
    bytes: Vec<u8>,
    /// Where the kernel writes them first, if they are to outlive this process.
    kept: Option<(Arc<SharedFile>, u64)>,
}

impl EventBuffer {
    /// Room for `messages` messages, at least one.
    pub fn new(messages: usize) -> Self {
        EventBuffer { bytes: vec![0; messages.clamp(1, 4096) * MESSAGE_BYTES], kept: None }
    }

    /// Room for `messages` messages, which the kernel writes into `file` from `at` on.
    pub(crate) fn kept(file: Arc<SharedFile>, at: u64, messages: usize) -> Self {
        EventBuffer { kept: Some((file, at)), ..EventBuffer::new(messages) }
    }

    /// Reads the messages that wait at `fd`; none if none does.
    fn read_events(&mut self, fd: BorrowedFd<'_>) -> io::Result<impl Iterator<Item = Event> + '_> {
        let got = match self.read_from(fd) {
            Ok(got) => got,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
            Err(error) => return Err(error),
        };
        // A kept file is others' to write, too: what is said there names no descriptor of ours to close. Forks are not
        // reported to it (see `may_report_forks`).
        let private = self.kept.is_none();
        Ok(parse_all(self.bytes.get(..got).unwrap_or_default()).inspect(move |event| {
            if let Event::Fork { descriptor } = *event
                && private
            {
                close_unwanted(descriptor);
            }
        }))
    }

    fn read_from(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let Some((file, at)) = &self.kept else {
            return Ok(rustix::io::read(fd, &mut self.bytes[..])?);
        };
        let got = file.read_from(fd, *at, self.bytes.len())?;
        file.read(*at, self.bytes.get_mut(..got).unwrap_or_default());
        Ok(got)
    }
}

fn wrap(fd: OwnedFd) -> userfaultfd::Uffd {
    use std::os::fd::IntoRawFd;
    // SAFETY: the descriptor is a userfaultfd (just made, or checked by the caller) and handed over whole.
    unsafe { userfaultfd::Uffd::from_raw_fd(fd.into_raw_fd()) }
}

fn create_by_syscall(options: UffdOptions, features: u64) -> Result<userfaultfd::Uffd, UffdError> {
    // UFFD_USER_MODE_ONLY is 1.
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | i32::from(!options.kernel_faults);
    // SAFETY: userfaultfd(2) takes flags and returns a new descriptor or -1.
    let made = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if made < 0 {
        return Err(UffdError::creating(io::Error::last_os_error()));
    }
    // SAFETY: the kernel just made this descriptor for us; nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(made as i32) };
    let mut call = ApiCall { api: API, features, ioctls: 0 };
    match api(fd.as_fd(), &mut call) {
        None => Ok(wrap(fd)),
        Some(e) => Err(UffdError::Handshake { features, error: io::Error::from_raw_os_error(e) }),
    }
}

/// Closes the descriptor that a fork event put into our process: children of a VMM are not served.
fn close_unwanted(descriptor: u32) {
    let Ok(raw) = i32::try_from(descriptor) else { return };
    // SAFETY: the kernel made this descriptor for us when it delivered the event just parsed, once; it wrote the event
    // into memory that is nobody else's.
    drop(unsafe { OwnedFd::from_raw_fd(raw) });
}

/// Whether whoever made this userfaultfd asked for events of forks. Where the kernel does not tell, it is taken not to:
/// no VMM is known to.
fn reports_forks(fd: &OwnedFd) -> bool {
    use std::os::fd::AsRawFd;
    const EVENT_FORK: u64 = 1 << 1;
    let told = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap_or_default();
    // As "API:<tab>VERSION:FEATURES IN USE:FEATURES THERE ARE", in hexadecimal.
    let api = told.lines().find_map(|line| line.strip_prefix("API:"));
    let features = api.and_then(|api| u64::from_str_radix(api.split(':').nth(1)?, 16).ok());
    features.is_some_and(|features| features & EVENT_FORK != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever could write to the file had any descriptor of this process closed.
    #[test]
    fn a_forged_event_in_a_kept_file_closes_nothing() {
        use std::os::fd::AsRawFd;
        let file = Arc::new(SharedFile::create("test", 4096).expect("a file"));
        let mut kept = EventBuffer::kept(file, 0, 4);
        let victim = std::fs::File::open("/dev/zero").expect("a descriptor");
        let mut forged = [0; MESSAGE_BYTES];
        forged[0] = 0x13;
        forged[8..12].copy_from_slice(&(victim.as_raw_fd() as u32).to_ne_bytes());
        let (reader, mut writer) = io::pipe().expect("a pipe");
        io::Write::write_all(&mut writer, &forged).expect("written");
        let events: Vec<_> = kept.read_events(reader.as_fd()).expect("events").collect();
        assert!(matches!(events[..], [Event::Fork { .. }]), "{events:?}");
        assert!(rustix::fs::fstat(&victim).is_ok(), "the descriptor was closed");
    }

    #[test]
    fn a_userfaultfd_says_whether_it_reports_forks() {
        let make = |features| {
            let made = UffdBuilder::new()
                .non_blocking(true)
                .user_mode_only(true)
                .require_features(features)
                .create();
            made.map(|uffd| uffd.as_fd().try_clone_to_owned().expect("cloned"))
        };
        let (Ok(without), Ok(with)) = (make(FeatureFlags::empty()), make(FeatureFlags::EVENT_FORK)) else {
            assert!(std::env::var_os("DORMOUSE_REQUIRE_UFFD").is_none(), "may not be skipped");
            return dormouse_testkit::skipped!("a userfaultfd that reports forks takes privilege");
        };
        assert!(!Uffd::adopt(without).expect("adopted").may_report_forks());
        assert!(Uffd::adopt(with).expect("adopted").may_report_forks());
    }
}
