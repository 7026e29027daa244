//! O = softmax(scale * Q * K^T) * V over the keys that each query sees: Q and O [M, H * D], K and
//! V [keys, Hkv * D]. Query head h reads head h / (H / Hkv) of K and V. Uses online softmax, so
//! the matrix of scores is never stored (Dao, "FlashAttention-2", 2023). The backward is in
//! [`attention_backward`](crate::kernels::attention::backward).
//!
//! Forms: on hardware, tiles in workgroup memory, or for many queries in the tier
//! `cooperative-matrix`, products of f16. On software drivers, tiles in registers, or one thread
//! per row. All but the f16 products compute in f32.

pub mod backward;
mod call;
pub(crate) mod coop;
pub(crate) mod cpu;
pub(crate) mod form;
pub(crate) mod lanes;
pub(crate) mod pack;
pub(crate) mod plain;
pub(crate) mod tile;
pub mod visibility;

pub use self::call::{Attended, AttentionShape};
use self::call::{ForwardCall, expect_qkv};
use self::form::{Form, Pass};
use self::visibility::Visibility;
use crate::device::Tier;
use crate::error::Result;
use crate::tensor::{Storage, Tensor};

const OP: &str = "attention";

/// Attention of `q` [M, H * D] over `k` and `v` [keys, Hkv * D]. `visibility` is on their device,
/// with M queries and as many keys as `k` has rows.
///
/// # Errors
/// `Error::Shape`, `Error::Invalid` if `heads` is not a multiple of `kv_heads` or the head
/// size is out of range, `Error::DeviceMismatch`.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
    visibility: &Visibility,
) -> Result<Attended> {
    expect_qkv(OP, [q, k, v], shape, visibility)?;
    let m = visibility.queries();
    let (o_shape, lse_shape) = ([m, shape.heads * shape.head_dim], [m, shape.heads]);
    match q.storage() {
        Storage::Cpu(cpu, q) => {
            let (mut o, mut lse) = (cpu.zeros(q.len())?, cpu.zeros(m * shape.heads)?);
            cpu::forward(cpu, [q, k.host(OP)?, v.host(OP)?], shape, visibility, &mut o, &mut lse)?;
            Ok(Attended { o: Tensor::from_host(cpu, &o_shape, o), lse: Tensor::from_host(cpu, &lse_shape, lse) })
        }
        Storage::Gpu(gpu, _) => {
            let (o, lse) = (Tensor::uninit(gpu, "o", &o_shape)?, Tensor::uninit(gpu, "lse", &lse_shape)?);
            let (qkv, results) = ([q, k, v], [&o, &lse]);
            let call = ForwardCall { op: OP, gpu, qkv, shape, visibility, results };
            if m == 0 {
            } else if lanes::fits(gpu, shape.head_dim) {
                lanes::dispatch(&call)?;
            } else if gpu.tier() == Tier::Software {
                plain::dispatch(&call)?;
            } else if let Some(cooperative) = pack::cooperative(gpu, shape, visibility) {
                let form = Form::of(Pass::Forward, gpu, cooperative, shape.head_dim);
                coop::dispatch(gpu, form, OP, qkv, shape, visibility, results)?;
            } else {
                tile::dispatch(&call)?;
            }
            Ok(Attended { o, lse })
        }
        Storage::Planned(cpu, _) => {
            let (o, lse) = (Tensor::planned(cpu, &o_shape)?, Tensor::planned(cpu, &lse_shape)?);
            cpu::scratch(shape, visibility).take(cpu);
            Ok(Attended { o, lse })
        }
    }
}

