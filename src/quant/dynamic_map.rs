//! The signed dynamic 8-bit map of bitsandbytes ("8-bit Optimizers via Block-wise Quantization",
//! Dettmers et al., 2022): 256 values in [-0.993, 1], denser towards zero.

use std::sync::LazyLock;

/// The map, ascending; the index is the 8-bit code. Entry 127 is 0.0, entry 255 is 1.0.
pub(super) fn dynamic_map() -> &'static [f32; 256] {
    static MAP: LazyLock<[f32; 256]> = LazyLock::new(build);
    &MAP
}

/// For each decade `10^(i-6)`, i in 0..=6: the midpoints of `2^i + 1` points from 0.1 to 1, with
/// both signs; then 0 and 1. The fused multiply-adds and the two halves are those of
/// `torch.linspace`.
fn build() -> [f32; 256] {
    const DECADES: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    let mut map = [0.0; 256];
    map[255] = 1.0;
    // The magnitudes ascend from entry 128 up, and mirrored from entry 126 down.
    let mut rank = 0;
    for (i, decade) in DECADES.into_iter().enumerate() {
        let intervals = 1_usize << i;
        let step = (1.0_f32 - 0.1) / intervals as f32;
        let point = |k: usize| {
            if k < intervals.div_ceil(2) {
                step.mul_add(k as f32, 0.1)
            } else {
                (-step).mul_add((intervals - k) as f32, 1.0)
            }
        };
        for k in 0..intervals {
            let magnitude = (point(k) + point(k + 1)) / 2.0 * decade;
            map[128 + rank] = magnitude;
            map[126 - rank] = -magnitude;
            rank += 1;
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_sorted_and_has_its_landmarks() {
        let map = dynamic_map();
        assert!(map.is_sorted());
        assert_eq!([map[0], map[127], map[255]], [-0.992_968_74, 0.0, 1.0]);
    }
}
