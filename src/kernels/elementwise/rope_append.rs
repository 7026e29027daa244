//! Updates a layer's cache with the next tokens of a sequence: Y = rope(Q),
//! `keys[first + i]` = rope(K)`[i]` and `values[first + i]` = `V[i]`, for tokens at positions from
//! `first` on. All in one dispatch: a token has few values, and each dispatch costs the host the
//! same.
//!
//! Reference: see [`rope`](crate::kernels::elementwise::rope).

use super::rope::{RopeTable, THREADS, defines, layouts, turn_rows};
use crate::device::Dispatch;
use crate::error::{Error, Result};
use crate::kernels::{expect_2d, expect_shape, kernel, params};
use crate::tensor::{Storage, Tensor};

const OP: &str = "rope_append";

params! {
    struct RopeAppendParams {
        first_group: u32,
        groups: u32,
        /// Pairs of Q.
        pairs: u32,
        /// Pairs of K, and of V.
        kv_pairs: u32,
        /// Pairs in the query of one token.
        row_pairs: u32,
        kv_row_pairs: u32,
        /// Position of the first token, and its row in the cache.
        first: u32,
        /// D / 2.
        half: u32,
        /// Rows of the table.
        positions: u32,
    }
}

kernel! {
    KERNEL = "rope_append" in "elementwise/rope_append.wgsl", RopeAppendParams,
        [q: Read, k: Read, v: Read, cosines: Read, sines: Read, y: Write, keys: Write, values: Write],
    variants: |_| layouts(),
    twin: tests::twin,
}

/// Rotates `q` [M, H * D] and `k` [M, H' * D] by the angles of positions `first` to `first + M -
/// 1`. Overwrites the rows of `keys` and `values` [capacity, H' * D] from `first` on with the
/// rotated K and with `v` [M, H' * D]. Returns the rotated Q.
///
/// # Errors
/// [`Error::Shape`] if shapes disagree, rows don't fit or the table has too few positions,
/// [`Error::DeviceMismatch`].
pub fn rope_append(
    [keys, values]: [&mut Tensor; 2],
    first: usize,
    [q, k, v]: [&Tensor; 3],
    table: &RopeTable,
) -> Result<Tensor> {
    let ((rows, width), (capacity, kv_width)) = (expect_2d(OP, "Q", q)?, expect_2d(OP, "the keys", keys)?);
    expect_shape(OP, "the values", values, &[capacity, kv_width])?;
    expect_shape(OP, "K", k, &[rows, kv_width])?;
    expect_shape(OP, "V", v, &[rows, kv_width])?;
    let head_dim = table.config().head_dim;
    for (what, cols) in [("Q", width), ("K", kv_width)] {
        if cols == 0 || !cols.is_multiple_of(head_dim) {
            let expected = format!("a multiple of {head_dim}");
            return Err(Error::shape(OP, what, expected, cols));
        }
    }
    if first + rows > capacity.min(table.positions()) {
        let expected = format!("tokens that fit {capacity} rows and a table of {} positions", table.positions());
        return Err(Error::shape(OP, "the tokens", expected, format!("{rows} from {first} on")));
    }
    let others = [&*values, k, v, keys, table.cosines()];
    others.iter().try_for_each(|other| q.device().same(&other.device(), OP))?;
    match q.storage() {
        Storage::Cpu(cpu, host) => {
            let positions: Vec<u32> = (first as u32..(first + rows) as u32).collect();
            let mut y = cpu.zeros(q.len())?;
            turn_rows(host, table, &positions, 1.0, width, &mut y)?;
            let at = first * kv_width..(first + rows) * kv_width;
            turn_rows(k.host(OP)?, table, &positions, 1.0, kv_width, &mut keys.host_mut(OP)?[at])?;
            values.set_rows(first, v)?;
            Ok(Tensor::from_host(cpu, q.shape(), y))
        }
        Storage::Gpu(gpu, q_buffer) => {
            keys.unshare()?;
            values.unshare()?;
            let y = Tensor::uninit(gpu, "rope", q.shape())?;
            let params = RopeAppendParams {
                pairs: (q.len() / 2) as u32,
                kv_pairs: (k.len() / 2) as u32,
                row_pairs: (width / 2) as u32,
                kv_row_pairs: (kv_width / 2) as u32,
                first: first as u32,
                half: (head_dim / 2) as u32,
                positions: table.positions() as u32,
                ..Default::default()
            };
            gpu.dispatch(Dispatch {
                kernel: &KERNEL,
                defines: &defines(table.config().layout),
                buffers: &[
                    q_buffer,
                    k.buffer(gpu, OP)?,
                    v.buffer(gpu, OP)?,
                    table.cosines().buffer(gpu, OP)?,
                    table.sines().buffer(gpu, OP)?,
                    y.buffer(gpu, OP)?,
                    keys.buffer(gpu, OP)?,
                    values.buffer(gpu, OP)?,
                ],
                params: bytemuck::bytes_of(&params),
                groups: u64::from((params.pairs + 2 * params.kv_pairs).div_ceil(THREADS)),
                flops_per_group: 6 * u64::from(THREADS),
            })?;
            Ok(y)
        }
        Storage::Planned(cpu, _) => Tensor::planned(cpu, q.shape()),
    }
}

