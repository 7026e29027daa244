//! Seeds, and random values by index.

/// Output `index` of splitmix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
/// Generators", 2014) with this seed. The generator's state after any number of steps is known, so
/// each value can be computed on its own.
pub(crate) fn mix(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A permutation of 0..`count`, determined by the seed.
pub(crate) fn shuffled(seed: u64, count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by_key(|&index| mix(seed, index as u64));
    order
}

#[cfg(test)]
mod tests {
    use super::mix;

    #[test]
    fn values_are_those_of_the_generator() {
        // First outputs for seed 1234567, published with the algorithm's reference implementation.
        assert_eq!(mix(1_234_567, 0), 6_457_827_717_110_365_317);
        assert_eq!(mix(1_234_567, 1), 3_203_168_211_198_807_973);
    }
}
