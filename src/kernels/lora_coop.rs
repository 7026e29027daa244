//! OUT [P, Q] = s * L * R by cooperative matrices, where P or Q is a rank: what [`lora_down`](super::lora_down),
//! [`lora_dh`](super::lora_dh) and [`lora_dw`](super::lora_dw) are for many tokens in that tier. Operands are staged as f16 with
//! powers of two that keep their range, sums are f32, in parts that a second pass adds up in a fixed order.

use super::column_sum::{self, rows_each};
use super::lora_down::Dropout;
use super::qmatmul_operands::GEMV_ROWS;
use super::{Rows, Scratch, kernel, params};
use crate::device::{Cooperative, Defines, Device, Dispatch, Gpu};
use crate::error::Result;
use crate::tensor::Tensor;

params! {
    struct LoraCoopParams {
        first_group: u32,
        groups: u32,
        /// P.
        rows: u32,
        /// Q.
        columns: u32,
        /// C.
        contracted: u32,
        /// Of them in a part.
        each: u32,
        /// Workgroups along P.
        row_groups: u32,
        /// Workgroups along Q.
        column_groups: u32,
        /// s, with the dropout's 1 / (1 - p).
        scale: f32,
        /// Lower and upper half of the dropout's seed.
        seed_low: u32,
        seed_high: u32,
        /// A value whose hash is under this is dropped.
        drop_below: u32,
        /// 1.
        keep_scale: f32,
    }
}

kernel! {
    /// `shaders/lora_coop.wgsl`
    KERNEL = "lora_coop", LoraCoopParams,
        [left: Read, right: Read, left_factor: Read, right_factor: Read, out: Write]
}

/// An operand of the product.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    pub rows: Rows<'a>,
    /// The contracted index runs along its rows: L [P, C], R [Q, C]; otherwise L is [C, P], R [C, Q].
    pub along: bool,
    /// Of its values; of one operand at most.
    pub dropout: Option<Dropout>,
}

/// The cooperative matrices of a device that multiplies `tokens` rows with them.
pub(super) fn of(gpu: &Gpu, tokens: usize) -> Option<Cooperative> {
    gpu.cooperative().filter(|_| tokens > GEMV_ROWS)
}

/// Whether products over `tokens` rows stage their operands, with a factor a row.
pub(crate) fn stages(device: &Device, tokens: usize) -> bool {
    matches!(device, Device::Gpu(gpu) if of(gpu, tokens).is_some())
}

/// The longer and the shorter side of a tile of OUT, fixed in the shader by its four subgroups of 16 x 16.
const TILE: (usize, usize) = (64, 16);
/// Values of the contracted index that the shader stages at a time: a part has a multiple of them.
const DEPTH: usize = 32;
/// The fewest of a part, so that what it stores is little beside what it reads.
const SHORTEST: usize = 256;
/// Values of all parts together, at most: 32 MiB.
const MAX_PARTIAL_VALUES: usize = 8 << 20;

/// How the work is divided.
struct Division {
    row_groups: usize,
    column_groups: usize,
    /// Contracted values of a part.
    each: usize,
    parts: usize,
}

impl Division {
    /// Of an OUT [rows, columns], neither of them 0.
    fn of(gpu: &Gpu, [rows, columns, contracted]: [usize; 3]) -> Division {
        let (long, short) = TILE;
        let tile = if is_wide(rows, columns) { (short, long) } else { (long, short) };
        let (row_groups, column_groups) = (rows.div_ceil(tile.0), columns.div_ceil(tile.1));
        let most_parts = (MAX_PARTIAL_VALUES / (rows * columns)).max(1);
        let filling = rows_each(gpu.tier(), row_groups * column_groups, contracted);
        let each = filling.max(SHORTEST).max(contracted.div_ceil(most_parts)).next_multiple_of(DEPTH);
        Division { row_groups, column_groups, each, parts: contracted.div_ceil(each) }
    }
}

fn is_wide(rows: usize, columns: usize) -> bool {
    columns > rows
}

/// Text constants. `quads`: the rows of both operands end at whole quads, and are read four values at a time.
fn defines(cooperative: Cooperative, wide: bool, quads: bool, along: [bool; 2], dropout: &'static str) -> Defines {
    cooperative
        .defines(Defines::new())
        .with("wide", wide)
        .with("quads", quads)
        .with("left_along", along[0])
        .with("right_along", along[1])
        .with("dropout", dropout)
}

