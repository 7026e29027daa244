//! The backward of [`attention`](crate::kernels::attention). With P = exp(scale * Q * K^T - lse),
//! recomputed, and delta the sum over d of dO * O for each query and head (Dao,
//! "FlashAttention-2", 2023):
//!
//! dV = P^T * dO, dS = P * (dO * V^T - delta), dQ = scale * dS * K, dK = scale * dS^T * Q.
//!
//! On a GPU, one pass over queries computes dQ and one over keys computes dK and dV. Both use
//! cooperative matrices where the forward does. Sums across threads always have the same order.

pub(crate) mod call;
pub(crate) mod delta;
pub(crate) mod dkv;
pub(crate) mod dkv_coop;
pub(crate) mod dkv_lanes;
pub(crate) mod dkv_tile;
pub(crate) mod dq;
pub(crate) mod dq_coop;
pub(crate) mod dq_lanes;
pub(crate) mod dq_tile;

use self::call::GpuCall;
use super::call::{Attended, AttentionShape, expect_qkv};
use super::form::{Form, Pass};
use super::pack::{self, Packed};
use super::visibility::Visibility;
use super::{cpu, lanes};
use crate::device::Tier;
use crate::error::Result;
use crate::kernels::expect_shape;
use crate::tensor::{Storage, Tensor};

const OP: &str = "attention backward";

/// Result of [`attention_backward`].
#[derive(Clone, Debug)]
pub struct AttentionGrads {
    /// Gradient of Q, [M, H * D].
    pub dq: Tensor,
    /// Gradient of K, [keys, Hkv * D].
    pub dk: Tensor,
    /// Gradient of V, [keys, Hkv * D].
    pub dv: Tensor,
}

/// Returns the gradients of Q, K and V. `d_o` [M, H * D] is the gradient of O; the other arguments
/// are those of [`attention`](crate::kernels::attention::attention) and its result.
///
/// # Errors
/// Like [`attention`](crate::kernels::attention::attention).
pub fn attention_backward(
    d_o: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    attended: &Attended,
    shape: &AttentionShape,
    visibility: &Visibility,
) -> Result<AttentionGrads> {
    expect_qkv(OP, [q, k, v], shape, visibility)?;
    let Attended { o, lse } = attended;
    expect_shape(OP, "dO", d_o, q.shape())?;
    expect_shape(OP, "O", o, q.shape())?;
    expect_shape(OP, "the log-sum-exp", lse, &[visibility.queries(), shape.heads])?;
    let device = q.device();
    [d_o, o, lse].iter().try_for_each(|tensor| device.same(&tensor.device(), OP))?;
    match q.storage() {
        Storage::Cpu(cpu, q_values) => {
            let (mut dq, mut dk, mut dv) = (cpu.zeros(q.len())?, cpu.zeros(k.len())?, cpu.zeros(v.len())?);
            let mut deltas = cpu.zeros(lse.len())?;
            delta::deltas(d_o.host(OP)?, o.host(OP)?, shape.head_dim, &mut deltas);
            let call = cpu::Backward {
                cpu,
                q: q_values,
                k: k.host(OP)?,
                v: v.host(OP)?,
                d_o: d_o.host(OP)?,
                lse: lse.host(OP)?,
                deltas: &deltas,
                shape,
                visibility,
            };
            call.run(&mut dq, &mut dk, &mut dv)?;
            Ok(AttentionGrads {
                dq: Tensor::from_host(cpu, q.shape(), dq),
                dk: Tensor::from_host(cpu, k.shape(), dk),
                dv: Tensor::from_host(cpu, v.shape(), dv),
            })
        }
        Storage::Gpu(gpu, _) => {
            if visibility.queries() == 0 {
                let zeros = |like: &Tensor| Tensor::zeros(&device, like.shape());
                return Ok(AttentionGrads { dq: zeros(q)?, dk: zeros(k)?, dv: zeros(v)? });
            }
            let uninit = |what, like: &Tensor| Tensor::uninit(gpu, what, like.shape());
            let grads = AttentionGrads { dq: uninit("dq", q)?, dk: uninit("dk", k)?, dv: uninit("dv", v)? };
            let stats = delta::dispatch(gpu, d_o, o, lse, shape.head_dim)?;
            let call = GpuCall { op: OP, gpu, tensors: [q, k, v, d_o], stats: &stats, shape, visibility };
            if lanes::fits(gpu, shape.head_dim) {
                dq_lanes::dispatch(&call, &grads.dq)?;
                dkv_lanes::dispatch(&call, &grads.dk, &grads.dv)?;
            } else if gpu.tier() == Tier::Software {
                dq::dispatch(&call, &grads.dq)?;
                dkv::dispatch(&call, &grads.dk, &grads.dv)?;
            } else if let Some(cooperative) = pack::cooperative(gpu, shape, visibility) {
                let packed = Packed::new(gpu, OP, [q, k, v], Some(d_o), shape, visibility)?;
                let form = |pass| Form::of(pass, gpu, cooperative, shape.head_dim);
                dq_coop::dispatch(&call, &packed, form(Pass::Dq), &grads.dq)?;
                dkv_coop::dispatch(&call, &packed, form(Pass::Dkv), [&grads.dk, &grads.dv])?;
            } else {
                dq_tile::dispatch(&call, &grads.dq)?;
                dkv_tile::dispatch(&call, &grads.dk, &grads.dv)?;
            }
            Ok(grads)
        }
        Storage::Planned(cpu, _) => {
            let [dq, dk, dv] = [q, k, v].map(|like| Tensor::planned(cpu, like.shape()));
            let grads = AttentionGrads { dq: dq?, dk: dk?, dv: dv? };
            let _deltas = Tensor::planned(cpu, lse.shape())?;
            cpu::backward_scratch(shape, visibility).take(cpu);
            Ok(grads)
        }
    }
}

