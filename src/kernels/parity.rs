//! Checks that a device computes the same as the CPU: small products, attention, norms, rotations
//! and losses of a training step, forward and backward, in the device's own tier. Runs once per
//! driver version, before anything else runs there.

use crate::device::{Device, Gpu, Tier};
use crate::error::Result;
use crate::indices::Indices;
use crate::kernels::attention::backward::attention_backward;
use crate::kernels::attention::visibility::Visibility;
use crate::kernels::attention::{AttentionShape, attention};
use crate::kernels::elementwise::rope::{RopeConfig, RopeLayout, RopeScaling, RopeTable};
use crate::kernels::elementwise::rope_append::rope_append;
use crate::kernels::elementwise::silu_mul::silu_mul;
use crate::kernels::elementwise::silu_mul_backward::silu_mul_backward;
use crate::kernels::lora::dh::lora_dh;
use crate::kernels::lora::down::lora_down;
use crate::kernels::lora::dw::lora_dw;
use crate::kernels::loss::linear_cross_entropy::linear_cross_entropy;
use crate::kernels::qmatmul::dx::{self, LoraDx, qmatmul_dx};
use crate::kernels::qmatmul::qmatmul;
use crate::kernels::rows::rms_norm::rms_norm;
use crate::kernels::rows::rms_norm_backward::{self, rms_norm_backward};
use crate::kernels::{DeviceMatrix, LoraUp, RowFactors, Rows};
use crate::quant::HostMatrix;
use crate::quant::{QuantOptions, QuantizedMatrix};
use crate::seed::mix;
use crate::tensor::Tensor;

/// Tokens: more than a tile of 64, and not a multiple of any tile.
const M: usize = 70;
const N: usize = 96;
const K: usize = 128;
const RANK: usize = 8;

/// Returns the kernel whose results differ most from the CPU's, if rounding doesn't explain the
/// difference: its name and the error.
///
/// # Errors
/// Errors of either device.
pub(crate) fn disagreement(gpu: &Gpu) -> Result<Option<String>> {
    // Cooperative attention has a different layout for large heads.
    let head_dims: &[usize] = if gpu.cooperative().is_some() { &[64, 128] } else { &[64] };
    let wanted = results(&Device::cpu(), head_dims)?;
    let found = results(&Device::Gpu(gpu.clone()), head_dims)?;
    let errors = wanted.iter().zip(&found).map(|((name, wanted), (_, found))| (*name, relative_error(found, wanted)));
    let worst = errors.max_by(|(_, one), (_, other)| one.total_cmp(other));
    Ok(worst.filter(|(_, error)| *error > allowed(gpu.tier())).map(|(name, error)| {
        format!("{name} is off by {error:.1e} of the largest value, but rounding explains {:.0e}", allowed(gpu.tier()))
    }))
}

/// Allowed error relative to the largest value of a result. It covers f32 sums in another order,
/// or f16 operands.
fn allowed(tier: Tier) -> f64 {
    if tier.f16() { 1e-2 } else { 1e-4 }
}

/// Error relative to the largest wanted value; infinite if lengths differ or a value is not
/// finite.
fn relative_error(found: &[f32], wanted: &[f32]) -> f64 {
    if found.len() != wanted.len() || found.iter().any(|value| !value.is_finite()) {
        return f64::INFINITY;
    }
    let largest = wanted.iter().fold(f64::MIN_POSITIVE, |most, value| most.max(f64::from(value.abs())));
    let error = |(found, wanted): (&f32, &f32)| f64::from((found - wanted).abs());
    found.iter().zip(wanted).map(error).fold(0.0, f64::max) / largest
}

