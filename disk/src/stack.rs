//! The layers in a directory: which there are, and what a crash left behind.
//!
//! Layer `n` is three files: `layer-n.map0`, `layer-n.map1`, and `layer-n.data`, which is made last: without it the layer
//! was never finished and holds nothing. It is removed first.

use std::{collections::BTreeSet, sync::Arc};

use dormouse_core::PAGE_BYTES;

use crate::{
    error::{DiskError, Result},
    file::{Directory, DiskFile},
    layer::Layer,
    map::{Header, Identity, MapError, MapLog, Recovered, random_nonce, recover_newest},
    states::PageStates,
};

/// Longest map file that is read: that of 16 TiB in which every second page was written.
const MAP_BYTES_MAX: u64 = 16 << 30;

/// Sealed layers, the lowest first, and the one that takes writes.
pub(crate) struct Stack {
    pub(crate) sealed: Vec<Arc<Layer>>,
    pub(crate) live: Arc<Layer>,
}

/// A layer as it was found.
enum Found {
    Unfinished,
    Whole(Box<Whole>),
}

struct Whole {
    recovered: Recovered,
    active: usize,
    data: Arc<dyn DiskFile>,
    maps: [Arc<dyn DiskFile>; 2],
}

fn data_name(layer: u64) -> String {
    format!("layer-{layer}.data")
}

fn map_name(layer: u64, which: usize) -> String {
    format!("layer-{layer}.map{which}")
}

fn damaged(layer: u64, why: impl Into<String>) -> DiskError {
    DiskError::Damaged { layer, why: why.into() }
}

impl Stack {
    /// Opens the overlay in `directory`, or makes one. Changes nothing before it is sure that the overlay is this disk's.
    pub(crate) fn open(directory: &dyn Directory, identity: &Identity) -> Result<Self> {
        identity.check().map_err(DiskError::Identity)?;
        let mut layers = Vec::new();
        let mut unfinished = Vec::new();
        for number in numbers(directory)? {
            match find(directory, number)? {
                Found::Unfinished => unfinished.push(number),
                Found::Whole(whole) => layers.push(*whole),
            }
        }
        for layer in &layers {
            check_identity(&layer.recovered.header.identity, identity)?;
        }
        let (chain, rest) = chain(layers)?;
        let above = chain.last().map_or(0, |top| top.recovered.header.layer);
        if let Some(number) = unfinished.iter().find(|number| **number < above) {
            return Err(damaged(*number, "its data file is missing, and later layers are there"));
        }
        for number in unfinished.into_iter().chain(rest) {
            remove(directory, number)?;
        }
        let mut sealed = Vec::new();
        let mut live = None;
        for whole in chain {
            let layer = Arc::new(reopen(whole, identity)?);
            sealed.extend(live.replace(layer));
        }
        let live = match live {
            Some(live) => live,
            None => Arc::new(create(directory, identity, 1, 0)?),
        };
        Ok(Stack { sealed, live })
    }
}

/// Numbers of the layers of which there is any file, rising.
fn numbers(directory: &dyn Directory) -> Result<BTreeSet<u64>> {
    let names = directory.list().map_err(DiskError::io("listing"))?;
    let number = |name: String| name.strip_prefix("layer-")?.split_once('.')?.0.parse().ok();
    Ok(names.into_iter().filter_map(number).collect())
}

fn find(directory: &dyn Directory, number: u64) -> Result<Found> {
    let open = |name: String| directory.open(&name).map_err(DiskError::io("opening"));
    let maps = [open(map_name(number, 0))?, open(map_name(number, 1))?];
    let contents = [contents(&maps[0])?, contents(&maps[1])?];
    let recovered = recover_newest([&contents[0], &contents[1]]);
    if let Err(why @ MapError::Foreign(_)) = recovered {
        return Err(DiskError::Foreign(why));
    }
    let data = open(data_name(number))?;
    let length = data.as_ref().map_or(Ok(0), |data| data.length()).map_err(DiskError::io("measuring"))?;
    let Some(data) = data.filter(|_| length > 0) else { return Ok(Found::Unfinished) };
    let (recovered, active) = recovered.map_err(|why| damaged(number, why.to_string()))?;
    if recovered.header.layer != number || length != data_bytes(&recovered.header.identity) {
        return Err(damaged(number, "its files do not belong together"));
    }
    let [Some(first), Some(second)] = maps else { return Err(damaged(number, "a map file is missing")) };
    Ok(Found::Whole(Box::new(Whole { recovered, active, data, maps: [first, second] })))
}

