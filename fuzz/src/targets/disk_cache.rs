//! A file of the cache of frames on disk: as it came, and with a header that is right but for what was flipped in it.
use std::{cell::OnceCell, fs};

use dormouse_core::{Codec, FrameHash, FrameRef};

use crate::{disk_cache::DiskCache, input::Input};

thread_local! {
    static CACHE: OnceCell<(tempfile::TempDir, DiskCache)> = const { OnceCell::new() };
}

pub(crate) fn check(bytes: &[u8]) {
    let mut input = Input(bytes);
    let (flipped, as_it_came, says, stored) = (input.u16(), input.bool(), input.u32(), input.rest());
    let hash = FrameHash::of(stored);
    let mut head =
        [&b"DORMFRAM"[..], &1u32.to_le_bytes(), &(stored.len() as u32).to_le_bytes(), &hash.0].concat();
    head.extend(blake3::Hasher::new().update(&head).update(stored).finalize().as_bytes());
    let whole = [&head, stored].concat();
    let mut file = if as_it_came { stored.to_vec() } else { whole.clone() };
    let bits = file.len() * 8;
    if let Some(byte) = file.get_mut(usize::from(flipped) / 8) {
        *byte ^= 1 << (flipped % 8);
    } else if bits > 0 && flipped % 2 == 0 {
        file.pop();
    }
    let stored_bytes = if says % 2 == 0 { stored.len() as u32 } else { says % (1 << 20) };
    let at = FrameRef { pack: 0, offset: 0, stored_bytes, raw_bytes: 4096, codec: Codec::Raw, hash };
    CACHE.with(|cache| {
        let (dir, cache) = cache.get_or_init(|| {
            let dir = tempfile::tempdir().expect("a directory");
            let cache = DiskCache::open(dir.path(), 1 << 20).expect("a cache");
            (dir, cache)
        });
        let path = dir.path().join(format!("{:02x}", hash.0[0])).join(hash.to_string());
        fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        fs::write(&path, &file).expect("written");
        match cache.get(&at) {
            Some(found) => assert!(found == stored && file == whole, "a damaged file is taken for whole"),
            None => {
                assert!(file != whole || stored_bytes as usize != stored.len(), "a whole file is not found")
            }
        }
        let _ = fs::remove_file(path);
    });
}
