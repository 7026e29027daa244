//! [`qmatmul`](super::qmatmul) by cooperative matrices: square tiles of Y, operands staged as f16 in workgroup memory with powers
//! of two that keep their range, sums in f32. One shader for both sizes of matrices.

use super::kernel;
use super::packing::Part;
use super::qmatmul_operands::{GpuCall, QmatmulParams};
use super::qmatmul_tile::{has_room, with_tile};
use crate::device::{Buffer, Cooperative, Defines, Dispatch, Gpu};
use crate::error::Result;

kernel! {
    /// `shaders/qmatmul_coop.wgsl`
    KERNEL = "qmatmul_coop", QmatmulParams,
        [x: Read, w: Read, bias: Read, h: Read, b: Read, row_factor: Read, w4: Read, y: Write]
}

/// A square tile of the result, which some subgroups share.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// Rows and columns.
    pub side: u32,
    pub subgroups: u32,
    /// The form with two buffers of operands; `shaders/shared/coop_tiles.wgsl`.
    pub double: bool,
}

/// By what they take, the smallest first. A larger tile decodes each weight for more rows. Which is the fastest is measured.
const SINGLE_64: Tile = Tile { side: 64, subgroups: 4, double: false };
const DOUBLE_64: Tile = Tile { side: 64, subgroups: 4, double: true };
const SINGLE_128: Tile = Tile { side: 128, subgroups: 8, double: false };
const DOUBLE_128: Tile = Tile { side: 128, subgroups: 8, double: true };

impl Tile {
    pub const ALL: [Tile; 4] = [SINGLE_64, DOUBLE_64, SINGLE_128, DOUBLE_128];

    /// Those that a device has room for, the smallest first; the first is for every device. Two buffers leave AMD's GPUs too few
    /// workgroups, and on NVIDIA's the large tile was always slower with one.
    pub fn of(gpu: &Gpu, cooperative: Cooperative) -> &'static [Tile] {
        let tiles: &[Tile] = match gpu.info().vendor {
            _ if !cooperative.vectors => &[SINGLE_64, SINGLE_128],
            AMD => &[SINGLE_64, SINGLE_128],
            NVIDIA => &[SINGLE_64, DOUBLE_64, DOUBLE_128],
            _ => &Tile::ALL,
        };
        let fits = |tile: &&Tile| has_room(gpu, tile.subgroups * cooperative.lanes, tile.bytes());
        &tiles[..tiles.iter().take_while(fits).count().max(1)]
    }

    /// Workgroup memory that it takes at most: buffers of both operands, a strip of each subgroup's results, and tables.
    fn bytes(self) -> u32 {
        let buffers = if self.double { 2 } else { 1 };
        let strip = if self.double { 128 / self.subgroups } else { 16 };
        let operands = 2 * buffers * (2 * (40 * self.side - 8));
        operands + 4 * 16 * strip * self.subgroups + if self.double { 64 } else { 4096 }
    }

    /// Adds the text constants of `shaders/shared/coop_tiles.wgsl`.
    pub fn defines(self, defines: Defines) -> Defines {
        defines.with("side", self.side).with("subgroups", self.subgroups).with("double", self.double)
    }
}

/// PCI vendors.
const AMD: u32 = 0x1002;
const NVIDIA: u32 = 0x10de;

/// What a variant's text depends on beside the matrix and the device.
#[derive(Clone, Copy)]
struct Form {
    tile: Tile,
    /// Results are stored four at a time.
    quads: bool,
    /// H and B are read four ranks at a time.
    rank_quads: bool,
}

/// Text constants beside the matrix's.
fn defines(matrix: Defines, cooperative: Cooperative, form: Form) -> Defines {
    let matrix = form.tile.defines(cooperative.defines(matrix)).with("quads", form.quads);
    matrix.with("rank_quads", form.rank_quads).with("share", false)
}

/// Every variant's text constants, for the registry test.
pub(crate) fn variants(matrices: &[Defines]) -> Vec<Defines> {
    let mut all = Vec::new();
    for cooperative in Cooperative::ALL {
        let of = |matrix: &Defines, tile, quads| {
            defines(matrix.clone(), cooperative, Form { tile, quads, rank_quads: quads })
        };
        all.extend(matrices.iter().map(|matrix| of(matrix, Tile::ALL[0], true)));
        all.push(of(&matrices[0], Tile::ALL[0], false));
        all.extend(Tile::ALL[1..].iter().flat_map(|&tile| [true, false].map(|quads| of(&matrices[0], tile, quads))));
    }
    all
}

/// `factor`: that of the rows of X ([`row_factor`](super::row_factor)).
pub(crate) fn dispatch(call: &GpuCall<'_>, part: &Part, factor: &Buffer, cooperative: Cooperative) -> Result<()> {
    let (quads, rank_quads) = (call.stores_quads(part), call.reads_rank_quads());
    let run = |tile: Tile| {
        let operands = call.operands(part)?;
        let side = tile.side;
        let column_groups = (part.rows.len() as u32).div_ceil(side);
        let params = QmatmulParams { column_groups, ..call.params(part) };
        call.gpu.dispatch(Dispatch {
            kernel: &KERNEL,
            defines: &defines(call.w.wide_defines(), cooperative, Form { tile, quads, rank_quads }),
            buffers: &[&operands[..], &[factor, &part.buffer, call.y]].concat(),
            params: bytemuck::bytes_of(&params),
            groups: u64::from((call.m as u32).div_ceil(side)) * u64::from(column_groups),
            flops_per_group: call.flops(side.into(), side.into()),
        })
    };
    with_tile(call.gpu, &KERNEL, (call.m, call.w, part), Tile::of(call.gpu, cooperative), true, run)
}
