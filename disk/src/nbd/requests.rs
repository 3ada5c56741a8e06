//! Carries out requests on a disk.

use super::{
    handshake::{Agreed, CONTEXT_ID},
    protocol::{
        Command, REQUEST_BYTES_MAX, Request, data_chunk, error, error_chunk, flag, none_chunk, simple_reply,
        status_chunk,
    },
};
use crate::{Disk, DiskError, SectorKind};

/// Runs in one answer about block status.
const STATUS_RUNS_MAX: usize = 1024;
const STATE_HOLE_AND_ZERO: u32 = 3;

/// Why a request failed: the protocol's number, and words.
type Failure = (u32, String);

/// Does what is asked for and returns the whole answer.
pub(super) fn carry_out(disk: &Disk, agreed: Agreed, request: &Request, payload: Vec<u8>) -> Vec<Vec<u8>> {
    let (cookie, structured) = (request.cookie, agreed.structured);
    let failed = |(error, message): Failure| {
        tracing::debug!(?request, message, "an NBD request failed");
        vec![if structured { error_chunk(cookie, error, &message) } else { simple_reply(cookie, error) }]
    };
    let outcome = check(disk, agreed, request).and_then(|()| match request.command {
        Command::Read => {
            let mut bytes = vec![0; request.length as usize];
            disk.read(request.offset, &mut bytes).map_err(failure)?;
            let head = match structured {
                true if bytes.is_empty() => none_chunk(cookie),
                true => data_chunk(cookie, request.offset, request.length),
                false => simple_reply(cookie, 0),
            };
            Ok(vec![head, bytes])
        }
        Command::BlockStatus => status(disk, request).map(|answer| vec![answer]),
        _ => change(disk, request, &payload)
            .map(|()| vec![if structured { none_chunk(cookie) } else { simple_reply(cookie, 0) }]),
    });
    outcome.unwrap_or_else(failed)
}

fn check(disk: &Disk, agreed: Agreed, request: &Request) -> Result<(), Failure> {
    let invalid = |why: &str| Err((error::EINVAL, why.to_owned()));
    let allowed = match request.command {
        Command::Write | Command::Trim | Command::Flush => flag::FUA,
        Command::Read => flag::FUA | if agreed.structured { flag::DF } else { 0 },
        Command::WriteZeroes => flag::FUA | flag::NO_HOLE,
        Command::BlockStatus => flag::FUA | flag::REQ_ONE,
        Command::Disconnect | Command::Other(_) => return invalid("this command is not known here"),
    };
    if request.flags & !allowed != 0 {
        return invalid("the request has flags that were not offered");
    }
    if request.buffer_bytes() > REQUEST_BYTES_MAX {
        return invalid("the request is larger than was offered");
    }
    let changes = matches!(request.command, Command::Write | Command::Trim | Command::WriteZeroes);
    if changes && disk.is_read_only() {
        return Err((error::EPERM, "the export is read-only".into()));
    }
    if request.command == Command::BlockStatus && (!agreed.block_status || request.length == 0) {
        return invalid("block status was not agreed on, or of nothing");
    }
    let end = request.offset.checked_add(u64::from(request.length));
    if request.command != Command::Flush && end.is_none_or(|end| end > disk.size_bytes()) {
        // Writers past the end are told that there is no room, as the protocol has it.
        let number = if changes { error::ENOSPC } else { error::EINVAL };
        return Err((number, "the request is not within the export".into()));
    }
    Ok(())
}

fn change(disk: &Disk, request: &Request, payload: &[u8]) -> Result<(), Failure> {
    let (offset, length) = (request.offset, u64::from(request.length));
    match request.command {
        Command::Write => disk.write(offset, payload),
        Command::Trim => disk.discard(offset, length),
        Command::WriteZeroes if request.flags & flag::NO_HOLE != 0 => write_real_zeros(disk, offset, length),
        Command::WriteZeroes => disk.write_zeroes(offset, length),
        _ => disk.flush(),
    }
    .map_err(failure)?;
    if request.flags & flag::FUA != 0 && request.command != Command::Flush {
        disk.flush().map_err(failure)?;
    }
    Ok(())
}

/// Zeros that take their space now, so that a later write to them finds it.
fn write_real_zeros(disk: &Disk, offset: u64, length: u64) -> crate::Result<()> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    let mut at = offset;
    while at < offset + length {
        let part = (offset + length - at).min(ZEROS.len() as u64);
        disk.write(at, &ZEROS[..part as usize])?;
        at += part;
    }
    Ok(())
}

fn status(disk: &Disk, request: &Request) -> Result<Vec<u8>, Failure> {
    let most = if request.flags & flag::REQ_ONE != 0 { 1 } else { STATUS_RUNS_MAX };
    let runs = disk.status(request.offset, request.length.into(), most).map_err(failure)?;
    let flags = |kind| if kind == SectorKind::Hole { STATE_HOLE_AND_ZERO } else { 0 };
    let runs: Vec<_> = runs.into_iter().map(|(bytes, kind)| (bytes as u32, flags(kind))).collect();
    Ok(status_chunk(request.cookie, CONTEXT_ID, &runs))
}

fn failure(cause: DiskError) -> Failure {
    let number = match &cause {
        DiskError::OutOfRange { .. } => error::EINVAL,
        DiskError::ReadOnly => error::EPERM,
        DiskError::Full { .. } => error::ENOSPC,
        DiskError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => error::ENOSPC,
        _ => error::EIO,
    };
    (number, cause.to_string())
}
