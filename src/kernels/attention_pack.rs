//! What the cooperative matrices of [`attention`](super::attention) read: Q, K, V and dO as f16 times a power of two a row and head,
//! padded to whole tiles. Q and K, whose products softmax wants exact, are two f16 each.

use super::attention::AttentionShape;
use super::row_teams::RowTeams;
use super::visibility::Visibility;
use super::{Scratch, kernel, lora_coop, params};
use crate::device::{Buffer, Cooperative, Defines, Dispatch, Gpu, Tier};
use crate::error::Result;
use crate::tensor::Tensor;

params! {
    struct AttentionPackParams {
        first_group: u32,
        groups: u32,
        /// All heads' padded rows.
        rows: u32,
        /// Rows of a head, padded.
        padded: u32,
        /// M, rows of X.
        count: u32,
        /// H.
        heads: u32,
        /// D.
        head_dim: u32,
    }
}

kernel! {
    /// `shaders/attention_pack.wgsl`
    KERNEL = "attention_pack", AttentionPackParams, [x: Read, packed: Write, factors: Write]
}

/// Rows that a workgroup of the attention kernels owns.
pub(crate) const TILE: usize = 64;
/// The largest head whose results fit the registers of a subgroup, in values.
const LARGEST_HEAD: usize = 128;

/// The cooperative matrices of a device that attends with them: over so many queries, if it can pack what they read.
pub(crate) fn cooperative(gpu: &Gpu, shape: &AttentionShape, visibility: &Visibility) -> Option<Cooperative> {
    let fits = |side: Side| 4 * side.values() as u64 <= gpu.limits().max_binding_bytes;
    let all = visibility.keys() > 0
        && shape.head_dim <= LARGEST_HEAD
        && fits(Side::queries(shape, visibility, true))
        && fits(Side::keys(shape, visibility));
    lora_coop::of(gpu, visibility.queries()).filter(|_| all)
}

/// Text constants of the attention kernels of cooperative matrices.
pub(crate) fn head_defines(cooperative: Cooperative, head_dim: usize) -> Defines {
    cooperative.defines(Defines::new()).with("head_dim", head_dim as u32).with("wide", wide(head_dim) as u32)
}

/// Every variant of [`head_defines`], for the registry test.
pub(crate) fn head_variants(tier: Tier) -> Vec<Defines> {
    let each = |cooperative| [8, 44, 64, 80, 128].map(|head_dim| head_defines(cooperative, head_dim));
    if tier.cooperative() { Cooperative::ALL.into_iter().flat_map(each).collect() } else { Vec::new() }
}

/// Values of a packed head: matrices have 16 rows and columns at most.
fn wide(head_dim: usize) -> usize {
    head_dim.next_multiple_of(16)
}

/// Queries or keys to pack.
#[derive(Clone, Copy)]
struct Side {
    count: usize,
    heads: usize,
    head_dim: usize,
    /// Of f16: two of Q or K, one of dO or V.
    planes: usize,
}

impl Side {
    fn queries(shape: &AttentionShape, visibility: &Visibility, backward: bool) -> Side {
        let planes = if backward { 3 } else { 2 };
        Side { count: visibility.queries(), heads: shape.heads, head_dim: shape.head_dim, planes }
    }

    fn keys(shape: &AttentionShape, visibility: &Visibility) -> Side {
        Side { count: visibility.keys(), heads: shape.kv_heads, head_dim: shape.head_dim, planes: 3 }
    }

    fn padded(self) -> usize {
        self.count.next_multiple_of(TILE)
    }

    /// Of all heads.
    fn rows(self) -> usize {
        self.heads * self.padded()
    }

    /// f32 that have the size of what is packed.
    fn values(self) -> usize {
        self.planes * self.rows() * wide(self.head_dim) / 2
    }

    /// Factors of two tensors.
    fn factors(self) -> usize {
        2 * self.rows()
    }

    fn scratch(self) -> [usize; 2] {
        [self.values(), self.factors()]
    }

    /// Packs Q or K, then dO or V.
    fn pack(self, gpu: &Gpu, op: &'static str, tensors: [Option<&Tensor>; 2]) -> Result<[Buffer; 2]> {
        let values = gpu.alloc("packed rows of attention", 4 * self.values() as u64)?;
        let factors = gpu.alloc("factors of attention", 4 * self.factors() as u64)?;
        let params = AttentionPackParams {
            rows: self.rows() as u32,
            padded: self.padded() as u32,
            count: self.count as u32,
            heads: self.heads as u32,
            head_dim: self.head_dim as u32,
            ..Default::default()
        };
        for (tensor, split) in tensors.into_iter().zip([true, false]) {
            let Some(tensor) = tensor else { continue };
            gpu.dispatch(Dispatch {
                kernel: &KERNEL,
                defines: &defines(gpu.tier(), wide(self.head_dim), split),
                buffers: &[tensor.buffer(gpu, op)?, &values, &factors],
                params: bytemuck::bytes_of(&params),
                groups: teams(gpu.tier()).groups(self.rows()),
                flops_per_group: 4 * teams(gpu.tier()).group_rows() * self.head_dim as u64,
            })?;
        }
        Ok([values, factors])
    }
}

