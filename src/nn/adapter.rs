//! LoRA adapters: s * B * A beside a frozen weight.
//!
//! LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021. Rank-stabilized
//! scaling: Kalajdzievski, 2023. DoRA, with a magnitude per row: Liu et al., "DoRA:
//! Weight-Decomposed Low-Rank Adaptation", 2024.

use ndarray::{Array2, ArrayViewMut2};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::autograd::Parameter;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::matrix::dequantize::Delta;
use crate::kernels::{expect_2d, expect_shape};
use crate::tensor::{Tensor, element_count};

const OP: &str = "LoRA adapter";

/// Rule that computes the scale s from alpha and rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scaling {
    /// s = alpha / r.
    #[default]
    Standard,
    /// rsLoRA: s = alpha / sqrt(r).
    RankStabilized,
}

/// Initial values of A and B.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoraInit {
    /// PEFT's default: A uniform in +-1 / sqrt(d_in), B zero. The same seed gives the same values
    /// on every platform.
    KaimingUniform {
        /// Seed of the generator (ChaCha8).
        seed: u64,
    },
    /// A\[i\] = 0.01 sin(0.1 i) over the flat index, B zero. Used by the layer that this crate
    /// grew from.
    Sine,
}

/// Settings for a new adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank r, at least 1.
    pub rank: usize,
    /// alpha.
    pub alpha: f32,
    /// Rule for s.
    pub scaling: Scaling,
    /// Probability, in 0..1, of dropping a value of X before A. Applies in training only.
    pub dropout: f32,
    /// Initial values.
    pub init: LoraInit,
    /// DoRA: scales each row of W + s * B * A to a trained magnitude.
    pub dora: bool,
}

impl LoraConfig {
    /// Rank and alpha; standard scaling, no dropout, PEFT's initial values with seed 0, no DoRA.
    pub fn new(rank: usize, alpha: f32) -> Self {
        let init = LoraInit::KaimingUniform { seed: 0 };
        LoraConfig { rank, alpha, scaling: Scaling::Standard, dropout: 0.0, init, dora: false }
    }
}

/// DoRA's magnitude, if the adapter is DoRA.
#[derive(Clone, Debug)]
enum Magnitude {
    /// Plain LoRA.
    None,
    /// To be set to the layer's row norms when the adapter is added to it.
    OfLayer,
    Values(Parameter),
}

/// A pair A [r, d_in], B [d_out, r] on a device, with its scale and, for DoRA, a magnitude
/// `[d_out]`. Clones share the values until either is changed.
#[derive(Clone, Debug)]
pub struct LoraAdapter {
    a: Parameter,
    b: Parameter,
    alpha: f32,
    scaling: Scaling,
    dropout: f32,
    magnitude: Magnitude,
}

impl LoraAdapter {
    /// Creates an adapter for a layer [d_out, d_in].
    ///
    /// # Errors
    /// [`Error::Invalid`] for rank 0, an alpha that isn't finite or a dropout outside 0..1.
    pub fn new(device: &Device, d_out: usize, d_in: usize, config: &LoraConfig) -> Result<LoraAdapter> {
        let rank = config.rank;
        // Check the sizes before allocating anything.
        element_count(&[rank, d_in])?;
        element_count(&[d_out, rank])?;
        let values = || match config.init {
            LoraInit::KaimingUniform { seed } => {
                let mut random = ChaCha8Rng::seed_from_u64(seed);
                let bound = 1.0 / (d_in as f32).sqrt();
                // 24 random bits cover every multiple of 2^-24 in 0..1.
                let uniform = |bits: u32| (bits >> 8) as f32 * (1.0 / 16_777_216.0);
                (0..rank * d_in).map(|_| (2.0 * uniform(random.next_u32()) - 1.0) * bound).collect()
            }
            LoraInit::Sine => (0..rank * d_in).map(|i| (i as f32 * 0.1).sin() * 0.01).collect(),
        };
        let a = Tensor::from_values(device, &[rank, d_in], values)?;
        let b = Tensor::zeros(device, &[d_out, rank])?;
        let adapter = LoraAdapter::from_tensors(a, b, config.alpha, config.scaling)?.with_dropout(config.dropout)?;
        Ok(if config.dora { adapter.with_dora() } else { adapter })
    }

    /// Creates an adapter with these values: A [r, d_in], B [d_out, r], both on one device. No
    /// dropout, no DoRA.
    ///
    /// # Errors
    /// [`Error::Shape`] if the ranks disagree, [`Error::Invalid`] for rank 0 or an alpha that
    /// isn't finite, [`Error::DeviceMismatch`].
    pub fn from_tensors(a: Tensor, b: Tensor, alpha: f32, scaling: Scaling) -> Result<LoraAdapter> {
        let (rank, _) = expect_2d(OP, "A", &a)?;
        let (_, b_rank) = expect_2d(OP, "B", &b)?;
        if rank != b_rank {
            return Err(Error::shape(OP, "rank of B", format!("{rank}, the rank of A"), b_rank));
        }
        if rank == 0 {
            return Err(Error::invalid(OP, "the rank", 0, "it must be at least 1"));
        }
        if !alpha.is_finite() {
            return Err(Error::invalid(OP, "alpha", alpha, "it must be finite"));
        }
        a.device().same(&b.device(), OP)?;
        let (a, b) = (Parameter::new(a), Parameter::new(b));
        Ok(LoraAdapter { a, b, alpha, scaling, dropout: 0.0, magnitude: Magnitude::None })
    }

