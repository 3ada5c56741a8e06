//! Every limit of the format in one place. A decoder that meets a larger number reports it and stops.

/// Size a pack is closed at: the first frame that reaches it is its last.
pub const PACK_TARGET_BYTES: usize = 12 << 20;
/// Largest pack a reader accepts.
pub const PACK_BYTES_MAX: u64 = 64 << 20;
/// Largest footer a reader accepts, stored and decoded.
pub const FOOTER_BYTES_MAX: usize = 16 << 20;
/// Most frames in one pack.
pub const PACK_FRAMES_MAX: usize = 1 << 18;
/// Largest metadata frame (a section, or a piece of a device-state blob), raw.
pub const META_FRAME_BYTES_MAX: usize = 4 << 20;
/// Piece size in which device-state blobs are stored.
pub const BLOB_PIECE_BYTES: usize = 1 << 20;
/// Largest device-state blob.
pub const BLOB_BYTES_MAX: u64 = 1 << 30;
/// Most images in one snapshot.
pub const IMAGES_MAX: usize = 256;
/// Most device-state blobs in one snapshot.
pub const BLOBS_MAX: usize = 256;
/// Most labels on one snapshot.
pub const LABELS_MAX: usize = 64;
/// Longest label key or value, in bytes.
pub const LABEL_BYTES_MAX: usize = 1024;
/// Longest snapshot or image name, in bytes.
pub const NAME_BYTES_MAX: usize = 128;
/// Most packs one section or root may refer to.
pub const PACK_TABLE_MAX: usize = 1 << 20;
/// Most sections in all images of one snapshot, absent ones included: 64 TiB. Absent sections cost no bytes in
/// a root, so without this bound a few hundred bytes could ask a reader for gigabytes of table.
pub const SECTIONS_MAX: usize = 1 << 20;
/// Largest decoded root: 64 GiB of memory needs about 80 KiB.
pub const ROOT_BYTES_MAX: usize = 64 << 20;
/// Largest reference object.
pub const REFERENCE_BYTES_MAX: usize = 64 << 10;
