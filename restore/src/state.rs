//! The page-state machine: a pure function from a state and an event to the next state and what to do.
//!
//! ```text
//!            fault            claim           copied / already there
//!   Absent --------> Awaited --------> Copying ---------------------> Installed
//!      \________________claim___________^ |
//!      ^____________released_____________|        failed: Awaited -> Copying -> Poisoned
//!                                                         withheld: Copying -> Awaited
//!   any state -- removed --> Removed (for ever: reads as zero from now on)
//! ```

/// Where one page of guest memory stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PageState {
    /// Nobody asked for it yet.
    Absent = 0,
    /// A vCPU waits for it; someone is on the way to its frame, or was told that there is no way.
    Awaited = 1,
    /// Claimed by exactly one thread, which is installing or poisoning it.
    Copying = 2,
    /// In guest memory.
    Installed = 3,
    /// The guest gave it back; it reads as zero, whatever the image holds.
    Removed = 4,
    /// It could not be had correctly: touching it raises SIGBUS in the VMM, or a machine check in the guest.
    Poisoned = 5,
}

impl PageState {
    /// All states.
    pub const ALL: [PageState; 6] = [
        PageState::Absent,
        PageState::Awaited,
        PageState::Copying,
        PageState::Installed,
        PageState::Removed,
        PageState::Poisoned,
    ];

    /// The state stored as `byte`. Bytes that name none read as [`PageState::Poisoned`]: fail closed.
    pub const fn from_u8(byte: u8) -> Self {
        match byte {
            0 => PageState::Absent,
            1 => PageState::Awaited,
            2 => PageState::Copying,
            3 => PageState::Installed,
            4 => PageState::Removed,
            _ => PageState::Poisoned,
        }
    }

    /// Whether nothing from the image is needed for it any more.
    pub const fn is_settled(self) -> bool {
        matches!(self, PageState::Installed | PageState::Removed | PageState::Poisoned)
    }
}

/// What can happen to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageEvent {
    /// A vCPU touched it and waits.
    Fault,
    /// A thread has its bytes and wants to install it.
    Claim,
    /// The install succeeded.
    Copied,
    /// The kernel found a page there (EEXIST).
    AlreadyThere,
    /// The thread that claimed it gives up; another may succeed.
    Released,
    /// The thread that claimed it gives up and has told why: whoever waits for it goes on waiting.
    Withheld,
    /// The guest gave it back (REMOVE event).
    Removed,
    /// Its bytes cannot be had, and a thread wants to poison it.
    Failed,
    /// The poisoning succeeded.
    Poisoned,
}

impl PageEvent {
    /// All events.
    pub const ALL: [PageEvent; 9] = [
        PageEvent::Fault,
        PageEvent::Claim,
        PageEvent::Copied,
        PageEvent::AlreadyThere,
        PageEvent::Released,
        PageEvent::Withheld,
        PageEvent::Removed,
        PageEvent::Failed,
        PageEvent::Poisoned,
    ];
}

/// What the caller of [`step`] has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    None,
    /// Find and install its bytes.
    Schedule,
    /// Install the bytes at hand: the claim was won.
    Install,
    /// Wake whoever waits; the page is there, or they must fault again to be told.
    Wake,
    /// Install a zero page: the guest gave this page back.
    InstallZero,
    /// Poison it: the claim was won.
    Poison,
}

/// The next state, and what has to be done for it.
pub const fn step(state: PageState, event: PageEvent) -> (PageState, Action) {
    use PageEvent as E;
    use PageState as S;
    match (event, state) {
        (E::Fault, S::Absent) => (S::Awaited, Action::Schedule),
        // Someone is at work on it already; the install wakes this vCPU too.
        (E::Fault, S::Awaited | S::Copying) => (state, Action::None),
        // The event was queued before the page came.
        (E::Fault, S::Installed | S::Poisoned) => (state, Action::Wake),
        (E::Fault, S::Removed) => (S::Removed, Action::InstallZero),

        (E::Claim, S::Absent | S::Awaited) => (S::Copying, Action::Install),
        (E::Claim, _) => (state, Action::None),

        (E::Copied, S::Copying) => (S::Installed, Action::None),
        (E::AlreadyThere, S::Copying) => (S::Installed, Action::Wake),
        (E::AlreadyThere, S::Removed) => (S::Removed, Action::Wake),
        // A vCPU may have come to wait while it was being copied, and whoever was on the way for one has turned back:
        // it must fault again.
        (E::Released, S::Copying) => (S::Absent, Action::Wake),
        (E::Withheld, S::Copying) => (S::Awaited, Action::None),
        // Overtaken by a removal, or never claimed.
        (E::Copied | E::AlreadyThere | E::Released | E::Withheld, _) => (state, Action::None),

        // A vCPU that waited for the image's bytes must fault again to be given zeros.
        (E::Removed, S::Absent | S::Awaited | S::Copying | S::Poisoned) => (S::Removed, Action::Wake),
        (E::Removed, _) => (S::Removed, Action::None),

        // Not settled before it is poisoned: detach would let whoever waits go on with zeros.
        (E::Failed, S::Awaited) => (S::Copying, Action::Poison),
        (E::Poisoned, S::Copying) => (S::Poisoned, Action::Wake),
        (E::Failed | E::Poisoned, _) => (state, Action::None),
    }
}

#[cfg(test)]
mod tests;
