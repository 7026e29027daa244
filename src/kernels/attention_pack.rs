//! What the cooperative matrices of [`attention`](super::attention) read: Q, K, V and dO as f16
//! times a power of two a row and head, in tiles of 16 x 16, padded to whole ones. Q and K, whose
//! products softmax wants exact, are two f16 each. Products that contract over rows read tiles
//! that are transposed.

use super::attention::AttentionShape;
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
        /// D / 4.
        head_quads: u32,
        /// The first plane of X.
        plane: u32,
        /// Where its scales begin.
        scales: u32,
    }
}

kernel! {
    /// `shaders/attention_pack.wgsl`
    KERNEL = "attention_pack", AttentionPackParams, [x: Read, packed: Write, scales: Write]
}

/// Rows of a head are padded to a multiple of so many, which those of a workgroup and of its steps
/// divide.
const PADDED: usize = 64;
/// Rows and columns of a packed tile.
const TILE: usize = 16;
/// The largest head whose results fit the registers of a subgroup, in values.
const LARGEST_HEAD: usize = 128;
/// The largest of which a subgroup has whole rows of results, in values: else half of them.
const LARGEST_WHOLE: usize = 80;

/// Rows that a workgroup of the attention kernels owns, 16 a strip.
pub(crate) fn own_rows(head_dim: usize) -> usize {
    TILE * strips(head_dim)
}

/// Of the own rows of a workgroup's four subgroups.
fn strips(head_dim: usize) -> usize {
    if wide(head_dim) <= LARGEST_WHOLE { 4 } else { 2 }
}

/// The cooperative matrices of a device that attends with them: over so many queries, if it can
/// pack what they read.
pub(crate) fn cooperative(gpu: &Gpu, shape: &AttentionShape, visibility: &Visibility) -> Option<Cooperative> {
    let fits = |side: Side| 4 * side.values() as u64 <= gpu.limits().max_binding_bytes;
    let all = visibility.keys() > 0
        && shape.head_dim <= LARGEST_HEAD
        && Side::of(shape, visibility, true).into_iter().all(fits);
    lora_coop::of(gpu, visibility.queries()).filter(|_| all)
}

/// Text constants of the attention kernels of cooperative matrices.
pub(crate) fn head_defines(cooperative: Cooperative, head_dim: usize) -> Defines {
    cooperative
        .defines(Defines::new())
        .with("head_dim", head_dim as u32)
        .with("wide", wide(head_dim) as u32)
        .with("strips", strips(head_dim) as u32)
}

/// Every variant of [`head_defines`], for the registry test.
pub(crate) fn head_variants(tier: Tier) -> Vec<Defines> {
    let each = |cooperative| [8, 44, 64, 80, 112, 128].map(|head_dim| head_defines(cooperative, head_dim));
    if tier.cooperative() { Cooperative::ALL.into_iter().flat_map(each).collect() } else { Vec::new() }
}

/// Values of a packed head.
fn wide(head_dim: usize) -> usize {
    head_dim.next_multiple_of(TILE)
}

/// The f16 of a tensor's values, each of them a plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Planes {
    /// Two, the value rounded and what is left.
    split: bool,
    /// One.
    whole: bool,
    /// One, its tiles transposed; the last plane.
    transposed: bool,
}

impl Planes {
    const SPLIT: Planes = Planes { split: true, whole: false, transposed: false };
    const WHOLE: Planes = Planes { split: false, whole: true, transposed: false };
    const TRANSPOSED: Planes = Planes { split: false, whole: false, transposed: true };

    fn and_transposed(self) -> Planes {
        Planes { transposed: true, ..self }
    }

    fn count(self) -> usize {
        2 * usize::from(self.split) + usize::from(self.whole) + usize::from(self.transposed)
    }
}

/// Queries or keys to pack.
#[derive(Clone, Copy)]
struct Side {
    count: usize,
    heads: usize,
    head_dim: usize,
    /// Of Q and dO, or K and V.
    planes: [Planes; 2],
}

