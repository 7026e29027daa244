//! Packs operands for the cooperative-matrix kernels of [`attention`](crate::kernels::attention):
//! Q, K, V and dO as f16, multiplied by a power of two per row and head, in tiles of 16 x 16,
//! padded to whole tiles. Q and K are stored as two f16 each, because softmax needs their products
//! exact. Products that contract over rows read transposed tiles.

use super::call::AttentionShape;
use super::visibility::Visibility;
use crate::device::{Buffer, Cooperative, Defines, Dispatch, Gpu, Tier};
use crate::error::Result;
use crate::kernels::lora::coop;
use crate::kernels::{kernel, params};
use crate::tensor::Tensor;

params! {
    struct AttentionPackParams {
        first_group: u32,
        groups: u32,
        /// M, rows of Q and dO.
        queries: u32,
        /// Rows of K and V.
        keys: u32,
        /// H, heads of Q and dO.
        heads: u32,
        /// Hkv, heads of K and V.
        kv_heads: u32,
        /// D / 4.
        head_quads: u32,
    }
}

kernel! {
    KERNEL = "attention_pack" in "attention/pack.wgsl", AttentionPackParams,
        [
            q: Read, k: Read, v: Read, d_o: Read, queries: Write, keys: Write, query_scales: Write, key_scales: Write,
        ],
    variants: variants,
    twin: tests::twin,
}

/// Rows of a head are padded to a multiple of this. The rows of a workgroup and of its steps
/// divide it.
const PADDED: usize = 64;
/// Rows and columns of a packed tile.
pub(crate) const TILE: usize = 16;
/// The largest head whose results fit the registers of a subgroup, in values.
const LARGEST_HEAD: usize = 128;

/// Returns the device's cooperative matrices if attention over this many queries uses them and the
/// device can bind the packed operands.
pub(crate) fn cooperative(gpu: &Gpu, shape: &AttentionShape, visibility: &Visibility) -> Option<Cooperative> {
    let fits = |side: Side| 4 * side.values() as u64 <= gpu.limits().max_binding_bytes;
    let all = visibility.keys() > 0
        && shape.head_dim <= LARGEST_HEAD
        && Side::of(shape, visibility, true).into_iter().all(fits);
    coop::of(gpu, visibility.queries()).filter(|_| all)
}

/// Values of a packed head.
pub(crate) fn wide(head_dim: usize) -> usize {
    head_dim.next_multiple_of(TILE)
}

/// Queries or keys, packed.
#[derive(Clone, Copy)]
struct Side {
    count: usize,
    heads: usize,
    head_dim: usize,
    /// Planes of f16; the shader documents them.
    planes: usize,
}

impl Side {
    /// Returns the sides of queries and of keys.
    fn of(shape: &AttentionShape, visibility: &Visibility, backward: bool) -> [Side; 2] {
        let [queries, keys] = if backward { [5, 4] } else { [2, 3] };
        let side = |count, heads, planes| Side { count, heads, head_dim: shape.head_dim, planes };
        [side(visibility.queries(), shape.heads, queries), side(visibility.keys(), shape.kv_heads, keys)]
    }

    /// Padded rows of all heads.
    fn rows(self) -> usize {
        self.heads * self.count.next_multiple_of(PADDED)
    }

    /// Size of the packed values, in f32.
    fn values(self) -> usize {
        self.planes * self.rows() * wide(self.head_dim) / 2
    }

    /// Number of scales of two tensors. The forward needs none for dO.
    fn scales(self) -> usize {
        2 * self.rows()
    }

    fn alloc(self, gpu: &Gpu) -> Result<[Buffer; 2]> {
        Ok([
            gpu.alloc("packed rows of attention", 4 * self.values() as u64)?,
            gpu.alloc("scales of attention", 4 * self.scales() as u64)?,
        ])
    }
}