fn contents(file: &Option<Arc<dyn DiskFile>>) -> Result<Vec<u8>> {
    let Some(file) = file else { return Ok(Vec::new()) };
    let length = file.length().map_err(DiskError::io("measuring"))?.min(MAP_BYTES_MAX);
    let mut bytes = vec![0; length as usize];
    file.read_at(&mut bytes, 0).map_err(DiskError::io("reading"))?;
    Ok(bytes)
}

fn data_bytes(identity: &Identity) -> u64 {
    identity.pages() * PAGE_BYTES as u64
}

/// The layers from the lowest to the live one, and the numbers of those that belong to it no more.
fn chain(mut layers: Vec<Whole>) -> Result<(Vec<Whole>, Vec<u64>)> {
    let mut rest = Vec::new();
    let beneath_of = |layer: &Whole| layer.recovered.header.beneath;
    if let Some(top) = layers.last()
        && let Some(below) = layers.iter().find(|layer| layer.recovered.header.layer == beneath_of(top))
        && !below.recovered.sealed
    {
        // A seal broke off before its last step: nothing was written to the layer that was to follow.
        let (number, empty) = (top.recovered.header.layer, top.recovered.states.is_empty());
        if !empty || top.recovered.flush_records > 0 {
            return Err(damaged(number, "it was written to, though the layer beneath it is not sealed"));
        }
        rest.push(number);
        layers.pop();
    }
    let Some(top) = layers.pop() else { return Ok((Vec::new(), rest)) };
    if top.recovered.sealed {
        return Err(damaged(
            top.recovered.header.layer + 1,
            "it is missing, and the layer beneath it is sealed",
        ));
    }
    let mut beneath = beneath_of(&top);
    let mut chain = vec![top];
    while beneath != 0 {
        let at = layers.iter().position(|layer| layer.recovered.header.layer == beneath);
        let layer = at.map(|at| layers.swap_remove(at));
        let layer = layer.ok_or_else(|| damaged(beneath, "it is missing, and later layers are there"))?;
        if !layer.recovered.sealed {
            return Err(damaged(beneath, "it is not sealed, and later layers are there"));
        }
        beneath = beneath_of(&layer);
        chain.push(layer);
    }
    chain.reverse();
    rest.extend(layers.iter().map(|layer| layer.recovered.header.layer));
    Ok((chain, rest))
}

fn check_identity(found: &Identity, wanted: &Identity) -> Result<()> {
    let other = |what: &str| Err(DiskError::OtherOwner(what.to_owned()));
    if found.snapshot != wanted.snapshot {
        return other("another snapshot");
    }
    if found.image != wanted.image {
        return other(&format!("the image {:?}", found.image));
    }
    if found.size_bytes != wanted.size_bytes {
        return other(&format!("a disk of {} bytes", found.size_bytes));
    }
    if found.owner_token > wanted.owner_token {
        return other(&format!("a later owner, with token {}", found.owner_token));
    }
    Ok(())
}

/// Each opening begins a new map file, so that a torn tail is never continued.
fn reopen(whole: Whole, identity: &Identity) -> Result<Layer> {
    let Whole { recovered, active, data, maps } = whole;
    if recovered.sealed {
        return Ok(Layer::sealed(recovered.header.layer, data, recovered.states));
    }
    let nonce = random_nonce().map_err(DiskError::io("opening"))?;
    let generation = recovered.header.generation + 1;
    let header = Header { identity: identity.clone(), generation, nonce, ..recovered.header };
    let map = MapLog::begin(maps, 1 - active, header, &recovered.states);
    Ok(Layer::new(data, map.map_err(DiskError::io("opening"))?, recovered.states))
}

/// Makes an empty layer, durable on return.
pub(crate) fn create(
    directory: &dyn Directory,
    identity: &Identity,
    number: u64,
    beneath: u64,
) -> Result<Layer> {
    remove(directory, number)?;
    let made = || {
        let maps = [directory.create(&map_name(number, 0))?, directory.create(&map_name(number, 1))?];
        let header = Header {
            identity: identity.clone(),
            generation: 1,
            nonce: random_nonce()?,
            layer: number,
            beneath,
        };
        let map = MapLog::begin(maps, 0, header, &PageStates::new())?;
        directory.sync()?;
        let data = directory.create(&data_name(number))?;
        data.truncate(data_bytes(identity))?;
        data.sync()?;
        directory.sync()?;
        Ok(Layer::new(data, map, PageStates::new()))
    };
    made().map_err(DiskError::io("making a layer of"))
}

/// Removes a layer, so that it is unfinished until it is gone.
pub(crate) fn remove(directory: &dyn Directory, number: u64) -> Result<()> {
    let removed = || {
        directory.remove(&data_name(number))?;
        directory.sync()?;
        directory.remove(&map_name(number, 0))?;
        directory.remove(&map_name(number, 1))?;
        directory.sync()
    };
    removed().map_err(DiskError::io("removing a layer of"))
}
