//! [`qmatmul`](crate::kernels::qmatmul) by cooperative matrices: tiles of Y, operands staged as f16
//! in workgroup memory with powers of two that keep their range, sums in f32. One shader serves
//! both sizes of cooperative matrices.

use super::call::{GpuCall, QmatmulParams};
use super::tile::{has_room, with_tile};
use crate::device::{Buffer, Cooperative, Defines, Dispatch, Gpu, Tier};
use crate::error::Result;
use crate::kernels::kernel;
use crate::kernels::matrix::packing::Part;
use crate::kernels::matrix::variants::wide_matrices;

kernel! {
    KERNEL = "qmatmul_coop" in "qmatmul/coop.wgsl", QmatmulParams,
        [x: Read, w: Read, bias: Read, h: Read, b: Read, row_factor: Read, w4: Read, y: Write],
    variants: variants,
    twin: super::tests::twin_of_many_rows,
}

/// A tile of the result, shared by several subgroups.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    pub rows: u32,
    pub columns: u32,
    pub subgroups: u32,
    /// Uses the form with two buffers of operands; `shaders/qmatmul/shared/coop_tiles.wgsl`.
    pub double: bool,
}

/// Smallest first. A larger tile decodes each weight for more rows; which one is fastest is
/// measured.
const SINGLE_64: Tile = Tile { rows: 64, columns: 64, subgroups: 4, double: false };
const DOUBLE_64: Tile = Tile { double: true, ..SINGLE_64 };
const SINGLE_128: Tile = Tile { rows: 128, columns: 128, subgroups: 8, double: false };
const DOUBLE_WIDE: Tile = Tile { columns: 128, ..DOUBLE_64 };
const DOUBLE_128: Tile = Tile { double: true, ..SINGLE_128 };

impl Tile {
    pub const ALL: [Tile; 5] = [SINGLE_64, DOUBLE_64, SINGLE_128, DOUBLE_WIDE, DOUBLE_128];

    /// The tiles that fit a device and that `m` rows fill, smallest first; the first one fits
    /// every device. With two buffers AMD's GPUs run too few workgroups, and on NVIDIA's the large
    /// tile was always slower with one buffer.
    pub fn of(gpu: &Gpu, cooperative: Cooperative, m: usize) -> &'static [Tile] {
        let few = m <= SINGLE_64.rows as usize;
        let tiles: &[Tile] = match gpu.info().vendor {
            vendor if !cooperative.vectors || vendor == AMD => &[SINGLE_64, SINGLE_128][..if few { 1 } else { 2 }],
            _ if few => &[SINGLE_64, DOUBLE_64],
            NVIDIA => &[SINGLE_64, DOUBLE_64, DOUBLE_WIDE, DOUBLE_128],
            _ => &Tile::ALL,
        };
        let fits = |tile: &&Tile| has_room(gpu, tile.subgroups * cooperative.lanes, tile.bytes());
        &tiles[..tiles.iter().take_while(fits).count().max(1)]
    }

    /// Maximum workgroup memory: buffers of both operands, a strip of results per subgroup, and
    /// tables.
    fn bytes(self) -> u32 {
        let buffers = if self.double { 2 } else { 1 };
        let strip = if self.double { 128 / self.subgroups } else { 16 };
        let operands = buffers * 2 * (40 * (self.rows + self.columns) - 16);
        operands + 4 * 16 * strip * self.subgroups + if self.double { 64 } else { 4096 }
    }

    /// Number of workgroups for a result [m, n] with this many splits.
    pub fn groups(self, [m, n, splits]: [usize; 3]) -> u64 {
        (m.div_ceil(self.rows as usize) * n.div_ceil(self.columns as usize) * splits) as u64
    }

    /// Adds the text constants of `shaders/qmatmul/shared/coop_tiles.wgsl`.
    pub fn defines(self, defines: Defines) -> Defines {
        let sizes = defines.with("tile_rows", self.rows).with("tile_columns", self.columns);
        sizes.with("subgroups", self.subgroups).with("double", self.double)
    }
}

/// PCI vendors.
const AMD: u32 = 0x1002;
pub(crate) const NVIDIA: u32 = 0x10de;

/// Number of workgroups that occupies a large device.
const WANTED_GROUPS: usize = 256;
/// Minimum contracted values per split, so that it stores little compared with what it reads.
const SHORTEST: usize = 1024;

/// Number of splits of a product's contracted index, with cooperative matrices. It depends on the
/// shape alone, so the order of sums does too.
pub(crate) fn splits(gpu: &Gpu, [m, n, contracted]: [usize; 3]) -> usize {
    if gpu.cooperative().is_none() {
        return 1;
    }
    let tiles = m.div_ceil(SINGLE_64.rows as usize) * n.div_ceil(SINGLE_64.columns as usize);
    (WANTED_GROUPS / tiles.max(1)).min(contracted / SHORTEST).max(1)
}

/// Properties of a variant's text besides the matrix and the device.
#[derive(Clone, Copy)]
struct Form {
    tile: Tile,
    /// Results are stored four at a time.
    quads: bool,
    /// H and B are read four ranks at a time.
    rank_quads: bool,
}

/// Adds text constants to those of the matrix.
fn defines(matrix: Defines, cooperative: Cooperative, form: Form) -> Defines {
    let matrix = form.tile.defines(cooperative.defines(matrix)).with("quads", form.quads);
    matrix.with("rank_quads", form.rank_quads).with("share", false)
}

/// Text constants of every variant.
fn variants(tier: Tier) -> Vec<Defines> {
    if !tier.cooperative() {
        return Vec::new();
    }
    let matrices = wide_matrices();
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

/// `x`: packed rows of X, and their factors ([`pack_rows`](crate::kernels::rows::pack_rows)).
pub(crate) fn dispatch(call: &GpuCall<'_>, part: &Part, x: [&Buffer; 2], cooperative: Cooperative) -> Result<()> {
    let [x, factor] = x;
    let (quads, rank_quads) = (call.stores_quads(part), call.reads_rank_quads());
    let run = |tile: Tile| {
        let [_, operands @ ..] = call.operands(part)?;
        call.gpu.dispatch(Dispatch {
            kernel: &KERNEL,
            defines: &defines(call.w.wide_defines(), cooperative, Form { tile, quads, rank_quads }),
            buffers: &[&[x], &operands[..], &[factor, &part.buffer, call.y]].concat(),
            params: bytemuck::bytes_of(&call.params(part)),
            groups: tile.groups([call.m, part.rows.len(), call.splits]),
            flops_per_group: call.flops(tile.rows.into(), tile.columns.into()) / call.splits as u64,
        })
    };
    with_tile(call.gpu, &KERNEL, (call.m, call.w, part), Tile::of(call.gpu, cooperative, call.m), run, run)
}
