//! Hashes that tell things apart. They do not protect from someone who wants two to look alike.

pub(crate) use twox_hash::xxhash3_128::Hasher;

/// A short name for a text, which tells it from others.
pub(crate) fn text_hash(text: &str) -> String {
    hex(Hasher::oneshot(text.as_bytes()))
}

/// A hash as text.
pub(crate) fn hex(hash: u128) -> String {
    format!("{hash:032x}")
}
