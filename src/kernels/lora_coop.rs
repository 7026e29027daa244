//! OUT [P, Q] = s * L * R by cooperative matrices, where P or Q is a rank: what [`lora_down`](super::lora_down),
//! [`lora_dh`](super::lora_dh) and [`lora_dw`](super::lora_dw) are for many tokens in that tier. Operands are staged as f16 with
//! powers of two that keep their range, sums are f32, in parts that a second pass adds up in a fixed order.

use super::column_sum::{Partial, rows_each};
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
        [left: Read, right: Read, factor: Read, out: Write]
}

/// The larger operand, whose row factors other kernels share.
#[derive(Clone, Copy)]
pub(super) struct Large<'a> {
    pub rows: Rows<'a>,
    /// The contracted index runs along its rows: L [P, C], R [Q, C]; otherwise L is [C, P], R [C, Q].
    pub along: bool,
    /// Of its values.
    pub dropout: Option<Dropout>,
}

/// The operand with a rank, whose factors the workgroups find.
#[derive(Clone, Copy)]
pub(super) struct Small<'a> {
    pub tensor: &'a Tensor,
    /// As in [`Large`].
    pub along: bool,
}

/// L and R.
#[derive(Clone, Copy)]
pub(super) enum Operands<'a> {
    LargeLeft(Large<'a>, Small<'a>),
    LargeRight(Small<'a>, Large<'a>),
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
/// The longest contracted index that is no parts: adding these up takes a dispatch, which costs as much as they would save.
const WHOLE: usize = 1536;
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
        let shortest = if contracted > WHOLE { SHORTEST } else { contracted };
        let each = filling.max(shortest).max(contracted.div_ceil(most_parts)).next_multiple_of(DEPTH);
        Division { row_groups, column_groups, each, parts: contracted.div_ceil(each) }
    }
}

fn is_wide(rows: usize, columns: usize) -> bool {
    columns > rows
}

/// What the operands are.
#[derive(Clone, Copy)]
struct Form {
    /// The larger one: "left" or "right".
    large: &'static str,
    /// The contracted index runs along the rows of L, of R.
    along: [bool; 2],
    dropout: bool,
}

impl Form {
    /// Of H, G, dA and dB.
    const ALL: [Form; 4] = [
        Form { large: "left", along: [true, true], dropout: true },
        Form { large: "left", along: [true, false], dropout: false },
        Form { large: "right", along: [false, false], dropout: true },
        Form { large: "left", along: [false, false], dropout: false },
    ];

    /// Text constants. `quads`: the rows of both operands end at whole quads, and are read four values at a time.
    fn defines(self, cooperative: Cooperative, wide: bool, quads: bool) -> Defines {
        cooperative
            .defines(Defines::new())
            .with("wide", wide)
            .with("quads", quads)
            .with("large", self.large)
            .with("left_along", self.along[0])
            .with("right_along", self.along[1])
            .with("dropout", self.dropout)
    }
}

/// Every variant's text constants, for the registry test.
pub(crate) fn variants() -> Vec<Defines> {
    let each = |cooperative| {
        // A wide H where there are fewer tokens than ranks.
        let sizes = [(false, true), (true, true), (false, false), (true, false)];
        Form::ALL.into_iter().flat_map(move |form| sizes.map(|(wide, quads)| form.defines(cooperative, wide, quads)))
    };
    Cooperative::ALL.into_iter().flat_map(each).collect()
}

/// Computes s * L * R as the tensor `what`: [P, Q], none of P, Q and C 0.
pub(super) fn product(
    gpu: &Gpu,
    cooperative: Cooperative,
    what: &'static str,
    operands: Operands<'_>,
    scale: f32,
) -> Result<Tensor> {
    let (Operands::LargeLeft(large, small) | Operands::LargeRight(small, large)) = operands;
    let sides = [(large.rows.tensor, large.along), (small.tensor, small.along)];
    let (side, [left, right]) = match operands {
        Operands::LargeLeft(..) => ("left", sides),
        Operands::LargeRight(..) => ("right", [sides[1], sides[0]]),
    };
    let size = |(tensor, along): (&Tensor, bool)| {
        let (rows, columns) = (tensor.shape()[0], tensor.shape()[1]);
        if along { (rows, columns) } else { (columns, rows) }
    };
    let ((rows, contracted), (columns, _)) = (size(left), size(right));
    let out = Tensor::uninit(gpu, what, &[rows, columns])?;
    let end = out.buffer(gpu, what)?;
    let division = Division::of(gpu, [rows, columns, contracted]);
    // Products read X and dY too, whose rows run along the contracted index here.
    let factors = match large.along {
        true => large.rows.found_beside_product(gpu, what)?,
        false => large.rows.found(gpu, what)?,
    };
    let parts = division.parts;
    let partial = Partial::new(gpu, "parts of a product", parts, rows * columns)?;
    let (seed_low, seed_high, drop_below, keep_scale) = Dropout::params(large.dropout);
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
    let quads = sides.iter().all(|(tensor, _)| tensor.shape()[1].is_multiple_of(4));
    let form = Form { large: side, along: [left.1, right.1], dropout: large.dropout.is_some() };
    gpu.dispatch(Dispatch {
        kernel: &KERNEL,
        defines: &form.defines(cooperative, is_wide(rows, columns), quads),
        buffers: &[left.0.buffer(gpu, what)?, right.0.buffer(gpu, what)?, factors, partial.or(end)],
        params: bytemuck::bytes_of(&params),
        groups: (division.row_groups * division.column_groups * parts) as u64,
        flops_per_group: 2 * (TILE.0 * TILE.1 * division.each) as u64,
    })?;
    partial.add_up(gpu, end)?;
    Ok(out)
}

/// What [`product`] takes beside OUT [P, Q] for C contracted values, and beside the factors that others share.
pub(super) fn scratch(gpu: &Gpu, sizes: [usize; 3]) -> Scratch {
    Partial::scratch(gpu, Division::of(gpu, sizes).parts, sizes[0] * sizes[1])
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
