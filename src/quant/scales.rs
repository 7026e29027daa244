use std::ops::Range;

use super::dynamic_map::dynamic_map;

/// One number per block of weights: its scale, or its minimum.
#[derive(Clone, PartialEq, Debug)]
pub enum Scales {
    /// Stored directly.
    Plain(Vec<f32>),
    /// Quantized once more, to 8 bits.
    Double(DoubleScales),
}

impl Scales {
    /// Number of blocks.
    pub fn len(&self) -> usize {
        match self {
            Scales::Plain(values) => values.len(),
            Scales::Double(double) => double.codes.len(),
        }
    }

    /// Whether there are no blocks.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the scale of block `b`. A double-quantized one is `table[code] * super`, rounded to
    /// f32, plus `offset`, rounded again. The two are never fused, so that every device can give
    /// the same bits.
    ///
    /// # Panics
    /// If `b` is not less than [`len`](Self::len).
    pub fn get(&self, b: usize) -> f32 {
        match self {
            Scales::Plain(values) => values[b],
            Scales::Double(double) => double.get(b),
        }
    }

    /// Writes the scales of `blocks` to `out`, which has the same length.
    ///
    /// # Panics
    /// If `blocks` is out of range or `out` has another length.
    pub(crate) fn decode_into(&self, blocks: Range<usize>, out: &mut [f32]) {
        match self {
            Scales::Plain(values) => out.copy_from_slice(&values[blocks]),
            Scales::Double(double) => {
                assert_eq!(blocks.len(), out.len(), "one scale per block");
                for (value, b) in out.iter_mut().zip(blocks) {
                    *value = double.get(b);
                }
            }
        }
    }

    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Scales::Plain(_) => self.stored_bytes(),
            Scales::Double(double) => self.stored_bytes() + size_of_val(&*double.table),
        }
    }

    /// Bytes that grow with the matrix: everything but the 256-entry table, which is a constant of
    /// the format.
    pub(super) fn stored_bytes(&self) -> usize {
        match self {
            Scales::Plain(values) => size_of_val(&values[..]),
            Scales::Double(double) => {
                double.codes.len() + size_of_val(&double.supers[..]) + size_of_val(&double.offset)
            }
        }
    }
}

/// Scales in 8 bits: `scale[b] = table[codes[b]] * supers[b / super_block] + offset`.
#[derive(Clone, PartialEq, Debug)]
pub struct DoubleScales {
    /// One code per block of weights.
    pub codes: Vec<u8>,
    /// The values that codes stand for, before the super-scale.
    pub table: Box<[f32; 256]>,
    /// One super-scale per `super_block` codes; the last group may be short.
    pub supers: Vec<f32>,
    /// Codes per super-scale.
    pub super_block: usize,
    /// Added to every scale.
    pub offset: f32,
}

impl DoubleScales {
    /// Codes per super-scale in this crate's quantizers.
    pub(crate) const SUPER_BLOCK: usize = 256;

    /// bitsandbytes' scheme: subtracts the mean, divides each group of 256 by its largest
    /// magnitude, and rounds to the nearest entry of the signed dynamic map (the lower one if two
    /// are equally near).
    pub(crate) fn dynamic(scales: &[f32]) -> Self {
        let table = dynamic_map();
        let sum: f64 = scales.iter().map(|&s| f64::from(s)).sum();
        let offset = (sum / scales.len().max(1) as f64) as f32;
        let mut codes = Vec::with_capacity(scales.len());
        let mut supers = Vec::with_capacity(scales.len().div_ceil(Self::SUPER_BLOCK));
        for group in scales.chunks(Self::SUPER_BLOCK) {
            let absmax = group.iter().fold(0.0_f32, |max, s| max.max((s - offset).abs()));
            let reciprocal = 1.0 / absmax.max(f32::MIN_POSITIVE);
            codes.extend(group.iter().map(|s| nearest(table, (s - offset) * reciprocal)));
            supers.push(absmax);
        }
        let table = Box::new(*table);
        DoubleScales { codes, table, supers, super_block: Self::SUPER_BLOCK, offset }
    }

