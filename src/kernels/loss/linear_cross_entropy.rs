//! Loss of a language model's head: cross-entropy of X * W^T with labels, and its gradient with
//! respect to X.
//!
//! | letter | meaning | shape |
//! |---|---|---|
//! | X | hidden states | [M, K] |
//! | W | the head, any kind of matrix, whole or in parts | [V, K] |
//! | labels | the token that each row should predict, or [`IGNORE`](super::cross_entropy::IGNORE) | `[M]` |
//!
//! Logits are computed for a chunk of tokens, turned into their own gradient and multiplied by W
//! again: [M, V] is never stored.

use super::cross_entropy::cross_entropy;
use crate::device::Device;
use crate::device::ledger::Part;
use crate::error::Result;
use crate::indices::Indices;
use crate::kernels::matrix::DeviceMatrix;
use crate::kernels::qmatmul::dx::qmatmul_dx;
use crate::kernels::qmatmul::qmatmul;
use crate::kernels::rows::sum::sum;
use crate::kernels::{expect_2d, expect_shape};
use crate::tensor::Tensor;

const OP: &str = "linear_cross_entropy";

/// Maximum size of the logits held at a time, in bytes.
const CHUNK_BYTES: u64 = 32 << 20;
/// If possible, chunks are a multiple of this many rows: whole tiles of the products.
const CHUNK_ROWS: usize = 64;

/// Result of [`linear_cross_entropy`].
pub struct CrossEntropy {
    /// `scale` times the sum of the labelled tokens' losses, `[1]`.
    pub loss: Tensor,
    /// Each token's loss, unscaled, 0 where the label is [`IGNORE`](super::cross_entropy::IGNORE),
    /// `[M]`.
    pub token_losses: Tensor,
    /// Gradient of `loss` with respect to the hidden states, [M, K], if requested.
    pub d_hidden: Option<Tensor>,
}

/// Computes the loss of `hidden` [M, K] with the head `head` [V, K]: `scale` * the sum of `-log
/// softmax(hidden * head^T)[label]` over the tokens whose label counts. `labels` `[M]` are already
/// shifted: a row's label is the next token. A `scale` of 1 gives the sum, 1 / labelled tokens the
/// mean.
///
/// Labels must be less than V or [`IGNORE`](super::cross_entropy::IGNORE); call
/// [`check_labels`](super::cross_entropy::check_labels) before they go to a device. Larger ones
/// count as V - 1.
///
/// # Errors
/// `Error::Shape`(crate::Error::Shape), `Error::DeviceMismatch`(crate::Error::DeviceMismatch),
/// and device errors. Values are not checked: if any is not finite, neither is the loss.
pub fn linear_cross_entropy(
    hidden: &Tensor,
    head: &DeviceMatrix,
    labels: &Indices,
    scale: f32,
    with_grad: bool,
) -> Result<CrossEntropy> {
    let (m, _) = expect_2d(OP, "hidden", hidden)?;
    expect_shape(OP, "hidden", hidden, &[m, head.cols()])?;
    labels.expect_len(OP, "labels", m)?;
    let device = hidden.device();
    device.same(&head.device(), OP)?;
    device.same(&labels.device(), OP)?;

    let mut token_losses = Tensor::zeros(&device, &[m])?;
    let mut d_hidden = if with_grad { Some(Tensor::zeros(&device, hidden.shape())?) } else { None };
    let rows = chunk_rows(&device, head.rows());
    for first in (0..m).step_by(rows) {
        let mut logits = qmatmul(&hidden.rows(first..(first + rows).min(m))?, head, None, None)?;
        logits.count_as(Part::Logits);
        cross_entropy(&mut logits, labels, first, with_grad.then_some(scale), &mut token_losses)?;
        if let Some(d_hidden) = &mut d_hidden {
            d_hidden.set_rows(first, &qmatmul_dx(&logits, head, None)?)?;
        }
    }
    Ok(CrossEntropy { loss: sum(&token_losses, scale)?, token_losses, d_hidden })
}

