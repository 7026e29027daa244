//! Shapes, parameters and checks that all forms of [`attention`](super::attention) share, and the
//! division of work on software drivers.

use super::visibility::Visibility;
use crate::device::{Defines, Dispatch, Gpu, Kernel, Tier};
use crate::error::{Error, Result};
use crate::kernels::{expect_2d, expect_shape, params};
use crate::tensor::Tensor;

params! {
    /// Parameters of the forward and of both backward kernels, in every form.
    struct AttentionParams {
        first_group: u32,
        groups: u32,
        /// M, rows of Q and O.
        queries: u32,
        /// Rows of K and V.
        keys: u32,
        /// H, heads of Q.
        heads: u32,
        /// Hkv, heads of K and V.
        kv_heads: u32,
        /// Factor of the scores.
        scale: f32,
        /// Log-sum-exp of a query that sees no key: minus infinity.
        no_key: f32,
    }
}

/// The heads of an attention layer, and the factor of its scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// H, query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Hkv, heads of keys and values.
    pub kv_heads: usize,
    /// D, values per head: a multiple of 4 in 8..=256.
    pub head_dim: usize,
    /// Factor of the scores; usually 1 / sqrt(D).
    pub scale: f32,
}

impl AttentionShape {
    /// Returns an error unless the kernels support this shape.
    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        let AttentionShape { heads, kv_heads, head_dim, scale } = *self;
        let grouped = kv_heads > 0 && heads > 0 && heads.is_multiple_of(kv_heads);
        if grouped && (8..=256).contains(&head_dim) && head_dim.is_multiple_of(4) && scale.is_finite() {
            return Ok(());
        }
        Err(Error::invalid(
            op,
            "the shape",
            format!("{heads} heads, {kv_heads} key heads, {head_dim} values per head, scale {scale}"),
            "heads must be a multiple of key heads, values per head a multiple of 4 in 8..=256",
        ))
    }

    /// Query heads per key head.
    pub(crate) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

/// Result of [`attention`](super::attention()).
#[derive(Clone, Debug)]
pub struct Attended {
    /// O, [M, H * D]; zeros where a query sees no key.
    pub o: Tensor,
    /// Log-sum-exp of each query's scores, [M, H]; minus infinity where the query sees no key.
    pub lse: Tensor,
}

/// Returns an error unless Q, K and V have these heads and the rows that `visibility` asks for,
/// all on one device.
pub(crate) fn expect_qkv(
    op: &'static str,
    [q, k, v]: [&Tensor; 3],
    shape: &AttentionShape,
    visibility: &Visibility,
) -> Result<()> {
    shape.check(op)?;
    expect_2d(op, "Q", q)?;
    expect_shape(op, "Q", q, &[visibility.queries(), shape.heads * shape.head_dim])?;
    for (what, tensor) in [("K", k), ("V", v)] {
        expect_shape(op, what, tensor, &[visibility.keys(), shape.kv_heads * shape.head_dim])?;
    }
    let device = q.device();
    [k.device(), v.device(), visibility.key_ranges().device()].iter().try_for_each(|other| device.same(other, op))
}

impl AttentionParams {
    pub(crate) fn new(shape: &AttentionShape, visibility: &Visibility) -> AttentionParams {
        AttentionParams {
            queries: visibility.queries() as u32,
            keys: visibility.keys() as u32,
            heads: shape.heads as u32,
            kv_heads: shape.kv_heads as u32,
            scale: shape.scale,
            no_key: f32::NEG_INFINITY,
            ..Default::default()
        }
    }
}

/// Floating-point operations of one of `groups` workgroups, for `products` products of the size of
/// Q * K^T.
pub(crate) fn flops_per_group(shape: &AttentionShape, visibility: &Visibility, products: u64, groups: u64) -> u64 {
    products * 2 * visibility.pairs() * (shape.heads * shape.head_dim) as u64 / groups.max(1)
}

/// Operands and results of a forward pass whose form reads Q, K and V as they are.
pub(crate) struct ForwardCall<'a> {
    pub op: &'static str,
    pub gpu: &'a Gpu,
    pub qkv: [&'a Tensor; 3],
    pub shape: &'a AttentionShape,
    pub visibility: &'a Visibility,
    /// O and the log-sum-exp.
    pub results: [&'a Tensor; 2],
}

impl ForwardCall<'_> {
    /// Records a form's kernel. A workgroup owns `rows` queries of a head.
    pub fn dispatch(&self, kernel: &'static Kernel, defines: &Defines, rows: usize) -> Result<()> {
        let ForwardCall { op, gpu, qkv: [q, k, v], shape, visibility, results: [o, lse] } = *self;
        let groups = (visibility.queries().div_ceil(rows) * shape.heads) as u64;
        gpu.dispatch(Dispatch {
            kernel,
            defines,
            buffers: &[
                q.buffer(gpu, op)?,
                k.buffer(gpu, op)?,
                v.buffer(gpu, op)?,
                visibility.key_ranges().buffer(gpu, op)?,
                o.buffer(gpu, op)?,
                lse.buffer(gpu, op)?,
            ],
            params: bytemuck::bytes_of(&AttentionParams::new(shape, visibility)),
            groups,
            flops_per_group: flops_per_group(shape, visibility, 2, groups),
        })
    }
}

/// Threads per workgroup: the eight lanes of a software driver's register.
const ROWS: usize = 8;
/// Approximate threads per workgroup where threads share rows; fewer if the parts of a head don't
/// divide it.
const THREADS: usize = 64;
/// The largest head that one thread owns, in values.
const MOST_ALONE: usize = 128;

/// Distribution of rows (queries or keys) and the values of their heads to a workgroup's threads,
/// on software drivers.
#[derive(Clone, Copy)]
pub(crate) struct Split {
    /// Rows per workgroup.
    pub rows: usize,
    /// Threads that share a row.
    parts: usize,
    /// vec4 of the head that each of these threads owns.
    quads: usize,
}

impl Split {
    /// One thread per row. Large heads are split into parts of at most `most` vec4, because they
    /// would compile for half a minute otherwise; but then the threads of a row must meet at
    /// barriers.
    pub fn new(head_dim: usize, most: usize) -> Split {
        let all = head_dim / 4;
        if head_dim <= MOST_ALONE {
            return Split { rows: ROWS, parts: 1, quads: all };
        }
        // Always found: `all` parts of one vec4 each fit.
        let parts = (1..all).find(|parts| all.is_multiple_of(*parts) && all / parts <= most).unwrap_or(all);
        Split { rows: (THREADS / parts).max(1), parts, quads: all / parts }
    }

    /// Text constants of the variant. Threads that meet at barriers take `tile` rows of the other
    /// side in between.
    pub fn defines(self, tile: u32) -> Defines {
        let tile = if self.parts > 1 { tile } else { 1 };
        Defines::new()
            .with("rows", self.rows as u32)
            .with("parts", self.parts as u32)
            .with("quads", self.quads as u32)
            .with("tile", tile)
    }

    /// Text constants of every variant. One of the head sizes has no useful divisor.
    pub fn variants(tier: Tier, most: usize, tile: u32) -> Vec<Defines> {
        if tier != Tier::Software {
            return Vec::new();
        }
        [8, 44, 64, 80, 128, 236, 256].map(|head_dim| Split::new(head_dim, most).defines(tile)).to_vec()
    }
}