/// Every variant's text constants, for the registry test.
pub(crate) fn variants() -> Vec<Defines> {
    let each = |cooperative| {
        // H, G, dA and dB; a wide H where there are fewer tokens than ranks.
        [([true, true], "left"), ([true, false], "none"), ([false, false], "right"), ([false, false], "none")]
            .into_iter()
            .flat_map(move |(along, dropout)| {
                [(false, true), (true, true), (false, false), (true, false)]
                    .map(|(wide, quads)| defines(cooperative, wide, quads, along, dropout))
            })
    };
    Cooperative::ALL.into_iter().flat_map(each).collect()
}

/// Computes s * L * R as the tensor `what`: [P, Q], none of P, Q and C 0.
pub(super) fn product(
    gpu: &Gpu,
    cooperative: Cooperative,
    what: &'static str,
    [left, right]: [Operand<'_>; 2],
    scale: f32,
) -> Result<Tensor> {
    let size = |operand: Operand<'_>| {
        let (rows, columns) = (operand.rows.tensor.shape()[0], operand.rows.tensor.shape()[1]);
        if operand.along { (rows, columns) } else { (columns, rows) }
    };
    let ((rows, contracted), (columns, _)) = (size(left), size(right));
    let out = Tensor::uninit(gpu, what, &[rows, columns])?;
    let end = out.buffer(gpu, what)?;
    let division = Division::of(gpu, [rows, columns, contracted]);
    let factors = [left.rows.found(gpu, what)?, right.rows.found(gpu, what)?];
    let parts = division.parts;
    let partial = match parts {
        1 => None,
        _ => Some(gpu.alloc("parts of a product", (parts * rows * columns * 4) as u64)?),
    };
    let (dropped, dropout) = match (left.dropout, right.dropout) {
        (Some(dropout), _) => ("left", Some(dropout)),
        (None, Some(dropout)) => ("right", Some(dropout)),
        (None, None) => ("none", None),
    };
    let (seed_low, seed_high, drop_below, keep_scale) = Dropout::params(dropout);
    let params = LoraCoopParams {
        rows: rows as u32,
        columns: columns as u32,
        contracted: contracted as u32,
        each: division.each as u32,
        row_groups: division.row_groups as u32,
        column_groups: division.column_groups as u32,
        // The dropout's scale, which has no bound, must not meet f16.
        scale: scale * keep_scale,
        seed_low,
        seed_high,
        drop_below,
        keep_scale: 1.0,
        ..Default::default()
    };
    let quads = [left, right].iter().all(|operand| operand.rows.tensor.shape()[1].is_multiple_of(4));
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &defines(cooperative, is_wide(rows, columns), quads, [left.along, right.along], dropped),
        buffers: &[
            left.rows.tensor.buffer(gpu, what)?,
            right.rows.tensor.buffer(gpu, what)?,
            factors[0],
            factors[1],
            partial.as_ref().unwrap_or(end),
        ],
        params: bytemuck::bytes_of(&params),
        groups: (division.row_groups * division.column_groups * parts) as u64,
        flops_per_group: 2 * (TILE.0 * TILE.1 * division.each) as u64,
    })?;
    if let Some(partial) = partial {
        column_sum::dispatch(gpu, &partial, None, [parts, rows * columns], 1.0, end)?;
    }
    Ok(out)
}

/// What [`product`] takes beside OUT [P, Q] for C contracted values, and beside the factors of an operand that others share. The
/// other one has so many rows.
pub(super) fn scratch(gpu: &Gpu, sizes: [usize; 3], operand_rows: usize) -> Scratch {
    let parts = Division::of(gpu, sizes).parts;
    let mut scratch = Scratch::kept([operand_rows]);
    if parts > 1 {
        let values = sizes[0] * sizes[1];
        scratch.kept.push(parts * values);
        scratch.kept.extend(column_sum::scratch(&Device::Gpu(gpu.clone()), parts, values).kept);
    }
    scratch
}

/// The bound of tests of a product over so many tokens, relative to the sum of its terms' absolute values: that of f16 operands
/// where cooperative matrices multiply, else that of f32.
#[cfg(test)]
pub(super) fn tolerance(device: &Device, tokens: usize) -> f64 {
    match device {
        Device::Gpu(gpu) if of(gpu, tokens).is_some() => 2e-3,
        _ => 1e-5,
    }
}