/// Packed operands of a call.
pub(crate) struct Packed {
    /// Q, and dO in a backward pass.
    pub queries: Buffer,
    /// K and V.
    pub keys: Buffer,
    /// Powers of two that packed values were multiplied by, for each head's rows: of Q, then of
    /// dO.
    pub query_scales: Buffer,
    /// The same, of K, then of V.
    pub key_scales: Buffer,
}

impl Packed {
    /// Packs Q, K and V, and dO for a backward pass.
    pub fn new<'a>(
        gpu: &Gpu,
        op: &'static str,
        [q, k, v]: [&'a Tensor; 3],
        d_o: Option<&'a Tensor>,
        shape: &AttentionShape,
        visibility: &Visibility,
    ) -> Result<Packed> {
        let sides @ [of_queries, of_keys] = Side::of(shape, visibility, d_o.is_some());
        let [queries, query_scales] = of_queries.alloc(gpu)?;
        let [keys, key_scales] = of_keys.alloc(gpu)?;
        let packed = Packed { queries, keys, query_scales, key_scales };
        let params = AttentionPackParams {
            queries: visibility.queries() as u32,
            keys: visibility.keys() as u32,
            heads: shape.heads as u32,
            kv_heads: shape.kv_heads as u32,
            head_quads: (shape.head_dim / 4) as u32,
            ..Default::default()
        };
        let [query_tiles, key_tiles] = sides.map(|side| (side.rows() / TILE) as u64);
        let buffer = |tensor: &'a Tensor| tensor.buffer(gpu, op);
        let inputs = [buffer(q)?, buffer(k)?, buffer(v)?, buffer(d_o.unwrap_or(q))?];
        gpu.dispatch(Dispatch {
            kernel: &KERNEL,
            defines: &defines(wide(shape.head_dim), d_o.is_some()),
            buffers: &[inputs, [&packed.queries, &packed.keys, &packed.query_scales, &packed.key_scales]].concat(),
            params: bytemuck::bytes_of(&params),
            groups: query_tiles * if d_o.is_some() { 2 } else { 1 } + 2 * key_tiles,
            flops_per_group: (4 * TILE * shape.head_dim) as u64,
        })?;
        Ok(packed)
    }

    /// The first bindings of the cooperative-matrix attention kernels.
    pub fn operands(&self) -> [&Buffer; 4] {
        [&self.queries, &self.keys, &self.query_scales, &self.key_scales]
    }
}

fn defines(wide: usize, backward: bool) -> Defines {
    Defines::new().with("wide", wide as u32).with("backward", backward).with("f16", true)
}

/// Text constants of every variant.
fn variants(tier: Tier) -> Vec<Defines> {
    let widths = [48, 128].into_iter().filter(|_| tier.cooperative());
    widths.flat_map(|wide| [false, true].map(|backward| defines(wide, backward))).collect()
}

