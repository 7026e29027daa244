//! ggml's tensor types.

use std::fmt;

/// Type of a tensor's values, with ggml's numbers and names.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[allow(missing_docs, reason = "the names are ggml's")]
pub enum TensorType {
    F32,
    F16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q8_1,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Q8K,
    Iq2Xxs,
    Iq2Xs,
    Iq3Xxs,
    Iq1S,
    Iq4Nl,
    Iq3S,
    Iq2S,
    Iq4Xs,
    I8,
    I16,
    I32,
    I64,
    F64,
    Iq1M,
    Bf16,
    Tq1_0,
    Tq2_0,
    Mxfp4,
}

/// Type, number in a file, name, values per block, bytes per block.
const TYPES: [(TensorType, u32, &str, usize, usize); 32] = [
    (TensorType::F32, 0, "F32", 1, 4),
    (TensorType::F16, 1, "F16", 1, 2),
    (TensorType::Q4_0, 2, "Q4_0", 32, 18),
    (TensorType::Q4_1, 3, "Q4_1", 32, 20),
    (TensorType::Q5_0, 6, "Q5_0", 32, 22),
    (TensorType::Q5_1, 7, "Q5_1", 32, 24),
    (TensorType::Q8_0, 8, "Q8_0", 32, 34),
    (TensorType::Q8_1, 9, "Q8_1", 32, 36),
    (TensorType::Q2K, 10, "Q2_K", 256, 84),
    (TensorType::Q3K, 11, "Q3_K", 256, 110),
    (TensorType::Q4K, 12, "Q4_K", 256, 144),
    (TensorType::Q5K, 13, "Q5_K", 256, 176),
    (TensorType::Q6K, 14, "Q6_K", 256, 210),
    (TensorType::Q8K, 15, "Q8_K", 256, 292),
    (TensorType::Iq2Xxs, 16, "IQ2_XXS", 256, 66),
    (TensorType::Iq2Xs, 17, "IQ2_XS", 256, 74),
    (TensorType::Iq3Xxs, 18, "IQ3_XXS", 256, 98),
    (TensorType::Iq1S, 19, "IQ1_S", 256, 50),
    (TensorType::Iq4Nl, 20, "IQ4_NL", 32, 18),
    (TensorType::Iq3S, 21, "IQ3_S", 256, 110),
    (TensorType::Iq2S, 22, "IQ2_S", 256, 82),
    (TensorType::Iq4Xs, 23, "IQ4_XS", 256, 136),
    (TensorType::I8, 24, "I8", 1, 1),
    (TensorType::I16, 25, "I16", 1, 2),
    (TensorType::I32, 26, "I32", 1, 4),
    (TensorType::I64, 27, "I64", 1, 8),
    (TensorType::F64, 28, "F64", 1, 8),
    (TensorType::Iq1M, 29, "IQ1_M", 256, 56),
    (TensorType::Bf16, 30, "BF16", 1, 2),
    (TensorType::Tq1_0, 34, "TQ1_0", 256, 54),
    (TensorType::Tq2_0, 35, "TQ2_0", 256, 66),
    (TensorType::Mxfp4, 39, "MXFP4", 32, 17),
];

impl TensorType {
    /// Returns the type with this number in a file, if it is known.
    pub(crate) fn from_id(id: u32) -> Option<Self> {
        TYPES.iter().find(|entry| entry.1 == id).map(|entry| entry.0)
    }

    /// Number in a file.
    pub(crate) fn id(self) -> u32 {
        TYPES[self as usize].1
    }

    /// Number of values stored together, within a row.
    pub(crate) fn block(self) -> usize {
        TYPES[self as usize].3
    }

    /// Bytes of a block.
    pub(crate) fn block_bytes(self) -> usize {
        TYPES[self as usize].4
    }

    /// Bytes of this many values, unless they aren't a whole number of blocks or overflow.
    pub(crate) fn bytes(self, values: usize) -> Option<usize> {
        let whole = values.is_multiple_of(self.block());
        whole.then(|| (values / self.block()).checked_mul(self.block_bytes())).flatten()
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(TYPES[*self as usize].2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_variants() {
        for (index, entry) in TYPES.iter().enumerate() {
            assert_eq!(entry.0 as usize, index, "{}", entry.2);
            assert_eq!(TensorType::from_id(entry.0.id()), Some(entry.0));
        }
        assert_eq!(TensorType::from_id(4), None, "Q4_2 is gone");
    }

    #[test]
    fn bytes_are_those_of_whole_blocks() {
        assert_eq!(TensorType::Q4_1.bytes(64), Some(40));
        assert_eq!(TensorType::Q4K.bytes(128), None);
        assert_eq!(TensorType::F64.bytes(usize::MAX / 4), None);
        assert_eq!(TensorType::Q6K.to_string(), "Q6_K");
    }
}