/// The formula, for any real type. Returns O and the log-sum-exp.
#[cfg(test)]
pub(crate) fn reference<T: crate::kernels::Real>(
    [q, k, v]: [&[T]; 3],
    shape: &AttentionShape,
    visibility: &Visibility,
) -> (Vec<T>, Vec<T>) {
    let AttentionShape { heads, kv_heads, head_dim, .. } = *shape;
    let mut o = vec![T::zero(); q.len()];
    let mut lse = vec![T::neg_infinity(); visibility.queries() * heads];
    for (row, lse) in lse.iter_mut().enumerate() {
        let (query, head) = (row / heads, row % heads);
        let at = |key: usize| (key * kv_heads + head / shape.group()) * head_dim;
        let score = |key| {
            let pairs = (0..head_dim).map(|d| q[row * head_dim + d] * k[at(key) + d]);
            T::of(shape.scale) * pairs.sum()
        };
        let scores: Vec<T> = visibility.of_query(query).map(score).collect();
        let most = scores.iter().fold(T::neg_infinity(), |most, &score| most.max(score));
        if scores.is_empty() {
            continue;
        }
        *lse = most + scores.iter().map(|&score| (score - most).exp()).sum::<T>().ln();
        for (key, &score) in visibility.of_query(query).zip(&scores) {
            for d in 0..head_dim {
                o[row * head_dim + d] += (score - *lse).exp() * v[at(key) + d];
            }
        }
    }
    (o, lse)
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::device::Device;
    use crate::testing;
    use crate::testing::tolerances::ATTENTION;

    /// Q, K, V and a visibility.
    pub struct Case {
        pub shape: AttentionShape,
        pub ranges: Vec<(u32, u32)>,
        pub keys: usize,
        pub q: Vec<f32>,
        pub k: Vec<f32>,
        pub v: Vec<f32>,
    }

    impl Case {
        pub fn new([heads, kv_heads, head_dim]: [usize; 3], ranges: &[(u32, u32)], keys: usize, seed: u64) -> Case {
            let scale = 1.0 / (head_dim as f32).sqrt();
            let values = |seed: u64, rows: usize, heads: usize| testing::values(seed, rows * heads * head_dim, 1.5);
            Case {
                shape: AttentionShape { heads, kv_heads, head_dim, scale },
                ranges: ranges.to_vec(),
                keys,
                q: values(seed, ranges.len(), heads),
                k: values(seed + 1, keys, kv_heads),
                v: values(seed + 2, keys, kv_heads),
            }
        }

        pub fn causal(sizes: [usize; 3], segments: &[u32], length: usize, window: Option<usize>) -> Case {
            let visibility = Visibility::causal(&Device::cpu(), segments, length, window).unwrap();
            let ranges: Vec<_> = (0..segments.len())
                .map(|query| visibility.of_query(query))
                .map(|keys| (keys.start as u32, keys.end as u32))
                .collect();
            Case::new(sizes, &ranges, segments.len(), 7)
        }

        pub fn visibility(&self, device: &Device) -> Visibility {
            Visibility::ranges(device, &self.ranges, self.keys).unwrap()
        }

        pub fn tensor(&self, device: &Device, heads: usize, values: &[f32]) -> Tensor {
            let cols = heads * self.shape.head_dim;
            Tensor::from_slice(device, &[values.len() / cols, cols], values).unwrap()
        }

        /// Returns Q, K and V on a device.
        pub fn qkv(&self, device: &Device) -> [Tensor; 3] {
            let AttentionShape { heads, kv_heads, .. } = self.shape;
            [(heads, &self.q), (kv_heads, &self.k), (kv_heads, &self.v)]
                .map(|(heads, values)| self.tensor(device, heads, values))
        }

        /// Scales K by `k` and V by `v`, and Q so that the scores stay the same.
        pub fn scaled(mut self, k: f32, v: f32) -> Case {
            self.k.iter_mut().for_each(|value| *value *= k);
            self.q.iter_mut().for_each(|value| *value /= k);
            self.v.iter_mut().for_each(|value| *value *= v);
            self
        }

        pub fn wide(&self) -> [Vec<f64>; 3] {
            [&self.q, &self.k, &self.v].map(|values| widen(values))
        }

        pub fn attend(&self, device: &Device) -> Attended {
            let [q, k, v] = self.qkv(device);
            attention(&q, &k, &v, &self.shape, &self.visibility(device)).unwrap()
        }

        pub fn name(&self, device: &Device) -> String {
            format!("{} {:?} M={} keys={}", testing::name(device), self.shape, self.ranges.len(), self.keys)
        }

        /// Whether attention uses f16 cooperative matrices on this device.
        pub fn is_f16(&self, device: &Device) -> bool {
            matches!(device, Device::Gpu(gpu)
                if pack::cooperative(gpu, &self.shape, &self.visibility(device)).is_some())
        }

        fn check(&self, device: &Device) {
            let attended = self.attend(device);
            let cpu = Device::cpu();
            let [q, k, v] = self.wide();
            let (o, lse) = reference([&q, &k, &v], &self.shape, &self.visibility(&cpu));
            let magnitudes: Vec<f64> = v.iter().map(|v| v.abs()).collect();
            let (terms, _) = reference([&q, &k, &magnitudes], &self.shape, &self.visibility(&cpu));
            // Both a softmax weight and a value of V are rounded to f16.
            let bounds = ATTENTION.of(self.is_f16(device)).bounds(&terms);
            testing::assert_close(&self.name(device), &attended.o.to_vec().unwrap(), &o, &bounds);
            let sees_none = |lse: &f64| lse.is_infinite();
            let got = attended.lse.to_vec().unwrap();
            for (got, wanted) in got.iter().zip(&lse) {
                let close = (f64::from(*got) - wanted).abs() <= 1e-5 * (1.0 + wanted.abs());
                assert!(if sees_none(wanted) { *got == f32::NEG_INFINITY } else { close }, "{}", self.name(device));
            }
        }
    }

    pub fn widen(values: &[f32]) -> Vec<f64> {
        values.iter().map(|&value| f64::from(value)).collect()
    }

    /// Devices that cover every form of the kernels: the CPU, and for every GPU a software tier, a
    /// hardware tier and the cooperative-matrix tier.
    pub fn forms() -> Vec<Device> {
        let form = |device: &Device| match device {
            Device::Cpu(_) => true,
            Device::Gpu(gpu) => matches!(gpu.tier(), Tier::Software | Tier::Plain | Tier::CooperativeMatrix),
        };
        testing::devices().into_iter().filter(form).collect()
    }

    /// Ranges whose ends never decrease, with gaps and with queries that see nothing.
    pub fn any_ranges() -> impl Strategy<Value = (Vec<(u32, u32)>, usize)> {
        prop::collection::vec((0..3u32, 0..8u32), 1..100).prop_map(|steps| {
            let (mut first, mut end) = (0, 0u32);
            let range = |(step, length): (u32, u32)| {
                first += step;
                end = end.max(first + length);
                (first, end)
            };
            let ranges: Vec<_> = steps.into_iter().map(range).collect();
            (ranges, end as usize + 1)
        })
    }

    pub fn twin(device: &Device) {
        let segments = [[1; 70].as_slice(), &[2; 30]].concat();
        Case::causal([4, 2, 16], &segments, 100, Some(40)).check(device);
    }

    /// Heads that don't fill whole registers.
    pub fn twin_of_odd_heads(device: &Device) {
        Case::causal([4, 2, 12], &[1; 100], 50, None).check(device);
    }

    /// Too few queries for cooperative matrices.
    pub fn twin_of_few_queries(device: &Device) {
        Case::new([4, 2, 16], &[(0, 68), (0, 69), (5, 70)], 70, 3).check(device);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]
        #[test]
        fn any_ranges_on_every_form(
            (ranges, keys) in any_ranges(),
            kv_heads in 1..=3usize,
            group in 1..=3usize,
            head_dim in prop_oneof![Just(8usize), Just(64), Just(44)],
            seed in 0..1000u64,
        ) {
            for device in forms() {
                Case::new([kv_heads * group, kv_heads, head_dim], &ranges, keys, seed).check(&device);
            }
        }
    }

    fn causal_rows(head_dims: &[usize], device: &Device) {
        // Two rows of 75: one padded left, one packed with padding right.
        let mut segments = [[0; 5].as_slice(), &[1; 70]].concat();
        segments.extend([[1; 30].as_slice(), &[2; 40], &[0; 5]].concat());
        for &head_dim in head_dims {
            Case::causal([2, 1, head_dim], &segments, 75, None).check(device);
        }
    }

    #[test]
    fn causal_rows_of_small_heads() {
        for device in forms() {
            causal_rows(&[8, 32, 64], &device);
            Case::causal([3, 3, 8], &[1; 150], 75, Some(9)).check(&device);
        }
    }

    #[test]
    fn causal_rows_of_large_heads() {
        // These take long to compile, so only the first GPU runs them.
        forms().iter().take(3).for_each(|device| causal_rows(&[80, 96, 128, 256], device));
    }

    #[test]
    fn queries_after_a_cache_of_keys() {
        for device in testing::devices() {
            let ranges: Vec<_> = (190..200).map(|end| (0, end)).collect();
            Case::new([4, 2, 32], &ranges, 200, 3).check(&device);
            Case::new([4, 2, 32], &[(0, 200)], 200, 3).check(&device);
            // No queries.
            assert_eq!(Case::new([4, 2, 32], &[], 5, 3).attend(&device).o.shape(), [0, 128]);
            Case::new([4, 2, 32], &[(0, 0), (0, 0)], 5, 3).check(&device);
        }
    }

    #[test]
    fn large_scores_stay_finite() {
        for device in forms() {
            let mut case = Case::causal([2, 1, 64], &[1; 70], 70, None);
            case.q.iter_mut().for_each(|value| *value *= 1e3);
            let attended = case.attend(&device);
            let [q, k, v] = case.wide();
            let (o, lse) = reference([&q, &k, &v], &case.shape, &case.visibility(&Device::cpu()));
            assert!(lse.iter().any(|lse| *lse > 1e3), "{lse:?}");
            // f32 scores of a few thousand have an absolute error near 1e-3, and so do their
            // exponentials, relatively.
            let bounds = vec![2e-2; o.len()];
            testing::assert_close(&case.name(&device), &attended.o.to_vec().unwrap(), &o, &bounds);
            let bounds = vec![2e-2; lse.len()];
            testing::assert_close(&case.name(&device), &attended.lse.to_vec().unwrap(), &lse, &bounds);
        }
    }

    #[test]
    fn packed_rows_are_those_of_separate_sequences() {
        for device in forms() {
            let packed = Case::causal([3, 1, 64], &[[1; 37].as_slice(), &[2; 90], &[3; 11]].concat(), 138, None);
            let o = packed.attend(&device).o.to_vec().unwrap();
            for (start, len) in [(0, 37), (37, 90), (127, 11)] {
                let mut alone = Case::causal([3, 1, 64], &vec![1; len], len, None);
                for (values, heads, of) in
                    [(&mut alone.q, 3, &packed.q), (&mut alone.k, 1, &packed.k), (&mut alone.v, 1, &packed.v)]
                {
                    *values = of[start * heads * 64..(start + len) * heads * 64].to_vec();
                }
                let separate = alone.attend(&device).o.to_vec().unwrap();
                let packed_o = &o[start * 192..(start + len) * 192];
                let software = matches!(&device, Device::Cpu(_))
                    || matches!(&device, Device::Gpu(gpu) if gpu.tier() == Tier::Software);
                if software {
                    assert_eq!(separate, packed_o, "{}", packed.name(&device));
                    continue;
                }
                // The tiles differ, so sums and roundings do.
                let bounds = vec![if packed.is_f16(&device) { 2e-3 } else { 2e-6 }; separate.len()];
                testing::assert_close(&packed.name(&device), packed_o, &testing::wide(&separate), &bounds);
            }
        }
    }

    #[test]
    fn values_of_every_size_survive() {
        for device in forms() {
            for (k, v) in [(1e5, 1e5), (1e-8, 1e-8), (1e-5, 1e8)] {
                let mut case = Case::causal([4, 2, 32], &[1; 100], 100, None).scaled(k, v);
                case.check(&device);
                // Every size together.
                let row = 2 * case.shape.head_dim;
                case.v.iter_mut().enumerate().for_each(|(i, value)| *value *= [1.0, 1e-3, 1e3, 0.0][i / row % 4]);
                case.check(&device);
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let device = Device::cpu();
        let case = Case::causal([4, 2, 8], &[1; 6], 6, None);
        let [q, k, v] = case.qkv(&device);
        let visibility = case.visibility(&device);
        let run = |q, k, v, shape: AttentionShape, visibility| {
            attention(q, k, v, &shape, visibility).unwrap_err().to_string()
        };
        for (heads, kv_heads, head_dim) in
            [(4, 2, 0), (4, 2, 4), (4, 2, 10), (4, 2, 260), (3, 2, 8), (0, 2, 8), (4, 0, 8)]
        {
            let shape = AttentionShape { heads, kv_heads, head_dim, ..case.shape };
            let wanted = format!(
                "attention: the shape is {heads} heads, {kv_heads} key heads, {head_dim} values per head, scale {}; \
                 heads must be a multiple of key heads, values per head a multiple of 4 in 8..=256",
                shape.scale
            );
            assert_eq!(run(&q, &k, &v, shape, &visibility), wanted);
        }
        assert_eq!(run(&k, &k, &v, case.shape, &visibility), "attention: Q: expected [6, 32], got [6, 16]");
        assert_eq!(run(&q, &q, &v, case.shape, &visibility), "attention: K: expected [6, 16], got [6, 32]");
        assert_eq!(run(&q, &k, &q, case.shape, &visibility), "attention: V: expected [6, 16], got [6, 32]");
        let other = Visibility::ranges(&device, &case.ranges[..5], 6).unwrap();
        assert_eq!(run(&q, &k, &v, case.shape, &other), "attention: Q: expected [5, 32], got [6, 32]");
    }
}
