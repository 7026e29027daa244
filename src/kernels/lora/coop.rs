//! OUT [P, Q] = s * L * R by cooperative matrices, where P or Q is a rank:
//! [`lora_down`](crate::kernels::lora::down), [`lora_dh`](crate::kernels::lora::dh) and
//! [`lora_dw`](crate::kernels::lora::dw) for many tokens in that tier. Operands are staged as f16
//! with powers of two that keep their range. Sums are f32, in parts that a second pass adds up in a
//! fixed order.

use crate::device::{Cooperative, Defines, Dispatch, Gpu, Tier};
use crate::error::Result;
use crate::kernels::elementwise::dropout::Dropout;
use crate::kernels::qmatmul::call::GEMV_ROWS;
use crate::kernels::rows::column_sum::{Partial, rows_each};
use crate::kernels::{Rows, kernel, params};
use crate::tensor::Tensor;

params! {
    struct LoraCoopParams {
        first_group: u32,
        groups: u32,
        /// P.
        rows: u32,
        /// Q.
        columns: u32,
        /// C, contracted index.
        contracted: u32,
        /// Contracted values per part.
        each: u32,
        /// Workgroups along P.
        row_groups: u32,
        /// Workgroups along Q.
        column_groups: u32,
        /// s, times the dropout's 1 / (1 - p).
        scale: f32,
        /// Lower half of the dropout's seed, then the upper half.
        seed_low: u32,
        seed_high: u32,
        /// Values with a hash below this are dropped.
        drop_below: u32,
        /// Always 1.
        keep_scale: f32,
    }
}

kernel! {
    KERNEL = "lora_coop" in "lora/coop.wgsl", LoraCoopParams,
        [left: Read, right: Read, factor: Read, out: Write],
    variants: variants,
    twin: super::dw::tests::twin,
}

/// The larger operand. Other kernels share its row factors.
#[derive(Clone, Copy)]
pub(crate) struct Large<'a> {
    pub rows: Rows<'a>,
    /// Whether the contracted index runs along its rows: L [P, C], R [Q, C]. Otherwise L is
    /// [C, P], R [C, Q].
    pub along: bool,
    /// Dropout of its values.
    pub dropout: Option<Dropout>,
}

/// The operand with a rank. The workgroups compute its factors themselves.
#[derive(Clone, Copy)]
pub(crate) struct Small<'a> {
    pub tensor: &'a Tensor,
    /// Like in [`Large`].
    pub along: bool,
}

/// L and R.
#[derive(Clone, Copy)]
pub(crate) enum Operands<'a> {
    LargeLeft(Large<'a>, Small<'a>),
    LargeRight(Small<'a>, Large<'a>),
}

/// Returns the device's cooperative matrices, if it multiplies `tokens` rows with them.
pub(crate) fn of(gpu: &Gpu, tokens: usize) -> Option<Cooperative> {
    gpu.cooperative().filter(|_| tokens > GEMV_ROWS)
}

/// The longer and the shorter side of a tile of OUT, fixed by the shader: four subgroups of 16 x
/// 16.
const TILE: (usize, usize) = (64, 16);
/// Contracted values that the shader stages at a time; a part has a multiple of them.
const DEPTH: usize = 32;
/// Minimum contracted values per part, so that it stores little compared with what it reads.
const SHORTEST: usize = 256;
/// Maximum contracted values that aren't split into parts: adding up parts takes a dispatch, which
/// costs as much as they would save.
const WHOLE: usize = 1536;
/// Maximum values of all parts together: 32 MiB.
const MAX_PARTIAL_VALUES: usize = 8 << 20;

/// Division of the work.
struct Division {
    row_groups: usize,
    column_groups: usize,
    /// Contracted values per part.
    each: usize,
    parts: usize,
}

impl Division {
    /// Divides OUT [rows, columns], neither of them 0.
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

/// Layout of the operands in memory.
#[derive(Clone, Copy)]
struct Form {
    /// Which operand is the larger one: "left" or "right".
    large: &'static str,
    /// Whether the contracted index runs along the rows of L, and of R.
    along: [bool; 2],
    dropout: bool,
}

impl Form {
    /// The forms for H, G, dA and dB.
    const ALL: [Form; 4] = [
        Form { large: "left", along: [true, true], dropout: true },
        Form { large: "left", along: [true, false], dropout: false },
        Form { large: "right", along: [false, false], dropout: true },
        Form { large: "left", along: [false, false], dropout: false },
    ];

    /// Text constants. `quads`: the rows of both operands have a length divisible by 4, and are
    /// read four values at a time.
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

/// Text constants of every variant.
fn variants(tier: Tier) -> Vec<Defines> {
    if !tier.cooperative() {
        return Vec::new();
    }
    let each = |cooperative| {
        // A wide H occurs if there are fewer tokens than ranks.
        let sizes = [(false, true), (true, true), (false, false), (true, false)];
        Form::ALL.into_iter().flat_map(move |form| sizes.map(|(wide, quads)| form.defines(cooperative, wide, quads)))
    };
    Cooperative::ALL.into_iter().flat_map(each).collect()
}

/// Computes s * L * R as the tensor `what`: [P, Q]. P, Q and C are not 0.
pub(crate) fn product(
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
    // The products read X and dY too, with the contracted index of this kernel along their rows.
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
        // The dropout's scale is unbounded, so it must stay out of f16.
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

/// Error bound of tests of a product over this many tokens: that of f16 operands with cooperative
/// matrices, else that of f32.
#[cfg(test)]
pub(crate) fn tolerance(device: &crate::Device, tokens: usize) -> crate::testing::tolerances::Bound {
    use crate::testing::tolerances::LORA;
    match device {
        crate::Device::Gpu(gpu) if of(gpu, tokens).is_some() => LORA.f16,
        _ => LORA.f32,
    }
}
