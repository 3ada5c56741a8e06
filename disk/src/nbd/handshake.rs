//! What client and server agree on before the first request. Pure: bytes of options in, bytes of answers out.

use super::protocol::{MAGIC, OPTION_MAGIC, export_flag, option, option_reply, reply};

const FLAG_FIXED_NEWSTYLE: u16 = 1;
const FLAG_NO_ZEROES: u16 = 1 << 1;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;
/// The only kind of block status that there is here, and the number that the server gives it.
const CONTEXT: &str = "base:allocation";
/// Number of `base:allocation` in answers.
pub const CONTEXT_ID: u32 = 1;
/// Most contexts that one option may ask for.
const QUERIES_MAX: u32 = 64;

/// The export, as a client sees it.
#[derive(Clone, Debug)]
pub struct Export {
    /// Its name. Clients may also ask for the empty name, which stands for the only export.
    pub name: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Whether it takes no writes.
    pub read_only: bool,
}

/// What was agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    /// Answers are structured.
    pub structured: bool,
    /// Block status may be asked for.
    pub block_status: bool,
    no_zeroes: bool,
}

/// What the server does next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Sends this and reads the next option.
    Option(Vec<u8>),
    /// Sends this; requests follow.
    Requests(Vec<u8>),
    /// Sends this and closes the connection.
    Close(Vec<u8>),
}

/// The state of one handshake.
#[derive(Debug)]
pub struct Handshake {
    export: Export,
    agreed: Agreed,
}

impl Export {
    fn flags(&self, agreed: Agreed) -> u16 {
        let always = export_flag::HAS_FLAGS
            | export_flag::SEND_FLUSH
            | export_flag::SEND_FUA
            | export_flag::CAN_MULTI_CONN;
        let writes = export_flag::SEND_TRIM | export_flag::SEND_WRITE_ZEROES;
        always
            | if self.read_only { export_flag::READ_ONLY } else { writes }
            | if agreed.structured { export_flag::SEND_DF } else { 0 }
    }

    fn is_called(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.name.as_bytes()
    }

    fn size_and_flags(&self, agreed: Agreed) -> Vec<u8> {
        [&self.size_bytes.to_be_bytes()[..], &self.flags(agreed).to_be_bytes()].concat()
    }
}

/// What the server says first.
pub fn greeting() -> Vec<u8> {
    let flags = FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES;
    [&MAGIC.to_be_bytes()[..], &OPTION_MAGIC.to_be_bytes(), &flags.to_be_bytes()].concat()
}

impl Handshake {
    /// Begins with what the client answers to the greeting; `None` if it does not speak this handshake.
    pub fn begin(export: Export, client_flags: [u8; 4]) -> Option<Self> {
        let flags = u32::from_be_bytes(client_flags);
        let known = u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        if flags & !known != 0 || flags & u32::from(FLAG_FIXED_NEWSTYLE) == 0 {
            return None;
        }
        let agreed = Agreed { no_zeroes: flags & u32::from(FLAG_NO_ZEROES) != 0, ..Agreed::default() };
        Some(Handshake { export, agreed })
    }

    /// What was agreed on so far.
    pub fn agreed(&self) -> Agreed {
        self.agreed
    }

    /// Answers one option.
    pub fn option(&mut self, option: u32, data: &[u8]) -> Next {
        let say = |kind, data: &[u8]| option_reply(option, kind, data);
        match option {
            option::EXPORT_NAME if self.export.is_called(data) => {
                let mut answer = self.export.size_and_flags(self.agreed);
                if !self.agreed.no_zeroes {
                    answer.extend([0; 124]);
                }
                Next::Requests(answer)
            }
            // The protocol has no other way to say no to this one.
            option::EXPORT_NAME => Next::Close(Vec::new()),
            option::ABORT => Next::Close(say(reply::ACK, &[])),
            option::LIST if data.is_empty() => {
                let name = self.export.name.as_bytes();
                let entry = [&(name.len() as u32).to_be_bytes()[..], name].concat();
                Next::Option([say(reply::SERVER, &entry), say(reply::ACK, &[])].concat())
            }
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.agreed.structured = true;
                Next::Option(say(reply::ACK, &[]))
            }
            option::INFO | option::GO => self.information(option, data),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(option, data),
            option::LIST | option::STRUCTURED_REPLY => {
                Next::Option(say(reply::ERR_INVALID, b"this option has no data"))
            }
            _ => Next::Option(say(reply::ERR_UNSUP, b"this option is not known here")),
        }
    }

    fn information(&self, option: u32, data: &[u8]) -> Next {
        let say = |kind, data: &[u8]| option_reply(option, kind, data);
        let Some((name, wanted)) = information_request(data) else {
            return Next::Option(say(reply::ERR_INVALID, b"malformed"));
        };
        if !self.export.is_called(name) {
            return Next::Option(say(reply::ERR_UNKNOWN, b"there is no export of this name"));
        }
        let mut answer = say(
            reply::INFO,
            &[&INFO_EXPORT.to_be_bytes()[..], &self.export.size_and_flags(self.agreed)].concat(),
        );
        if wanted.contains(&INFO_BLOCK_SIZE) {
            let sizes = [1u32, 4096, super::protocol::REQUEST_BYTES_MAX].map(u32::to_be_bytes).concat();
            answer.extend(say(reply::INFO, &[&INFO_BLOCK_SIZE.to_be_bytes()[..], &sizes].concat()));
        }
        answer.extend(say(reply::ACK, &[]));
        if option == option::GO { Next::Requests(answer) } else { Next::Option(answer) }
    }

    fn contexts(&mut self, option: u32, data: &[u8]) -> Next {
        let say = |kind, data: &[u8]| option_reply(option, kind, data);
        let set = option == option::SET_META_CONTEXT;
        if set {
            self.agreed.block_status = false;
        }
        let Some((name, queries)) = context_request(data) else {
            return Next::Option(say(reply::ERR_INVALID, b"malformed"));
        };
        if set && !self.agreed.structured {
            return Next::Option(say(reply::ERR_INVALID, b"structured replies come first"));
        }
        if !self.export.is_called(name) {
            return Next::Option(say(reply::ERR_UNKNOWN, b"there is no export of this name"));
        }
        let exact = queries.contains(&CONTEXT.as_bytes());
        let listed = !set && (queries.is_empty() || queries.contains(&&b"base:"[..]));
        let mut answer = Vec::new();
        if exact || listed {
            let id = if set { CONTEXT_ID } else { 0 };
            answer.extend(say(reply::META_CONTEXT, &[&id.to_be_bytes()[..], CONTEXT.as_bytes()].concat()));
            self.agreed.block_status |= set;
        }
        answer.extend(say(reply::ACK, &[]));
        Next::Option(answer)
    }
}

