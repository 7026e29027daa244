//! Dropout sets a value to zero with probability p and multiplies the others by 1 / (1 - p).
//! Whether element i of X survives depends on (i, seed) alone, so forward, backward and every
//! device agree without a stored mask.

use rayon::prelude::*;

use crate::error::{Error, Result};

/// Values per task on the CPU for elementwise work.
pub(crate) const CPU_CHUNK: usize = 1 << 14;

/// Dropout of one forward pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability that a value is dropped, in 0..1.
    pub probability: f32,
    /// Another seed drops other values.
    pub seed: u64,
}

impl Dropout {
    /// Returns this dropout, or `None` if it drops nothing.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a probability outside 0..1.
    pub(crate) fn active(self, op: &'static str) -> Result<Option<Dropout>> {
        if !(0.0..1.0).contains(&self.probability) {
            let expected = "it must be at least 0 and less than 1";
            return Err(Error::invalid(op, "the dropout probability", self.probability, expected));
        }
        Ok((self.probability != 0.0).then_some(self))
    }

    /// Returns the parameters of `shaders/shared/dropout.wgsl`: low and high half of the seed, the
    /// hash below which a value is dropped, and the factor of the other values. Without dropout,
    /// they keep everything.
    pub(crate) fn params(dropout: Option<Dropout>) -> (u32, u32, u32, f32) {
        let of = |d: Dropout| (d.seed as u32, (d.seed >> 32) as u32, d.drop_below(), d.keep_scale());
        dropout.map_or((0, 0, 0, 1.0), of)
    }

    /// Writes `values` with dropout to `out`, on all cores.
    pub(crate) fn apply(self, values: &[f32], out: &mut [f32]) {
        let chunks = out.par_chunks_mut(CPU_CHUNK).zip(values.par_chunks(CPU_CHUNK)).enumerate();
        chunks.for_each(|(index, (out, values))| {
            self.factors((index * CPU_CHUNK) as u32, out);
            out.iter_mut().zip(values).for_each(|(out, value)| *out *= value);
        });
    }

    /// Writes the factors of elements from `first` on, as many as `out` holds.
    pub(crate) fn factors(self, first: u32, out: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2.
            unsafe { self.factors_avx2(first, out) };
            return;
        }
        self.factors_plain(first, out);
    }

    /// Without AVX2 four u32 can't be multiplied at a time, and compilers take them one by one.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn factors_avx2(self, first: u32, out: &mut [f32]) {
        self.factors_plain(first, out);
    }

    #[inline(always)]
    fn factors_plain(self, first: u32, out: &mut [f32]) {
        for (i, out) in out.iter_mut().enumerate() {
            *out = self.factor(first.wrapping_add(i as u32));
        }
    }

    /// Values with a hash below this are dropped.
    pub(crate) fn drop_below(self) -> u32 {
        (f64::from(self.probability) * 4_294_967_296.0) as u32
    }

    /// Factor of the values that are kept.
    pub(crate) fn keep_scale(self) -> f32 {
        1.0 / (1.0 - self.probability)
    }

    /// Factor of element `i` of X, row-major: 0 or 1 / (1 - p).
    #[inline]
    pub fn factor(self, i: u32) -> f32 {
        if self.hash(i) >= self.drop_below() { self.keep_scale() } else { 0.0 }
    }

    /// pcg3d (Jarzynski and Olano, "Hash Functions for GPU Rendering", 2020) of (i, seed).
    #[inline]
    fn hash(self, i: u32) -> u32 {
        let step = |v: u32| v.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let (mut x, mut y, mut z) = (step(i), step(self.seed as u32), step((self.seed >> 32) as u32));
        x = x.wrapping_add(y.wrapping_mul(z));
        y = y.wrapping_add(z.wrapping_mul(x));
        z = z.wrapping_add(x.wrapping_mul(y));
        (x, y, z) = (x ^ x >> 16, y ^ y >> 16, z ^ z >> 16);
        x.wrapping_add(y.wrapping_mul(z))
    }
}