    /// The linear scheme of entrenar: each group of 256 non-negative scales becomes
    /// `code / 255 * super`, where `super` is the group's largest scale (at least 1e-8).
    pub(crate) fn linear(scales: &[f32]) -> Self {
        let mut codes = Vec::with_capacity(scales.len());
        let mut supers = Vec::with_capacity(scales.len().div_ceil(Self::SUPER_BLOCK));
        for group in scales.chunks(Self::SUPER_BLOCK) {
            let largest = group.iter().fold(1e-8_f32, |max, &s| max.max(s));
            // `as u8` saturates, which is the clamp to 0..=255.
            codes.extend(group.iter().map(|s| (s / largest * 255.0).round() as u8));
            supers.push(largest);
        }
        let table = Box::new(std::array::from_fn(|code| code as f32 / 255.0));
        DoubleScales { codes, table, supers, super_block: Self::SUPER_BLOCK, offset: 0.0 }
    }

    fn get(&self, b: usize) -> f32 {
        self.table[usize::from(self.codes[b])] * self.supers[b / self.super_block] + self.offset
    }
}

/// Returns the index of the nearest entry to `value` in the ascending `table`.
fn nearest(table: &[f32; 256], value: f32) -> u8 {
    let above = table.partition_point(|&entry| entry < value).clamp(1, 255);
    // In f64 the differences are exact, so a tie is a true tie.
    let [value, low, high] = [value, table[above - 1], table[above]].map(f64::from);
    let index = if value - low <= high - value { above - 1 } else { above };
    index as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_takes_the_nearer_entry_and_the_lower_of_a_tie() {
        let table = std::array::from_fn(|i| i as f32);
        let cases = [(-5.0, 0), (0.0, 0), (0.5, 0), (0.500_1, 1), (1.0, 1), (254.5, 254), (254.6, 255), (300.0, 255)];
        for (value, expected) in cases {
            assert_eq!(nearest(&table, value), expected, "{value}");
        }
    }

    #[test]
    fn dynamic_reconstructs_within_half_a_step() {
        let scales: Vec<f32> = (0..600).map(|i| (i as f32 * 0.37).sin().abs() * 0.1).collect();
        let double = DoubleScales::dynamic(&scales);
        assert_eq!((double.codes.len(), double.supers.len(), double.super_block), (600, 3, 256));
        for (b, scale) in scales.iter().enumerate() {
            // The widest step of the map is 0.9 / 64.
            let bound = 0.9 / 128.0 * double.supers[b / 256] * 1.000_01;
            assert!((double.get(b) - scale).abs() <= bound, "{b}: {} {scale}", double.get(b));
        }
    }

    #[test]
    fn equal_and_absent_scales_leave_only_the_offset() {
        let double = DoubleScales::dynamic(&[0.25; 300]);
        assert_eq!((double.offset, &double.supers[..]), (0.25, &[0.0, 0.0][..]));
        assert!((0..300).all(|b| double.get(b) == 0.25));
        assert_eq!(DoubleScales::dynamic(&[]).offset, 0.0);
        assert_eq!(DoubleScales::linear(&[]).supers.len(), 0);
    }

    #[test]
    fn linear_is_a_fraction_of_the_largest() {
        let double = DoubleScales::linear(&[0.0, 1.0, 2.0, 4.0]);
        assert_eq!(double.codes, [0, 64, 128, 255]);
        assert_eq!(double.get(1), 64.0 / 255.0 * 4.0);
        assert_eq!(DoubleScales::linear(&[0.0]).supers, [1e-8]);
    }

    #[test]
    fn decode_into_equals_get() {
        let values: Vec<f32> = (0..300).map(|i| 1.0 + i as f32).collect();
        for scales in [Scales::Double(DoubleScales::dynamic(&values)), Scales::Plain(values)] {
            let mut out = [0.0; 40];
            scales.decode_into(240..280, &mut out);
            assert!(out.iter().enumerate().all(|(i, &scale)| scale == scales.get(240 + i)));
        }
    }

    #[test]
    fn bytes_count_every_field() {
        let values = [1.0; 300];
        assert_eq!(Scales::Plain(values.to_vec()).bytes(), 1200);
        assert_eq!(Scales::Double(DoubleScales::dynamic(&values)).bytes(), 300 + 1024 + 2 * 4 + 4);
    }
}