    /// Sets the dropout probability.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a probability outside 0..1.
    pub fn with_dropout(mut self, probability: f32) -> Result<LoraAdapter> {
        if !(0.0..1.0).contains(&probability) {
            let expected = "it must be at least 0 and less than 1";
            return Err(Error::invalid(OP, "the dropout probability", probability, expected));
        }
        self.dropout = probability;
        Ok(self)
    }

    /// Makes it a DoRA adapter whose magnitude is set when it is added to a layer: to the row
    /// norms of W + s * B * A, so that adding it changes nothing.
    pub fn with_dora(mut self) -> LoraAdapter {
        self.magnitude = Magnitude::OfLayer;
        self
    }

    /// Makes it a DoRA adapter with this magnitude `[d_out]`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DeviceMismatch`].
    pub fn with_magnitude(mut self, magnitude: Tensor) -> Result<LoraAdapter> {
        expect_shape(OP, "magnitude", &magnitude, &[self.d_out()])?;
        self.a.device().same(&magnitude.device(), OP)?;
        self.magnitude = Magnitude::Values(Parameter::new(magnitude));
        Ok(self)
    }

    /// Whether this is a DoRA adapter.
    pub(crate) fn is_dora(&self) -> bool {
        !matches!(self.magnitude, Magnitude::None)
    }

    /// DoRA's magnitude, `[d_out]`; `None` before the adapter is added to a layer.
    pub fn magnitude(&self) -> Option<&Tensor> {
        match &self.magnitude {
            Magnitude::Values(magnitude) => Some(magnitude),
            Magnitude::None | Magnitude::OfLayer => None,
        }
    }

    /// Trained tensors by PEFT's names: "lora_A", "lora_B" and, for DoRA, "lora_magnitude_vector".
    pub fn parameters(&self) -> impl Iterator<Item = (&'static str, &Parameter)> {
        let magnitude = match &self.magnitude {
            Magnitude::Values(magnitude) => Some(("lora_magnitude_vector", magnitude)),
            Magnitude::None | Magnitude::OfLayer => None,
        };
        [("lora_A", &self.a), ("lora_B", &self.b)].into_iter().chain(magnitude)
    }