/// The formula for the keys, already rotated, or for the values: rows of `width` from `first` on.
#[cfg(test)]
pub(crate) fn reference<T: Copy>(cache: &[T], first: usize, width: usize, rows: &[T]) -> Vec<T> {
    let at = first * width;
    [&cache[..at], rows, &cache[at + rows.len()..]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::indices::Indices;
    use crate::kernels::elementwise::rope::{RopeConfig, RopeLayout, RopeScaling, rope};
    use crate::testing;

    fn table(device: &Device, layout: RopeLayout, positions: usize) -> RopeTable {
        let config = RopeConfig { theta: 10_000.0, head_dim: 6, scaling: RopeScaling::None, layout };
        RopeTable::new(device, &config, positions).unwrap()
    }

    pub fn twin(device: &Device) {
        for layout in [RopeLayout::HalfSplit, RopeLayout::Interleaved] {
            for (capacity, [heads, kv_heads], first, rows) in
                [(9, [3, 1], 2, 1), (70, [4, 2], 3, 60), (3, [1, 1], 0, 3), (5, [2, 2], 5, 0)]
            {
                let table = table(device, layout, 80);
                let tensor = |seed: u64, rows: usize, heads: usize| {
                    let values = testing::values(seed, rows * heads * 6, 1.0);
                    Tensor::from_slice(device, &[rows, heads * 6], &values).unwrap()
                };
                let [mut keys, mut values] = [1, 2].map(|seed| tensor(seed, capacity, kv_heads));
                let (old_keys, old_values) = (keys.clone(), values.clone());
                let (q, k, v) = (tensor(3, rows, heads), tensor(4, rows, kv_heads), tensor(5, rows, kv_heads));
                let y = rope_append([&mut keys, &mut values], first, [&q, &k, &v], &table).unwrap();
                let positions: Vec<u32> = (first as u32..(first + rows) as u32).collect();
                let positions = Indices::from_slice(device, &positions).unwrap();
                let [wanted, turned] = [&q, &k].map(|x| rope(x, &table, &positions).unwrap().to_vec().unwrap());
                assert_eq!(y.to_vec().unwrap(), wanted, "{}", testing::name(device));
                let all = |old: &Tensor, rows: &[f32]| reference(&old.to_vec().unwrap(), first, kv_heads * 6, rows);
                // The clones shared the values, and keep the old ones.
                assert_eq!(keys.to_vec().unwrap(), all(&old_keys, &turned), "{}", testing::name(device));
                assert_eq!(values.to_vec().unwrap(), all(&old_values, &v.to_vec().unwrap()));
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let device = Device::cpu();
        let zeros = |rows: usize, width: usize| Tensor::zeros(&device, &[rows, width]).unwrap();
        let message = |capacity: usize, width: usize, first: usize| {
            let (mut keys, mut values) = (zeros(capacity, width), zeros(capacity, width));
            let (q, k) = (zeros(2, 12), zeros(2, width));
            let table = table(&device, RopeLayout::HalfSplit, 7);
            rope_append([&mut keys, &mut values], first, [&q, &k, &k], &table).unwrap_err().to_string()
        };
        assert!(message(4, 6, 3).contains("2 from 3 on"));
        assert!(message(10, 6, 6).contains("7 positions"));
        assert!(message(4, 8, 0).contains("multiple of 6"));
    }
}
