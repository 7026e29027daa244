//! Bytes of a matrix on a device, from its shape and storage format alone.

use std::ops::Range;

use crate::device::{Device, Gpu};
use crate::error::{Error, Result};
use crate::kernels::rows::pack_rows::PACKED;
use crate::quant::{MatrixKind, MatrixSpec, Q8_BLOCK, ScaleKind};

impl MatrixSpec {
    /// Bytes on a device. Equals
    /// [`DeviceMatrix::resident_bytes`](super::DeviceMatrix::resident_bytes) of the matrix itself.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if one row is over the binding limit, [`Error::Invalid`] for blocks or
    /// super-blocks of 0.
    pub fn device_bytes(&self, device: &Device) -> Result<u64> {
        let empty = |kind: ScaleKind| kind == ScaleKind::Double { super_block: 0 };
        if matches!(self.kind, MatrixKind::Quantized { block: 0, .. }) || self.kind.all_scales().any(empty) {
            return Err(Error::invalid("matrix", "block", "0", "expected at least 1"));
        }
        match device {
            Device::Cpu(_) => Ok(self.host_bytes() as u64),
            Device::Gpu(gpu) => Ok(self.part_rows(gpu)?.map(|rows| Gpu::exact_bytes(self.part_words(&rows))).sum()),
        }
    }

    /// Words of a row of codes or values in a part.
    pub(crate) fn row_words(&self) -> usize {
        let padded = self.cols.next_multiple_of(32);
        match self.kind {
            MatrixKind::Quantized { .. } => padded / 8,
            MatrixKind::F32 => self.cols.next_multiple_of(8),
            MatrixKind::Half => self.cols.next_multiple_of(8) / 2,
            MatrixKind::Q8_0 => padded / 4,
        }
    }

    /// The rows of each part, as many as the binding limit allows.
    pub(crate) fn part_rows(&self, gpu: &Gpu) -> Result<impl Iterator<Item = Range<usize>> + use<>> {
        let &MatrixSpec { rows, cols, kind } = self;
        let limit = gpu.limits().max_binding_bytes;
        // Upper bound for tables, padding and partly used super-blocks of a part.
        let overhead = 4096;
        let scale_bytes = match kind {
            MatrixKind::Quantized { block, .. } => {
                let blocks = (rows * cols).div_ceil(block);
                kind.all_scales().map(|kind| kind.host_bytes(blocks)).sum::<usize>() as f64 / rows as f64
            }
            _ => cols as f64 / 16.0,
        };
        let row_bytes = 4.0 * self.row_words() as f64 + scale_bytes;
        // Shaders index weights of a part with u32.
        let by_index = (u32::MAX as usize - 8192) / cols.next_multiple_of(32);
        let by_bytes = (limit.saturating_sub(overhead) as f64 / row_bytes) as usize;
        let rows_per_part = by_bytes.min(by_index);
        if rows_per_part == 0 {
            let (device, what) = (gpu.name().to_owned(), format!("a row of matrix {rows} x {cols}"));
            return Err(Error::TooLarge { device, what, bytes: row_bytes as u64 + overhead, limit });
        }
        // Packed rows of dY are read from a multiple of this.
        let rows_per_part = if rows_per_part > PACKED { rows_per_part / PACKED * PACKED } else { rows_per_part };
        Ok((0..rows).step_by(rows_per_part).map(move |start| start..(start + rows_per_part).min(rows)))
    }

    /// Number of words in a part with these rows.
    pub(crate) fn part_words(&self, rows: &Range<usize>) -> usize {
        let codes = rows.len() * self.row_words();
        match self.kind {
            MatrixKind::Quantized { block, .. } => {
                let blocks = rows.start * self.cols / block..(rows.end * self.cols).div_ceil(block);
                codes + self.kind.all_scales().map(|kind| scale_words(kind, &blocks)).sum::<usize>()
            }
            MatrixKind::F32 | MatrixKind::Half => codes,
            MatrixKind::Q8_0 => codes + (rows.len() * self.cols / Q8_BLOCK).div_ceil(2),
        }
    }
}

/// Words of the scales in a part with these blocks; see `pack_scales`.
fn scale_words(kind: ScaleKind, blocks: &Range<usize>) -> usize {
    match kind {
        ScaleKind::Plain => blocks.len() + 2,
        ScaleKind::Double { super_block } => {
            let supers = blocks.start / super_block..blocks.end.div_ceil(super_block);
            blocks.len().div_ceil(4) + 1 + supers.len() + 1 + 256
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::ledger::{Ledger, Part};
    use crate::kernels::DeviceMatrix;
    use crate::testing;

    #[test]
    fn bytes_are_those_of_the_matrix_whole_or_in_parts() {
        let split = testing::gpus_with(|options| options.max_binding_bytes = Some(16 << 10));
        for device in testing::devices().iter().chain(&split) {
            for (rows, cols) in [(1, 32), (33, 70), (70, 96), (300, 1120)] {
                for (kind, matrix) in testing::matrices(3, rows, cols, 1.0) {
                    let spec = MatrixSpec::of(&matrix);
                    let matrix = DeviceMatrix::new(device, matrix).unwrap();
                    let context = format!("{} {kind} {rows} x {cols}", testing::name(device));
                    assert_eq!(spec.device_bytes(device).unwrap(), matrix.resident_bytes(), "{context}");
                    let planned = device.planned(&Ledger::new(Part::Base));
                    let planned = DeviceMatrix::planned(&planned, &spec).unwrap();
                    assert_eq!(planned.resident_bytes(), matrix.resident_bytes(), "{context}, planned");
                    assert!(planned.part_count() == matrix.part_count() && planned.to_host().is_err(), "{context}");
                }
            }
        }
        for device in split {
            let spec = MatrixSpec { rows: 3, cols: 1 << 20, kind: MatrixKind::Half };
            assert!(matches!(spec.device_bytes(&device), Err(Error::TooLarge { .. })));
        }
        let scales = ScaleKind::Double { super_block: 0 };
        for kind in [
            MatrixKind::Quantized { block: 0, scales: ScaleKind::Plain, mins: None },
            MatrixKind::Quantized { block: 64, scales, mins: None },
        ] {
            let error = MatrixSpec { rows: 3, cols: 5, kind }.device_bytes(&Device::cpu()).unwrap_err();
            assert!(matches!(error, Error::Invalid { .. }), "{error}");
        }
    }
}