/// Rows of logits held at a time for a vocabulary of `v`. They take at most half of a binding,
/// which leaves room for other buffers.
fn chunk_rows(device: &Device, v: usize) -> usize {
    let bytes = match device {
        Device::Cpu(_) => CHUNK_BYTES,
        Device::Gpu(gpu) => CHUNK_BYTES.min(gpu.limits().max_binding_bytes / 2),
    };
    let rows = (bytes / (4 * v as u64)).max(1) as usize;
    if rows > CHUNK_ROWS { rows / CHUNK_ROWS * CHUNK_ROWS } else { rows }
}

#[cfg(test)]
mod tests {
    use super::super::cross_entropy::IGNORE;
    use super::*;
    use crate::kernels::loss::cross_entropy;
    use crate::kernels::qmatmul::dx;
    use crate::kernels::qmatmul::{self, dense_of};
    use crate::quant::HostMatrix;
    use crate::testing::tolerances::QMATMUL;
    use crate::testing::{self, wide};

    const SCALE: f32 = 0.125;

    /// Expected losses, d_hidden and their error bounds, for a device whose products have a
    /// relative error of `product`.
    struct Wanted {
        losses: Vec<f64>,
        loss_bounds: Vec<f64>,
        d_hidden: Vec<f64>,
        d_bounds: Vec<f64>,
    }

    /// The formula in f64.
    fn reference(x: &[f64], w: &[f64], labels: &[u32], k: usize, product: f64) -> Wanted {
        let (m, v) = (labels.len(), w.len() / k);
        let (logits, terms) = qmatmul::reference(x, w, [m, v, k], None, None);
        let (losses, gradient) = cross_entropy::reference(&logits, labels, f64::from(SCALE));
        let (d_hidden, d_terms) = dx::reference(&gradient, w, [m, v, k], None);
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
        let w_row = (0..v).map(|j| norm(&mut w[j * k..][..k].iter().copied())).fold(0.0, f64::max);
        let (mut loss_bounds, mut d_bounds) = (Vec::new(), Vec::new());
        for i in 0..m {
            // Absolute error bound of this row's logits. The relative error of a softmax is then
            // twice that.
            let off = QMATMUL.f32.relative * terms[i * v..][..v].iter().fold(0.0, |most: f64, &terms| most.max(terms))
                + product * norm(&mut x[i * k..][..k].iter().copied()) * w_row;
            loss_bounds.push(2.0 * off + 1e-5 * (1.0 + losses[i]));
            let row = norm(&mut gradient[i * v..][..v].iter().copied());
            for j in 0..k {
                let column = norm(&mut w[j..].iter().step_by(k).copied());
                d_bounds.push((2e-5 + 4.0 * off) * d_terms[i * k + j] + product * row * column + 1e-30);
            }
        }
        Wanted { losses, loss_bounds, d_hidden, d_bounds }
    }

    fn labels(m: usize, v: usize) -> Vec<u32> {
        (0..m).map(|i| if i % 4 == 2 { IGNORE } else { (i * 7919 % v) as u32 }).collect()
    }

