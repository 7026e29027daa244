//! Hashes for identification. They are not cryptographic: collisions can be made on purpose.

pub(crate) use twox_hash::xxhash3_128::Hasher;

/// Hash of a text, in hexadecimal.
pub(crate) fn text_hash(text: &str) -> String {
    hex(Hasher::oneshot(text.as_bytes()))
}

/// Hash as 32 hexadecimal digits.
pub(crate) fn hex(hash: u128) -> String {
    format!("{hash:032x}")
}

/// Hasher state for keys of a few words, in maps that are looked up at every dispatch.
pub(crate) type QuickState = std::hash::BuildHasherDefault<Quick>;

/// The hasher of [`QuickState`]: one rotation and one product per word.
#[derive(Default)]
pub(crate) struct Quick(u64);

impl std::hash::Hasher for Quick {
    fn write(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        words.iter().for_each(|word| self.write_u64(u64::from_le_bytes(*word)));
        if !rest.is_empty() {
            let mut word = [0; 8];
            word[..rest.len()].copy_from_slice(rest);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.write_u64(value.into());
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(value.into());
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }

    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }

    fn write_isize(&mut self, value: isize) {
        self.write_u64(value as u64);
    }

    fn finish(&self) -> u64 {
        // The upper bits of a product depend on all bits of its factors; the lower bits don't.
        // Hash maps use bits from both ends.
        self.0.rotate_left(26)
    }
}
