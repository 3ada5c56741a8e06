//! One module a target: what must hold of any bytes.

pub(crate) mod ch_config;
pub(crate) mod ch_protocol;
pub(crate) mod disk_cache;
pub(crate) mod envelope;
pub(crate) mod first_touched;
pub(crate) mod footer;
pub(crate) mod frame;
pub(crate) mod guest_state;
pub(crate) mod http;
pub(crate) mod keeper;
pub(crate) mod kept_states;
pub(crate) mod keyring;
pub(crate) mod name;
pub(crate) mod nbd;
pub(crate) mod overlay_map;
pub(crate) mod pack;
pub(crate) mod reference;
pub(crate) mod regions;
pub(crate) mod root;
pub(crate) mod root_raw;
pub(crate) mod seal;
pub(crate) mod section;
pub(crate) mod stream;
pub(crate) mod trailer;
pub(crate) mod wire;
pub(crate) mod working_set;