/// The formula, for any real type. Returns dQ, dK and dV.
#[cfg(test)]
pub(crate) fn reference<T: crate::kernels::Real>(
    d_o: &[T],
    [q, k, v]: [&[T]; 3],
    (o, lse): (&[T], &[T]),
    shape: &AttentionShape,
    visibility: &Visibility,
) -> [Vec<T>; 3] {
    let AttentionShape { heads, kv_heads, head_dim, .. } = *shape;
    let scale = T::of(shape.scale);
    let deltas = delta::reference(d_o, o, head_dim);
    let [mut dq, mut dk, mut dv] = [q, k, v].map(|values| vec![T::zero(); values.len()]);
    for (row, (&lse, &delta)) in lse.iter().zip(&deltas).enumerate() {
        let (query, head) = (row / heads, row % heads);
        let own = row * head_dim;
        for key in visibility.of_query(query) {
            let at = (key * kv_heads + head / shape.group()) * head_dim;
            let dot = |left: &[T], right: &[T]| (0..head_dim).map(|d| left[own + d] * right[at + d]).sum::<T>();
            let weight = (scale * dot(q, k) - lse).exp();
            let d_score = weight * (dot(d_o, v) - delta);
            for d in 0..head_dim {
                dq[own + d] += scale * d_score * k[at + d];
                dk[at + d] += scale * d_score * q[own + d];
                dv[at + d] += weight * d_o[own + d];
            }
        }
    }
    [dq, dk, dv]
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::Device;
    use crate::kernels::attention::reference as forward_reference;
    use crate::kernels::attention::tests::{Case, any_ranges, forms, widen};
    use crate::testing;
    use crate::testing::tolerances::ATTENTION_GRADIENTS;

    fn gradients(case: &Case, device: &Device, d_o: &[f32]) -> [Vec<f32>; 3] {
        let ([q, k, v], visibility) = (case.qkv(device), case.visibility(device));
        let d_o = case.tensor(device, case.shape.heads, d_o);
        let attended = case.attend(device);
        let grads = attention_backward(&d_o, &q, &k, &v, &attended, &case.shape, &visibility).unwrap();
        [grads.dq, grads.dk, grads.dv].map(|grad| grad.to_vec().unwrap())
    }

    /// Sums of the absolute values of the terms that [`reference`] adds up.
    fn terms(d_o: &[f64], [q, k, v]: [&[f64]; 3], (o, lse): (&[f64], &[f64]), case: &Case) -> [Vec<f64>; 3] {
        let AttentionShape { heads, kv_heads, head_dim, scale } = case.shape;
        let scale = f64::from(scale);
        let [mut dq, mut dk, mut dv] = [q, k, v].map(|values| vec![0.0; values.len()]);
        for (row, lse) in lse.iter().enumerate() {
            let own = row * head_dim..(row + 1) * head_dim;
            let (first, end) = case.ranges[row / heads];
            for key in first as usize..end as usize {
                let at = (key * kv_heads + row % heads / case.shape.group()) * head_dim;
                let at = at..at + head_dim;
                let dot = |left: &[f64], right: &[f64]| left.iter().zip(right).map(|(l, r)| l * r).sum::<f64>();
                let size =
                    |left: &[f64], right: &[f64]| left.iter().zip(right).map(|(l, r)| (l * r).abs()).sum::<f64>();
                let weight = (scale * dot(&q[own.clone()], &k[at.clone()]) - lse).exp();
                let d_weight = size(&d_o[own.clone()], &v[at.clone()]) + size(&d_o[own.clone()], &o[own.clone()]);
                for (i, j) in own.clone().zip(at) {
                    dq[i] += scale * weight * d_weight * k[j].abs();
                    dk[j] += scale * weight * d_weight * q[i].abs();
                    dv[j] += weight * d_o[i].abs();
                }
            }
        }
        [dq, dk, dv]
    }

    fn check(case: &Case, device: &Device) {
        check_of(case, &testing::values(99, case.q.len(), 1.0), device);
    }

    fn check_of(case: &Case, d_o: &[f32], device: &Device) {
        let got = gradients(case, device, d_o);
        let ([q, k, v], visibility) = (case.wide(), case.visibility(&Device::cpu()));
        let qkv = [&q[..], &k, &v];
        let (o, lse) = forward_reference(qkv, &case.shape, &visibility);
        let d_o = widen(d_o);
        let wanted = reference(&d_o, qkv, (&o, &lse), &case.shape, &visibility);
        let terms = terms(&d_o, qkv, (&o, &lse), case);
        for (what, ((got, wanted), terms)) in ["dQ", "dK", "dV"].iter().zip(got.iter().zip(&wanted).zip(&terms)) {
            // In f16 there are at most five roundings, and values far smaller than the largest may
            // be lost.
            let bound = ATTENTION_GRADIENTS.of(case.is_f16(device));
            let lost = bound.absolute * terms.iter().fold(0.0, |most: f64, terms| most.max(*terms));
            let bounds: Vec<f64> = terms.iter().map(|terms| bound.relative * terms + lost + 1e-30).collect();
            testing::assert_close(&format!("{what} {}", case.name(device)), got, wanted, &bounds);
        }
    }

    pub fn twin(device: &Device) {
        let segments = [[1; 70].as_slice(), &[2; 30]].concat();
        check(&Case::causal([4, 2, 16], &segments, 100, Some(40)), device);
    }

    /// Heads that don't fill whole registers.
    pub fn twin_of_odd_heads(device: &Device) {
        check(&Case::causal([4, 2, 12], &[1; 100], 50, None), device);
    }

    /// Too few queries for cooperative matrices.
    pub fn twin_of_few_queries(device: &Device) {
        check(&Case::new([4, 2, 16], &[(0, 68), (0, 69), (5, 70)], 70, 3), device);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]
        #[test]
        fn any_ranges_on_every_form(
            (ranges, keys) in any_ranges(),
            kv_heads in 1..=3usize,
            group in 1..=3usize,
            head_dim in prop_oneof![Just(8usize), Just(64), Just(44)],
            seed in 0..1000u64,
        ) {
            for device in forms() {
                check(&Case::new([kv_heads * group, kv_heads, head_dim], &ranges, keys, seed), &device);
            }
        }

        #[test]
        fn the_reference_is_the_derivative_of_the_forward(
            (ranges, keys) in any_ranges(),
            group in 1..=2usize,
            at: prop::sample::Index,
            of in 0..3usize,
        ) {
            let case = Case::new([2 * group, 2, 8], &ranges, keys, 5);
            let (mut qkv, visibility) = (case.wide(), case.visibility(&Device::cpu()));
            let d_o = widen(&testing::values(99, case.q.len(), 1.0));
            let forward = |[q, k, v]: &[Vec<f64>; 3]| forward_reference([q, k, v], &case.shape, &visibility);
            let (o, lse) = forward(&qkv);
            let [q, k, v] = &qkv;
            let grads = reference(&d_o, [q, k, v], (&o, &lse), &case.shape, &visibility);
            let at = at.index(qkv[of].len());
            let mut loss = |step: f64| {
                qkv[of][at] += step;
                let loss: f64 = forward(&qkv).0.iter().zip(&d_o).map(|(o, d_o)| o * d_o).sum();
                qkv[of][at] -= step;
                loss
            };
            let step = 1e-5;
            let slope = (loss(step) - loss(-step)) / (2.0 * step);
            let got = grads[of][at];
            prop_assert!((got - slope).abs() <= 1e-6 * (1.0 + slope.abs()), "{got} against {slope}");
        }
    }

    fn causal_rows(head_dims: &[usize], device: &Device) {
        let segments = [[0; 5].as_slice(), &[1; 60], &[2; 15]].concat();
        for &head_dim in head_dims {
            check(&Case::causal([2, 1, head_dim], &segments, 80, None), device);
        }
    }

    #[test]
    fn causal_rows_of_small_heads() {
        for device in forms() {
            causal_rows(&[8, 32, 64], &device);
            check(&Case::causal([3, 3, 8], &[1; 80], 80, Some(9)), &device);
        }
    }

    #[test]
    fn causal_rows_of_large_heads() {
        // These take long to compile, so only the first GPU runs them.
        forms().iter().take(3).for_each(|device| causal_rows(&[80, 96, 128, 256], device));
    }

    #[test]
    fn long_rows_and_other_keys() {
        for device in forms() {
            check(&Case::causal([1, 1, 8], &[1; 600], 600, None), &device);
            let ranges: Vec<_> = (190..200).map(|end| (0, end)).collect();
            check(&Case::new([4, 2, 32], &ranges, 203, 3), &device);
            check(&Case::new([4, 2, 32], &[], 5, 3), &device);
            check(&Case::new([4, 2, 32], &[(0, 0), (0, 0)], 5, 3), &device);
        }
    }

    #[test]
    fn values_of_every_size_survive() {
        for device in forms() {
            for (k, v, d_o) in [(1e5, 1e5, 1e-8), (1e-8, 1e-8, 1e5), (1e-5, 1e3, 1e-20)] {
                let case = Case::causal([4, 2, 32], &[1; 100], 100, None).scaled(k, v);
                let mut d_o = testing::values(99, case.q.len(), d_o);
                check_of(&case, &d_o, &device);
                // Every size together.
                let row = 4 * case.shape.head_dim;
                d_o.iter_mut().enumerate().for_each(|(i, value)| *value *= [1.0, 1e-3, 1e3, 0.0][i / row % 4]);
                check_of(&case, &d_o, &device);
            }
        }
    }

    #[test]
    fn large_scores_stay_finite_and_a_second_run_gives_the_same_bits() {
        for device in testing::devices() {
            let mut case = Case::causal([2, 1, 32], &[1; 70], 70, None);
            case.q.iter_mut().for_each(|value| *value *= 1e3);
            let d_o = testing::values(99, case.q.len(), 1.0);
            let first = gradients(&case, &device, &d_o);
            assert!(first.iter().flatten().all(|value| value.is_finite()), "{}", case.name(&device));
            assert_eq!(first, gradients(&case, &device, &d_o), "{}", case.name(&device));
        }
    }

    #[test]
    fn other_shapes_are_errors() {
        let device = Device::cpu();
        let case = Case::causal([4, 2, 8], &[1; 6], 6, None);
        let [q, k, v] = case.qkv(&device);
        let (attended, visibility) = (case.attend(&device), case.visibility(&device));
        let run = |d_o: &Tensor, attended: &Attended| {
            attention_backward(d_o, &q, &k, &v, attended, &case.shape, &visibility).unwrap_err().to_string()
        };
        assert_eq!(run(&k, &attended), "attention backward: dO: expected [6, 32], got [6, 16]");
        assert_eq!(
            run(&q, &Attended { o: k.clone(), ..attended.clone() }),
            "attention backward: O: expected [6, 32], got [6, 16]"
        );
        assert_eq!(
            run(&q, &Attended { lse: k.clone(), ..attended.clone() }),
            "attention backward: the log-sum-exp: expected [6, 4], got [6, 16]"
        );
    }
}