impl Side {
    /// Of queries and of keys. The forward wants no dO; its planes are there, and empty.
    fn of(shape: &AttentionShape, visibility: &Visibility, backward: bool) -> [Side; 2] {
        let none = Planes { split: false, whole: false, transposed: false };
        let (queries, keys) = if backward {
            let split = Planes::SPLIT.and_transposed();
            ([split, Planes::WHOLE.and_transposed()], [split, Planes::WHOLE])
        } else {
            ([Planes::SPLIT, none], [Planes::SPLIT, Planes::TRANSPOSED])
        };
        let side = |count, heads, planes| Side { count, heads, head_dim: shape.head_dim, planes };
        [side(visibility.queries(), shape.heads, queries), side(visibility.keys(), shape.kv_heads, keys)]
    }

    fn padded(self) -> usize {
        self.count.next_multiple_of(PADDED)
    }

    /// Of all heads.
    fn rows(self) -> usize {
        self.heads * self.padded()
    }

    /// f32 that have the size of what is packed.
    fn values(self) -> usize {
        let planes: usize = self.planes.iter().map(|planes| planes.count()).sum();
        planes * self.rows() * wide(self.head_dim) / 2
    }

    /// Scales of two tensors.
    fn scales(self) -> usize {
        2 * self.rows()
    }

    fn scratch(self) -> [usize; 2] {
        [self.values(), self.scales()]
    }

    /// Packs Q or K, then dO or V.
    fn pack(self, gpu: &Gpu, op: &'static str, tensors: [Option<&Tensor>; 2]) -> Result<[Buffer; 2]> {
        let values = gpu.alloc("packed rows of attention", 4 * self.values() as u64)?;
        let scales = gpu.alloc("scales of attention", 4 * self.scales() as u64)?;
        for (at, (tensor, planes)) in tensors.into_iter().zip(self.planes).enumerate() {
            let Some(tensor) = tensor else { continue };
            let params = AttentionPackParams {
                rows: self.rows() as u32,
                padded: self.padded() as u32,
                count: self.count as u32,
                heads: self.heads as u32,
                head_quads: (self.head_dim / 4) as u32,
                plane: if at == 0 { 0 } else { self.planes[0].count() as u32 },
                scales: (at * self.rows()) as u32,
                ..Default::default()
            };
            gpu.dispatch(Dispatch {
                kernel: &KERNEL,
                defines: &defines(wide(self.head_dim), planes),
                buffers: &[tensor.buffer(gpu, op)?, &values, &scales],
                params: bytemuck::bytes_of(&params),
                groups: (self.rows() / TILE) as u64,
                flops_per_group: (4 * TILE * self.head_dim) as u64,
            })?;
        }
        Ok([values, scales])
    }
}

/// What the kernels of a call read.
pub(crate) struct Packed {
    /// Q, and dO where there is one.
    pub queries: Buffer,
    /// K and V.
    pub keys: Buffer,
    /// Of every head's rows, what packed values are times, powers of two: of Q, of dO.
    pub query_scales: Buffer,
    /// Of K, of V.
    pub key_scales: Buffer,
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
        let [of_queries, of_keys] = Side::of(shape, visibility, d_o.is_some());
        let [queries, query_scales] = of_queries.pack(gpu, op, [Some(q), d_o])?;
        let [keys, key_scales] = of_keys.pack(gpu, op, [Some(k), Some(v)])?;
        Ok(Packed { queries, keys, query_scales, key_scales })
    }

    /// The first bindings of the attention kernels of cooperative matrices.
    pub fn operands(&self) -> [&Buffer; 4] {
        [&self.queries, &self.keys, &self.query_scales, &self.key_scales]
    }
}

/// What [`Packed::new`] takes.
pub(crate) fn scratch(shape: &AttentionShape, visibility: &Visibility, backward: bool) -> Scratch {
    Scratch::kept(Side::of(shape, visibility, backward).into_iter().flat_map(Side::scratch))
}

