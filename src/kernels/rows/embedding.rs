//! `Y = deq(W)[ids]`: the table rows for a list of token ids, [M, K] from W [rows, K] of any kind.

use rayon::prelude::*;

use crate::device::{Defines, Device, Dispatch};
use crate::error::{Error, Result};
use crate::indices::Indices;
use crate::kernels::matrix::DeviceMatrix;
use crate::kernels::matrix::packing::MatrixLayout;
use crate::kernels::matrix::variants::matrices;
use crate::kernels::{kernel, params};
use crate::tensor::Tensor;

const OP: &str = "embedding";

params! {
    struct EmbeddingParams {
        first_group: u32,
        groups: u32,
        /// K, in values.
        k: u32,
        /// M.
        tokens: u32,
        /// First row of the part, in the table.
        first_row: u32,
        /// Rows in the part.
        rows: u32,
        /// Rows in all parts.
        table_rows: u32,
        /// Padding: the matrix starts at a multiple of 16 bytes.
        unused: u32,
        m: MatrixLayout,
    }
}

kernel! {
    KERNEL = "embedding" in "rows/embedding.wgsl", EmbeddingParams, [ids: Read, w: Read, y: Write],
    variants: |_| matrices().into_iter().map(defines).collect(),
    twin: tests::twin,
}

/// Invocations per workgroup.
const THREADS: u32 = 64;

/// Adds text constants to those of the matrix.
fn defines(matrix: Defines) -> Defines {
    matrix.with("threads", THREADS)
}

/// Returns the rows of `table` with these `ids`, [M, K].
///
/// Ids must be below the number of rows; call [`check_ids`] before they go to a device. Larger
/// ones read the last row.
///
/// # Errors
/// [`Error::DeviceMismatch`], and device errors.
pub fn embedding(table: &DeviceMatrix, ids: &Indices) -> Result<Tensor> {
    table.device().same(&ids.device(), OP)?;
    let (rows, k) = (table.rows(), table.cols());
    let shape = [ids.len(), k];
    if let Device::Cpu(cpu) = table.device() {
        let Some(matrix) = table.host() else { return Tensor::planned(&cpu, &shape) };
        let mut y = cpu.zeros(ids.len() * k)?;
        y.par_chunks_mut(k).zip(ids.host(OP)?).for_each(|(y, &id)| {
            let row = (id as usize).min(rows - 1);
            matrix.dequantize_rows(row..row + 1, y);
        });
        return Ok(Tensor::from_host(&cpu, &shape, y));
    }
    let Some((gpu, parts)) = table.gpu() else {
        return Err(Error::DeviceMismatch { op: OP, left: table.device().name().into(), right: "cpu".into() });
    };
    let y = Tensor::uninit(gpu, OP, &shape)?;
    for part in parts {
        let params = EmbeddingParams {
            k: k as u32,
            tokens: ids.len() as u32,
            first_row: part.rows.start as u32,
            rows: part.rows.len() as u32,
            table_rows: rows as u32,
            m: part.layout,
            ..Default::default()
        };
        gpu.dispatch(Dispatch {
            kernel: &KERNEL,
            defines: &defines(table.defines()),
            buffers: &[ids.buffer(gpu, OP)?, &part.buffer, y.buffer(gpu, OP)?],
            params: bytemuck::bytes_of(&params),
            groups: (ids.len() * k.div_ceil(8)).div_ceil(THREADS as usize) as u64,
            flops_per_group: 32 * u64::from(THREADS),
        })?;
    }
    Ok(y)
}

/// Returns an error with the position of the first id that is not below `rows`.
///
/// # Errors
/// [`Error::Invalid`].
pub fn check_ids(ids: &[u32], rows: usize) -> Result<()> {
    match ids.iter().position(|&id| id as usize >= rows) {
        None => Ok(()),
        Some(index) => Err(Error::invalid(
            OP,
            "an id",
            format!("{} at index {index}", ids[index]),
            format!("the table has {rows} rows"),
        )),
    }
}

/// The formula, for any real type. `table` has rows of `k` values.
#[cfg(test)]
pub(crate) fn reference<T: crate::kernels::Real>(table: &[T], ids: &[u32], k: usize) -> Vec<T> {
    ids.iter().flat_map(|&id| table[id as usize * k..][..k].iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernels::qmatmul::dense_of;
    use crate::quant::HostMatrix;
    use crate::testing;
    use crate::testing::tolerances::EMBEDDING;

    fn check(device: &Device, kind: &str, matrix: &HostMatrix, ids: &[u32]) {
        let (rows, k) = (matrix.rows(), matrix.cols());
        check_ids(ids, rows).unwrap();
        let table = DeviceMatrix::new(device, matrix.clone()).unwrap();
        let y = embedding(&table, &Indices::from_slice(device, ids).unwrap()).unwrap();
        assert_eq!(y.shape(), [ids.len(), k]);
        let wanted = reference(&dense_of::<f64>(matrix), ids, k);
        // Equal to the host's values, except for flushed subnormals and a fused multiply-add in a
        // scale.
        let most = wanted.iter().fold(0.0f64, |most, value| most.max(value.abs()));
        let bounds = EMBEDDING.f32.bounds(&vec![most; wanted.len()]);
        let context = format!("{} {kind} {rows} x {k}, {} ids", testing::name(device), ids.len());
        testing::assert_close(&context, &y.to_vec().unwrap(), &wanted, &bounds);
    }

    pub fn twin(device: &Device) {
        for (rows, k) in [(13, 64), (7, 13)] {
            for (kind, matrix) in testing::matrices(5, rows, k, 0.1) {
                check(device, &kind, &matrix, &[0, 6, 6, 1, 2, 5]);
                check(device, &kind, &matrix, &[]);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]
        #[test]
        fn odd_shapes_on_every_device_and_tier(
            rows in 1..=257usize,
            k in 1..=257usize,
            tokens in 0..=257usize,
            seed in 0..1000u64,
        ) {
            let mut matrices = testing::matrices(seed, rows, k, 0.1);
            let (kind, matrix) = matrices.swap_remove(seed as usize % matrices.len());
            let ids: Vec<u32> = (0..tokens).map(|i| ((i * 7919 + seed as usize) % rows) as u32).collect();
            for device in testing::devices() {
                check(&device, &kind, &matrix, &ids);
            }
        }
    }

    #[test]
    fn a_table_over_the_binding_limit_is_read_from_its_parts() {
        for device in testing::gpus_with(|options| {
            options.max_binding_bytes = Some(24_000);
            options.immediates = false;
        }) {
            for (kind, matrix) in testing::matrices(3, 601, 96, 0.1) {
                assert!(DeviceMatrix::new(&device, matrix.clone()).unwrap().part_count() > 1, "{kind}");
                check(&device, &kind, &matrix, &[0, 600, 300, 299, 17, 600, 599, 123, 456, 1]);
            }
        }
    }

    #[test]
    fn ids_past_the_table_are_named_and_read_its_last_row() {
        let message = check_ids(&[0, 4, 5, 9], 5).unwrap_err().to_string();
        assert!(message.contains("5 at index 2") && message.contains("5 rows"), "{message}");
        for device in testing::devices() {
            let (_, matrix) = testing::matrices(1, 5, 8, 1.0).swap_remove(7);
            let table = DeviceMatrix::new(&device, matrix).unwrap();
            let rows = |ids: &[u32]| embedding(&table, &Indices::from_slice(&device, ids).unwrap()).unwrap();
            assert_eq!(rows(&[5, u32::MAX]).to_vec().unwrap(), rows(&[4, 4]).to_vec().unwrap());
        }
    }
}