    fn check(device: &Device, kind: &str, matrix: &HostMatrix, m: usize) {
        let (v, k) = (matrix.rows(), matrix.cols());
        let context = format!("{} {kind} M={m} V={v} K={k}", testing::name(device));
        let x = testing::values(1, m * k, 1.0);
        let labels = labels(m, v);
        let product = if testing::is_f16(device) { QMATMUL.f16.relative } else { 0.0 };
        let wanted = reference(&wide(&x), &dense_of(matrix), &labels, k, product);
        let hidden = Tensor::from_slice(device, &[m, k], &x).unwrap();
        let head = DeviceMatrix::new(device, matrix.clone()).unwrap();
        let labels = Indices::from_slice(device, &labels).unwrap();
        let got = linear_cross_entropy(&hidden, &head, &labels, SCALE, true).unwrap();
        let d_hidden = got.d_hidden.unwrap();
        assert_eq!((got.token_losses.shape(), d_hidden.shape()), (&[m][..], &[m, k][..]));
        testing::assert_close(&context, &got.token_losses.to_vec().unwrap(), &wanted.losses, &wanted.loss_bounds);
        testing::assert_close(&context, &d_hidden.to_vec().unwrap(), &wanted.d_hidden, &wanted.d_bounds);
        let total = f64::from(SCALE) * wanted.losses.iter().sum::<f64>();
        let bound = f64::from(SCALE) * wanted.loss_bounds.iter().sum::<f64>();
        testing::assert_close(&context, &got.loss.to_vec().unwrap(), &[total], &[bound]);
        let alone = linear_cross_entropy(&hidden, &head, &labels, SCALE, false).unwrap();
        assert!(alone.d_hidden.is_none());
        assert_eq!(alone.loss.to_vec().unwrap(), got.loss.to_vec().unwrap(), "{context}: without the gradient");
    }

    fn dense(v: usize, k: usize, name: &str) -> (String, HostMatrix) {
        testing::matrices(3, v, k, 0.5).into_iter().find(|(kind, _)| kind == name).unwrap()
    }

    #[test]
    fn kinds_of_heads_on_every_device_and_tier() {
        // The products' own tests run every kind on every tier; here each kind runs once.
        for (device, name) in testing::devices().iter().zip(["f32", "f16", "bf16", "q8_0"].into_iter().cycle()) {
            let (kind, head) = dense(130, 64, name);
            check(device, &kind, &head, 11);
        }
    }

    #[test]
    fn odd_shapes_and_a_large_vocabulary() {
        for device in testing::devices() {
            for (m, v, k) in [(0, 5, 8), (1, 1, 3), (5, 33, 7), (67, 1000, 40)] {
                let (kind, head) = dense(v, k, "bf16");
                check(&device, &kind, &head, m);
            }
        }
        // A chunk of 128 tokens, and one of 5.
        let (kind, head) = dense(50_000, 8, "f16");
        check(&Device::cpu(), &kind, &head, 133);
    }

    #[test]
    fn chunks_and_parts_under_a_binding_limit() {
        for device in testing::gpus_with(|options| options.max_binding_bytes = Some(64 << 10)) {
            let (kind, head) = dense(1001, 64, "q8_0");
            assert!(DeviceMatrix::new(&device, head.clone()).unwrap().part_count() > 1, "{kind}");
            assert_eq!(chunk_rows(&device, 1001), 8);
            check(&device, &kind, &head, 21);
        }
    }

    #[test]
    fn all_logits_never_exist_at_once() {
        let (m, v, k) = (600, 1000, 32);
        let devices = testing::gpus_with(|options| options.max_binding_bytes = Some(512 << 10));
        for device in devices {
            let (_, head) = dense(v, k, "bf16");
            let head = DeviceMatrix::new(&device, head).unwrap();
            let hidden = Tensor::from_slice(&device, &[m, k], &testing::values(1, m * k, 1.0)).unwrap();
            let labels = Indices::from_slice(&device, &labels(m, v)).unwrap();
            let before = device.memory().live_bytes;
            device.reset_peak();
            linear_cross_entropy(&hidden, &head, &labels, 1.0, true).unwrap();
            let used = device.memory().peak_bytes - before;
            let all = 4 * (m * v) as u64;
            assert!(used < all / 3, "{}: {used} bytes, all logits take {all}", testing::name(&device));
        }
        // The CPU has no binding limit, so it needs a vocabulary this large to make chunks.
        let (m, v, k) = (300, 100_000, 4);
        let device = Device::cpu();
        let head = DeviceMatrix::new(&device, dense(v, k, "bf16").1).unwrap();
        let hidden = Tensor::from_slice(&device, &[m, k], &testing::values(1, m * k, 1.0)).unwrap();
        let labels = Indices::from_slice(&device, &labels(m, v)).unwrap();
        let before = device.memory().live_bytes;
        device.reset_peak();
        linear_cross_entropy(&hidden, &head, &labels, 1.0, true).unwrap();
        let used = device.memory().peak_bytes - before;
        assert!(used < 48 << 20, "cpu: {used} bytes, all logits take {}", 4 * m * v);
    }