fn defines(wide: usize, planes: Planes) -> Defines {
    Defines::new()
        .with("wide", wide as u32)
        .with("split", planes.split)
        .with("whole", planes.whole)
        .with("transposed", planes.transposed)
        .with("f16", true)
}

/// Every variant's text constants, for the registry test.
pub(crate) fn variants(tier: Tier) -> Vec<Defines> {
    if !tier.cooperative() {
        return Vec::new();
    }
    let all = [
        Planes::SPLIT,
        Planes::TRANSPOSED,
        Planes::WHOLE,
        Planes::SPLIT.and_transposed(),
        Planes::WHOLE.and_transposed(),
    ];
    [48, 128].into_iter().flat_map(|wide| all.map(|planes| defines(wide, planes))).collect()
}

/// The formula for one row of a head: what packed values are times, and the values of the planes
/// of two f16 and of one.
#[cfg(test)]
fn reference(row: &[f32], wide: usize) -> (f32, [Vec<f32>; 3]) {
    let factor = super::row_factor::reference(row);
    let scaled: Vec<f32> = row.iter().map(|value| value * factor).chain(std::iter::repeat(0.0)).take(wide).collect();
    let larger = |value: f32| f32::from_bits((value.to_bits() + 0x1000) & 0xffff_e000);
    let plane = |part: &dyn Fn(f32) -> f32| scaled.iter().map(|&v| half::f16::from_f32(part(v)).to_f32()).collect();
    (1.0 / factor, [plane(&larger), plane(&|value| value - larger(value)), plane(&|value| value)])
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
        let planes = [Planes::SPLIT.and_transposed(), Planes::WHOLE.and_transposed()];
        let side = Side { count, heads, head_dim, planes };
        let (wide, padded) = (wide(head_dim), side.padded());
        for device in testing::gpus() {
            let Device::Gpu(gpu) = &device else { continue };
            if gpu.cooperative().is_none() {
                continue;
            }
            let tensor = Tensor::from_slice(&device, &[count, heads * head_dim], &x).unwrap();
            let [values, scales] = side.pack(gpu, "test", [Some(&tensor); 2]).unwrap();
            let scales = from_bytes(&gpu.read(&scales, 4 * side.scales() as u64).unwrap());
            let bytes = gpu.read(&values, 4 * side.values() as u64).unwrap();
            let half = |pair: &[u8]| half::f16::from_le_bytes([pair[0], pair[1]]).to_f32();
            let values: Vec<f32> = bytes.chunks(2).map(half).collect();
            for (at, (head, m)) in (0..heads).flat_map(|head| (0..padded).map(move |m| (head, m))).enumerate() {
                let row = (m < count).then(|| &x[(m * heads + head) * head_dim..][..head_dim]);
                let (scale, wanted) = reference(row.unwrap_or(&[]), wide);
                assert_eq!([scales[at], scales[side.rows() + at]], [scale; 2], "{device:?}: head {head} row {m}");
                // The planes in their order, and which of the reference's they are.
                for (plane, (of, transposed)) in
                    [(0, false), (1, false), (2, true), (2, false), (2, true)].into_iter().enumerate()
                {
                    let value = |d: usize| {
                        let (row, column) = if transposed { (d % TILE, at % TILE) } else { (at % TILE, d % TILE) };
                        let tile = (plane * side.rows() + at) / TILE * (wide / TILE) + d / TILE;
                        values[tile * TILE * TILE + row * TILE + column]
                    };
                    let got: Vec<f32> = (0..wide).map(value).collect();
                    let wanted = &wanted[of];
                    // A driver may flush subnormals, and round to either side.
                    let bounds: Vec<f64> = wanted.iter().map(|value| 1e-3 * f64::from(value.abs()) + 7e-5).collect();
                    let context = format!("{device:?}: head {head} row {m} plane {plane}");
                    testing::assert_close(&context, &got, &testing::wide(wanted), &bounds);
                }
            }
        }
    }
}