/// The formula for one row of a head. Returns its factor, the values of both planes of a pair of
/// f16, and of a single plane.
#[cfg(test)]
fn reference(row: &[f32], wide: usize) -> (f32, [Vec<f32>; 3]) {
    let factor = crate::kernels::rows::row_factor::reference(row);
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

    /// Checks a packed tensor, whose first plane is number `first` of its side. `planes` says for
    /// each plane which reference plane it is and whether it is transposed.
    fn check(
        context: &str,
        x: &[f32],
        side: Side,
        (values, scales): (&[f32], &[f32]),
        first: usize,
        planes: &[(usize, bool)],
    ) {
        let Side { count, heads, head_dim, .. } = side;
        let (wide, padded) = (wide(head_dim), side.rows() / heads);
        for (at, (head, m)) in (0..heads).flat_map(|head| (0..padded).map(move |m| (head, m))).enumerate() {
            let row = (m < count).then(|| &x[(m * heads + head) * head_dim..][..head_dim]);
            let (scale, wanted) = reference(row.unwrap_or(&[]), wide);
            assert_eq!(scales[at], scale, "{context}: head {head} row {m}");
            for (plane, &(of, transposed)) in (first..).zip(planes) {
                let value = |d: usize| {
                    let (row, column) = if transposed { (d % TILE, at % TILE) } else { (at % TILE, d % TILE) };
                    let tile = (plane * side.rows() + at) / TILE * (wide / TILE) + d / TILE;
                    values[tile * TILE * TILE + row * TILE + column]
                };
                let got: Vec<f32> = (0..wide).map(value).collect();
                let wanted = &wanted[of];
                // A driver may flush subnormals, and may round to either side.
                let bounds: Vec<f64> = wanted.iter().map(|value| 1e-3 * f64::from(value.abs()) + 7e-5).collect();
                let context = format!("{context}: head {head} row {m} plane {plane}");
                testing::assert_close(&context, &got, &testing::wide(wanted), &bounds);
            }
        }
    }

    pub fn twin(device: &Device) {
        let Device::Gpu(gpu) = device else { return };
        if gpu.cooperative().is_none() {
            return;
        }
        let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 44, scale: 1.0 };
        let (queries, keys) = (70, 131);
        let values = |seed, rows: usize| {
            let mut x = testing::values(seed, rows * shape.head_dim, 1.0);
            for (row, amplitude) in [1e5, 1e-8, 0.0, 1e30].into_iter().enumerate() {
                x[row * shape.head_dim..(row + 1) * shape.head_dim].iter_mut().for_each(|value| *value *= amplitude);
            }
            x
        };
        let [q, d_o] = [1, 2].map(|seed| values(seed, queries * shape.heads));
        let [k, v] = [3, 4].map(|seed| values(seed, keys * shape.kv_heads));
        let tensor = |heads: usize, x: &[f32]| {
            let columns = heads * shape.head_dim;
            Tensor::from_slice(device, &[x.len() / columns, columns], x).unwrap()
        };
        let [of_q, of_do] = [&q, &d_o].map(|x| tensor(shape.heads, x));
        let [of_k, of_v] = [&k, &v].map(|x| tensor(shape.kv_heads, x));
        let visibility = Visibility::ranges(device, &vec![(0, keys as u32); queries], keys).unwrap();
        for backward in [false, true] {
            let qkv = [&of_q, &of_k, &of_v];
            let packed = Packed::new(gpu, "test", qkv, backward.then_some(&of_do), &shape, &visibility).unwrap();
            let read = |buffer, count: usize| gpu.read(buffer, 4 * count as u64).unwrap();
            let halves = |buffer, side: Side| -> Vec<f32> {
                let half = |pair: &[u8]| half::f16::from_le_bytes([pair[0], pair[1]]).to_f32();
                read(buffer, side.values()).chunks(2).map(half).collect()
            };
            let [of_queries, of_keys] = Side::of(&shape, &visibility, backward);
            let scales = |buffer, side: Side| from_bytes(&read(buffer, side.scales()));
            let (queries, keys) = (halves(&packed.queries, of_queries), halves(&packed.keys, of_keys));
            let query_scales = scales(&packed.query_scales, of_queries);
            let key_scales = scales(&packed.key_scales, of_keys);
            let context = |what| format!("{device:?} backward={backward} {what}");
            // The planes in order, and the reference plane of each.
            let exact = [(0, false), (1, false), (2, true)];
            let exact = if backward { &exact[..] } else { &exact[..2] };
            check(&context("Q"), &q, of_queries, (&queries, &query_scales), 0, exact);
            check(&context("K"), &k, of_keys, (&keys, &key_scales), 0, exact);
            let of_v = (&keys[..], &key_scales[of_keys.rows()..]);
            check(&context("V"), &v, of_keys, of_v, exact.len(), &[(2, !backward)]);
            if backward {
                let of_do = (&queries[..], &query_scales[of_queries.rows()..]);
                check(&context("dO"), &d_o, of_queries, of_do, 3, &[(2, false), (2, true)]);
            }
        }
    }
}