    #[test]
    fn chunks_are_whole_tiles_where_they_can_be() {
        let device = Device::cpu();
        let rows = [8, 1000, 49_152, 128_256, 151_936, 10_000_000].map(|v| chunk_rows(&device, v));
        assert_eq!(rows, [1 << 20, 8384 / 64 * 64, 128, 64, 55, 1]);
    }

    #[test]
    fn tokens_that_do_not_count_have_no_loss_and_no_gradient() {
        for device in testing::devices() {
            let head = DeviceMatrix::new(&device, dense(33, 8, "f32").1).unwrap();
            let hidden = Tensor::from_slice(&device, &[9, 8], &testing::values(1, 72, 1.0)).unwrap();
            let labels = Indices::from_slice(&device, &[IGNORE; 9]).unwrap();
            let got = linear_cross_entropy(&hidden, &head, &labels, 1.0, true).unwrap();
            assert_eq!(got.loss.to_vec().unwrap(), [0.0]);
            assert_eq!(got.token_losses.to_vec().unwrap(), [0.0; 9]);
            assert_eq!(got.d_hidden.unwrap().to_vec().unwrap(), [0.0; 72]);
        }
    }

    #[test]
    fn huge_logits_stay_finite() {
        for device in testing::devices() {
            let (v, k) = (40, 32);
            let head = DeviceMatrix::new(&device, dense(v, k, "f32").1).unwrap();
            let hidden = Tensor::from_slice(&device, &[10, k], &testing::values(1, 10 * k, 3e3)).unwrap();
            let labels = Indices::from_slice(&device, &labels(10, v)).unwrap();
            let got = linear_cross_entropy(&hidden, &head, &labels, 1.0, true).unwrap();
            let losses = got.token_losses.to_vec().unwrap();
            assert!(losses.iter().any(|&loss| loss > 5e3), "{losses:?}");
            let all = [losses, got.loss.to_vec().unwrap(), got.d_hidden.unwrap().to_vec().unwrap()].concat();
            assert!(all.iter().all(|value| value.is_finite()), "{}", testing::name(&device));
        }
    }

    #[test]
    fn the_reference_is_the_gradient_of_the_loss() {
        let (m, v, k) = (5, 7, 4);
        let (x, w) = (wide(&testing::values(1, m * k, 1.0)), wide(&testing::values(2, v * k, 1.0)));
        let labels = labels(m, v);
        let gradient = reference(&x, &w, &labels, k, 0.0).d_hidden;
        testing::assert_gradient("hidden", &x, &gradient, |x| {
            f64::from(SCALE) * reference(x, &w, &labels, k, 0.0).losses.iter().sum::<f64>()
        });
    }

    #[test]
    fn shapes_that_disagree_are_named() {
        let device = Device::cpu();
        let head = DeviceMatrix::new(&device, dense(5, 8, "f32").1).unwrap();
        let message = |shape: &[usize], labels: &[u32]| {
            let hidden = Tensor::zeros(&device, shape).unwrap();
            let labels = Indices::from_slice(&device, labels).unwrap();
            linear_cross_entropy(&hidden, &head, &labels, 1.0, true).err().unwrap().to_string()
        };
        assert_eq!(message(&[2, 7], &[1, 2]), "linear_cross_entropy: hidden: expected [2, 8], got [2, 7]");
        assert_eq!(message(&[16], &[1, 2]), "linear_cross_entropy: hidden: expected [rows, columns], got [16]");
        assert_eq!(message(&[2, 8], &[1]), "linear_cross_entropy: labels: expected 2 values, got 1");
    }
}