    /// Like [`LoraAdapter::parameters`], for updates. Keep the shapes: a changed shape makes the
    /// next pass fail.
    pub fn parameters_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut Parameter)> {
        let magnitude = match &mut self.magnitude {
            Magnitude::Values(magnitude) => Some(("lora_magnitude_vector", magnitude)),
            Magnitude::None | Magnitude::OfLayer => None,
        };
        [("lora_A", &mut self.a), ("lora_B", &mut self.b)].into_iter().chain(magnitude)
    }

    /// A, [r, d_in].
    pub fn a(&self) -> &Tensor {
        &self.a
    }

    /// B, [d_out, r].
    pub fn b(&self) -> &Tensor {
        &self.b
    }

    /// Rank r.
    pub fn rank(&self) -> usize {
        self.a.shape()[0]
    }

    /// alpha.
    pub fn alpha(&self) -> f32 {
        self.alpha
    }

    /// s: alpha / r, or alpha / sqrt(r).
    pub fn scale(&self) -> f32 {
        let rank = self.rank() as f32;
        match self.scaling {
            Scaling::Standard => self.alpha / rank,
            Scaling::RankStabilized => self.alpha / rank.sqrt(),
        }
    }

    /// The addition to the base, s * B * A, without DoRA's factor.
    pub(super) fn delta(&self) -> Delta<'_> {
        Delta { a: &self.a, b: &self.b, scale: self.scale() }
    }

    /// Probability of dropping a value of X before A in training.
    pub fn dropout(&self) -> f32 {
        self.dropout
    }

    /// Columns of A.
    pub(crate) fn d_in(&self) -> usize {
        self.a.shape()[1]
    }

    /// Rows of B.
    pub(crate) fn d_out(&self) -> usize {
        self.b.shape()[0]
    }

    /// Number of trainable values.
    pub fn parameter_count(&self) -> usize {
        self.parameters().map(|(_, tensor)| tensor.len()).sum()
    }

    /// Replaces A and B with tensors on the same device. The rank may change; `d_in` and `d_out`
    /// may not. A magnitude is kept.
    ///
    /// # Errors
    /// Same as [`LoraAdapter::from_tensors`]; on an error the adapter is unchanged.
    pub fn replace(&mut self, a: Tensor, b: Tensor) -> Result<()> {
        self.a.device().same(&a.device(), OP)?;
        let new = LoraAdapter::from_tensors(a, b, self.alpha, self.scaling)?;
        if (new.d_out(), new.d_in()) != (self.d_out(), self.d_in()) {
            return Err(Error::shape(
                OP,
                "layer [d_out, d_in]",
                format!("[{}, {}]", self.d_out(), self.d_in()),
                format!("[{}, {}]", new.d_out(), new.d_in()),
            ));
        }
        (*self.a, *self.b) = ((*new.a).clone(), (*new.b).clone());
        Ok(())
    }

    /// Reads A and B back, lets `change` edit them in place, and writes them to the device.
    pub fn edit(&mut self, change: impl FnOnce(ArrayViewMut2<'_, f32>, ArrayViewMut2<'_, f32>)) -> Result<()> {
        let (mut a, mut b) = (self.a.to_array2()?, self.b.to_array2()?);
        change(a.view_mut(), b.view_mut());
        self.replace(self.tensor(&a)?, self.tensor(&b)?)
    }

    fn tensor(&self, array: &Array2<f32>) -> Result<Tensor> {
        Tensor::from_array(&self.a.device(), array)
    }

    /// Copies the adapter to another device.
    pub fn to_device(&self, device: &Device) -> Result<LoraAdapter> {
        let mut moved = self.clone();
        for (_, parameter) in moved.parameters_mut() {
            **parameter = parameter.to_device(device)?;
        }
        Ok(moved)
    }

    /// Bytes of the trained tensors on their device.
    pub(crate) fn resident_bytes(&self) -> u64 {
        self.parameters().map(|(_, tensor)| tensor.resident_bytes()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_follow_rank_and_alpha() {
        let device = Device::cpu();
        let mut config = LoraConfig::new(16, 32.0);
        assert_eq!(LoraAdapter::new(&device, 4, 8, &config).unwrap().scale(), 2.0);
        config.scaling = Scaling::RankStabilized;
        assert_eq!(LoraAdapter::new(&device, 4, 8, &config).unwrap().scale(), 8.0);
    }

    #[test]
    fn initial_values_are_kaiming_uniform_and_reproducible() {
        let device = Device::cpu();
        let new = |seed| {
            let init = LoraInit::KaimingUniform { seed };
            LoraAdapter::new(&device, 3, 400, &LoraConfig { init, ..LoraConfig::new(64, 1.0) }).unwrap()
        };
        let a = new(1).a().to_vec().unwrap();
        let bound = 1.0 / 20.0;
        assert!(a.iter().all(|value| value.abs() <= bound));
        let variance = a.iter().map(|value| f64::from(value * value)).sum::<f64>() / a.len() as f64;
        assert!(
            (variance / (f64::from(bound).powi(2) / 3.0) - 1.0).abs() < 0.02,
            "variance of a uniform distribution: {variance}"
        );
        assert_eq!(a, new(1).a().to_vec().unwrap());
        assert_ne!(a, new(2).a().to_vec().unwrap());
        // Pinned: another generator would break the reproducibility of published runs.
        assert_eq!(a[..3], [0.004_937_821_5, -0.009_751_439, 0.048_459_71]);
        assert!(new(1).b().to_vec().unwrap().iter().all(|&value| value == 0.0));
    }

    #[test]
    fn bad_settings_are_named() {
        let device = Device::cpu();
        let message = |config: &LoraConfig| LoraAdapter::new(&device, 2, 2, config).unwrap_err().to_string();
        assert_eq!(message(&LoraConfig::new(0, 1.0)), "LoRA adapter: the rank is 0; it must be at least 1");
        assert_eq!(message(&LoraConfig::new(1, f32::NAN)), "LoRA adapter: alpha is NaN; it must be finite");
        assert_eq!(
            message(&LoraConfig { dropout: 1.0, ..LoraConfig::new(1, 1.0) }),
            "LoRA adapter: the dropout probability is 1; it must be at least 0 and less than 1"
        );
    }

    #[test]
    fn editing_and_replacing_keep_the_layer_s_shape() {
        let device = Device::cpu();
        let mut adapter = LoraAdapter::new(&device, 2, 3, &LoraConfig::new(1, 1.0)).unwrap();
        adapter
            .edit(|mut a, mut b| {
                a.fill(2.0);
                b[[1, 0]] = 5.0;
            })
            .unwrap();
        assert_eq!((adapter.a().to_vec().unwrap(), adapter.b().to_vec().unwrap()), (vec![2.0; 3], vec![0.0, 5.0]));
        let zeros = |shape: &[usize]| Tensor::zeros(&device, shape).unwrap();
        adapter.replace(zeros(&[4, 3]), zeros(&[2, 4])).unwrap();
        assert_eq!(adapter.rank(), 4);
        assert_eq!(
            adapter.replace(zeros(&[4, 3]), zeros(&[2, 5])).unwrap_err().to_string(),
            "LoRA adapter: rank of B: expected 4, the rank of A, got 5"
        );
        assert_eq!(
            adapter.replace(zeros(&[4, 5]), zeros(&[2, 4])).unwrap_err().to_string(),
            "LoRA adapter: layer [d_out, d_in]: expected [2, 3], got [2, 5]"
        );
        assert_eq!(adapter.d_in(), 3);
    }
}