/// Values in -1..1.
fn values(seed: u64, len: usize) -> Vec<f32> {
    (0..len as u64).map(|i| (mix(seed, i) >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
}

fn results(device: &Device, head_dims: &[usize]) -> Result<Vec<(&'static str, Vec<f32>)>> {
    let tensor = |seed, shape: [usize; 2]| Tensor::from_slice(device, &shape, &values(seed, shape[0] * shape[1]));
    let matrix =
        QuantizedMatrix::quantize(values(1, N * K).as_slice().into(), N, K, &QuantOptions::nf4().double_quant())?;
    let w = DeviceMatrix::new(device, HostMatrix::Quantized(matrix))?;
    let (x, a, b) = (tensor(2, [M, K])?, tensor(3, [RANK, K])?, tensor(4, [N, RANK])?);
    let dy = tensor(5, [M, N])?;

    let h = lora_down(&x, &a, None)?;
    let y = qmatmul(&x, &w, None, Some(LoraUp { h: &h, b: &b, scale: 0.5 }))?;
    let (one, one_h) = (tensor(6, [1, K])?, tensor(7, [1, RANK])?);
    let y_of_one = qmatmul(&one, &w, None, Some(LoraUp { h: &one_h, b: &b, scale: 0.5 }))?;
    // In training and generation, products also add residuals and sums of gradients.
    let y_beside = qmatmul(&x, &w, Some(&dy), Some(LoraUp { h: &h, b: &b, scale: 0.5 }))?;
    let one_beside = qmatmul(&one, &w, Some(&tensor(13, [1, N])?), None)?;
    let g = lora_dh(&dy, &b, 0.5)?;
    let lora_dx = LoraDx { g: &g, a: &a, dropout: None };
    let dx = qmatmul_dx(&dy, &w, Some(lora_dx))?;
    let rows = Rows { tensor: &dy, factors: &RowFactors::default() };
    let dx_sum = dx::onto(Some(x.clone()), rows, &w, Some(lora_dx))?;
    let d_a = lora_dw(&g, &x, 1.0, None)?;
    let d_b = lora_dw(&dy, &h, 0.5, None)?;

    let weight = Tensor::from_slice(device, &[K], &values(8, K))?;
    let normed = rms_norm(&x, &weight, 1e-5)?;
    let d_normed = rms_norm_backward(&normed, &x, &weight, 1e-5)?;
    let d_normed_sum = rms_norm_backward::onto(Some(normed.clone()), &normed, &x, &weight, 1e-5)?;
    let (gate, up) = (tensor(14, [M, N])?, tensor(15, [M, N])?);
    let hidden = silu_mul(&gate, &up)?;
    let (d_gate, d_up) = silu_mul_backward(&dy, &gate, &up)?;

    let rope = RopeConfig { theta: 1e4, head_dim: 32, scaling: RopeScaling::None, layout: RopeLayout::HalfSplit };
    let table = RopeTable::new(device, &rope, M + 2)?;
    let [mut keys, mut values] = [tensor(16, [M + 2, 32])?, tensor(17, [M + 2, 32])?];
    let new = [&tensor(18, [M, 64])?, &tensor(19, [M, 32])?, &tensor(20, [M, 32])?];
    let queries = rope_append([&mut keys, &mut values], 2, new, &table)?;

    let labels: Vec<u32> = (0..M).map(|i| (i * 7 % N) as u32).collect();
    let losses = linear_cross_entropy(&x, &w, &Indices::from_slice(device, &labels)?, 1.0, true)?;

    let seen = Visibility::causal(device, &[0; M], M, None)?;
    let mut attentions = Vec::new();
    for &head_dim in head_dims {
        let shape = AttentionShape { heads: 2, kv_heads: 1, head_dim, scale: 0.125 };
        let (wide, narrow) = ([M, 2 * head_dim], [M, head_dim]);
        let (q, k, v) = (tensor(9, wide)?, tensor(10, narrow)?, tensor(11, narrow)?);
        let attended = attention(&q, &k, &v, &shape, &seen)?;
        let grads = attention_backward(&tensor(12, wide)?, &q, &k, &v, &attended, &shape, &seen)?;
        attentions.extend([
            ("attention", attended.o),
            ("the gradient of attention's queries", grads.dq),
            ("the gradient of attention's keys", grads.dk),
            ("the gradient of attention's values", grads.dv),
        ]);
    }

    let d_hidden = losses.d_hidden.map(|gradient| ("cross-entropy's gradient", gradient));
    [
        ("H of the adapter", h),
        ("the product", y),
        ("the product of one row", y_of_one),
        ("the product with a residual", y_beside),
        ("the product of one row with a residual", one_beside),
        ("G of the adapter", g),
        ("the input's gradient", dx),
        ("the input's gradient, added to another", dx_sum),
        ("A's gradient", d_a),
        ("B's gradient", d_b),
        ("rms_norm", normed),
        ("rms_norm's gradient", d_normed),
        ("rms_norm's gradient, added to another", d_normed_sum),
        ("silu", hidden),
        ("the gate's gradient", d_gate),
        ("silu's other gradient", d_up),
        ("rotated queries", queries),
        ("a cache's keys", keys),
        ("a cache's values", values),
        ("cross-entropy", losses.token_losses),
    ]
    .into_iter()
    .chain(attentions)
    .chain(d_hidden)
    .map(|(name, result)| Ok((name, result.to_vec()?)))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn every_device_agrees_in_every_tier() {
        for device in testing::gpus() {
            let Device::Gpu(gpu) = &device else { continue };
            assert_eq!(disagreement(gpu).unwrap(), None, "{}", testing::name(&device));
        }
    }

    #[test]
    fn what_is_wrong_is_far_from_what_is_allowed() {
        let right = values(1, 1000);
        assert_eq!(relative_error(&right, &right), 0.0);
        let with = |change: fn(&mut Vec<f32>)| {
            let mut wrong = right.clone();
            change(&mut wrong);
            relative_error(&wrong, &right)
        };
        // A part of a tile that wasn't computed, swapped values, a NaN.
        assert!(with(|wrong| wrong[500..516].fill(0.0)) > 0.1);
        assert!(with(|wrong| wrong.rotate_left(1)) > 0.1);
        assert_eq!(with(|wrong| wrong[7] = f32::NAN), f64::INFINITY);
        assert_eq!(with(|wrong| wrong.truncate(999)), f64::INFINITY);
    }
}