/// The next field of `N` bytes.
fn take<const N: usize>(at: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = at.split_first_chunk()?;
    *at = tail;
    Some(*head)
}

/// The next field with a length before it.
fn counted<'a>(at: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = u32::from_be_bytes(take(at)?) as usize;
    let (head, tail) = at.split_at_checked(length)?;
    *at = tail;
    Some(head)
}

/// Name, and the kinds of information that are asked for.
fn information_request(mut at: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let name = counted(&mut at)?;
    let count = usize::from(u16::from_be_bytes(take(&mut at)?));
    let kinds = at.chunks_exact(2).map(|kind| u16::from_be_bytes([kind[0], kind[1]])).collect();
    (at.len() == 2 * count).then_some((name, kinds))
}

/// Name, and the contexts that are asked for.
fn context_request(mut at: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let name = counted(&mut at)?;
    let count = u32::from_be_bytes(take(&mut at)?);
    if count > QUERIES_MAX {
        return None;
    }
    let queries = (0..count).map(|_| counted(&mut at)).collect::<Option<Vec<_>>>()?;
    at.is_empty().then_some((name, queries))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handshake() -> Handshake {
        let export = Export { name: "root".into(), size_bytes: 1 << 20, read_only: false };
        Handshake::begin(export, 3u32.to_be_bytes()).unwrap()
    }

    fn counted(bytes: &[u8]) -> Vec<u8> {
        [&(bytes.len() as u32).to_be_bytes()[..], bytes].concat()
    }

    fn kind_of(next: &Next) -> u32 {
        let Next::Option(bytes) = next else { panic!("{next:?}") };
        u32::from_be_bytes(bytes[12..16].try_into().unwrap())
    }

    #[test]
    fn unknown_client_flags_end_the_handshake() {
        let export = handshake().export;
        for flags in [0u32, 2, 4 | 1, 1 << 31 | 1] {
            assert!(Handshake::begin(export.clone(), flags.to_be_bytes()).is_none());
        }
    }

    #[test]
    fn lying_lengths_in_options_are_refused() {
        let right = [counted(b"root"), 1u16.to_be_bytes().to_vec(), 3u16.to_be_bytes().to_vec()].concat();
        assert!(matches!(handshake().option(option::GO, &right), Next::Requests(_)));
        for cut in 0..right.len() {
            assert_eq!(kind_of(&handshake().option(option::GO, &right[..cut])), reply::ERR_INVALID);
        }
        let longer = [&right[..], &[0]].concat();
        assert_eq!(kind_of(&handshake().option(option::GO, &longer)), reply::ERR_INVALID);
        let huge = [&u32::MAX.to_be_bytes()[..], b"root"].concat();
        assert_eq!(kind_of(&handshake().option(option::INFO, &huge)), reply::ERR_INVALID);
        let many = [counted(b""), u32::MAX.to_be_bytes().to_vec()].concat();
        assert_eq!(kind_of(&handshake().option(option::LIST_META_CONTEXT, &many)), reply::ERR_INVALID);
    }

    #[test]
    fn block_status_needs_structured_replies() {
        let query = [counted(b""), 1u32.to_be_bytes().to_vec(), counted(b"base:allocation")].concat();
        let mut handshake = handshake();
        assert_eq!(kind_of(&handshake.option(option::SET_META_CONTEXT, &query)), reply::ERR_INVALID);
        handshake.option(option::STRUCTURED_REPLY, &[]);
        assert_eq!(kind_of(&handshake.option(option::SET_META_CONTEXT, &query)), reply::META_CONTEXT);
        assert!(handshake.agreed().block_status);
        let other = [counted(b""), 1u32.to_be_bytes().to_vec(), counted(b"qemu:dirty")].concat();
        assert_eq!(kind_of(&handshake.option(option::SET_META_CONTEXT, &other)), reply::ACK);
        assert!(!handshake.agreed().block_status, "the last choice is the one that counts");
    }

    #[test]
    fn other_exports_are_unknown() {
        let other = [counted(b"other"), vec![0, 0]].concat();
        assert_eq!(kind_of(&handshake().option(option::GO, &other)), reply::ERR_UNKNOWN);
        assert_eq!(handshake().option(option::EXPORT_NAME, b"other"), Next::Close(Vec::new()));
        assert_eq!(kind_of(&handshake().option(77, &[])), reply::ERR_UNSUP);
    }
}