/// What the kernels of a call read.
pub(crate) struct Packed {
    /// Q, and dO where there is one.
    pub queries: Buffer,
    /// K and V.
    pub keys: Buffer,
    /// Powers of two of every head's rows: of Q, of dO.
    pub query_factors: Buffer,
    /// Of K, of V.
    pub key_factors: Buffer,
}

impl Packed {
    /// Packs Q, K and V, and dO for a backward pass.
    pub fn new(
        gpu: &Gpu,
        op: &'static str,
        [q, k, v]: [&Tensor; 3],
        d_o: Option<&Tensor>,
        shape: &AttentionShape,
        visibility: &Visibility,
    ) -> Result<Packed> {
        let side = Side::queries(shape, visibility, d_o.is_some());
        let [queries, query_factors] = side.pack(gpu, op, [Some(q), d_o])?;
        let [keys, key_factors] = Side::keys(shape, visibility).pack(gpu, op, [Some(k), Some(v)])?;
        Ok(Packed { queries, keys, query_factors, key_factors })
    }

    /// The first bindings of the attention kernels of cooperative matrices.
    pub fn operands(&self) -> [&Buffer; 4] {
        [&self.queries, &self.keys, &self.query_factors, &self.key_factors]
    }
}

/// What [`Packed::new`] takes.
pub(crate) fn scratch(shape: &AttentionShape, visibility: &Visibility, backward: bool) -> Scratch {
    let sides = [Side::queries(shape, visibility, backward), Side::keys(shape, visibility)];
    Scratch::kept(sides.into_iter().flat_map(Side::scratch))
}

fn teams(tier: Tier) -> RowTeams {
    RowTeams::short(tier)
}

fn defines(tier: Tier, wide: usize, split: bool) -> Defines {
    teams(tier).defines().with("wide", wide as u32).with("split", split)
}

/// Every variant's text constants, for the registry test.
pub(crate) fn variants(tier: Tier) -> Vec<Defines> {
    if tier.cooperative() { [true, false].map(|split| defines(tier, 64, split)).to_vec() } else { Vec::new() }
}

/// The formula for one row of a head: the factor, and the three planes of values.
#[cfg(test)]
fn reference(row: &[f32], wide: usize) -> (f32, [Vec<f32>; 3]) {
    let factor = super::row_factor::reference(row);
    let scaled: Vec<f32> = row.iter().map(|value| value * factor).chain(std::iter::repeat(0.0)).take(wide).collect();
    let larger = |value: f32| f32::from_bits((value.to_bits() + 0x1000) & 0xffff_e000);
    let plane = |part: &dyn Fn(f32) -> f32| scaled.iter().map(|&v| half::f16::from_f32(part(v)).to_f32()).collect();
    (factor, [plane(&larger), plane(&|value| value - larger(value)), plane(&|value| value)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::tensor::from_bytes;
    use crate::testing;

    #[test]
    fn rows_of_every_size_are_packed_and_padded() {
        let (count, heads, head_dim) = (70, 2, 44);
        let mut x = testing::values(3, count * heads * head_dim, 1.0);
        for (row, amplitude) in [1e5, 1e-8, 0.0, 1e30].into_iter().enumerate() {
            x[row * head_dim..(row + 1) * head_dim].iter_mut().for_each(|value| *value *= amplitude);
        }
        let side = Side { count, heads, head_dim, planes: 3 };
        let wide = wide(head_dim);
        for device in testing::gpus() {
            let Device::Gpu(gpu) = &device else { continue };
            if gpu.cooperative().is_none() {
                continue;
            }
            let tensor = Tensor::from_slice(&device, &[count, heads * head_dim], &x).unwrap();
            let [values, factors] = side.pack(gpu, "test", [Some(&tensor); 2]).unwrap();
            let factors = from_bytes(&gpu.read(&factors, 4 * side.factors() as u64).unwrap());
            let bytes = gpu.read(&values, 4 * side.values() as u64).unwrap();
            let half = |pair: &[u8]| half::f16::from_le_bytes([pair[0], pair[1]]).to_f32();
            let values: Vec<f32> = bytes.chunks(2).map(half).collect();
            for (at, (head, m)) in (0..heads).flat_map(|head| (0..128).map(move |m| (head, m))).enumerate() {
                let row = (m < count).then(|| &x[(m * heads + head) * head_dim..][..head_dim]);
                let (factor, planes) = reference(row.unwrap_or(&[]), wide);
                assert_eq!([factors[at], factors[side.rows() + at]], [factor; 2], "{device:?}: head {head} row {m}");
                for (plane, wanted) in planes.iter().enumerate() {
                    let got = &values[(plane * side.rows() + at) * wide..][..wide];
                    // A driver may flush subnormals, and round to either side.
                    let bounds: Vec<f64> = wanted.iter().map(|value| 1e-3 * f64::from(value.abs()) + 7e-5).collect();
                    let context = format!("{device:?}: head {head} row {m} plane {plane}");
                    testing::assert_close(&context, got, &testing::wide(wanted), &bounds);
                }
            }
        }
    }
}
