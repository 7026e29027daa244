//! [`DeviceMatrix`]: a matrix on a device, and the text constants of its shaders.

use std::hash::Hash;
use std::sync::Arc;

use super::packing::{Meta, Part, ScaleMeta, download, reserve, upload};
use crate::device::ledger::no_values;
use crate::device::{Counted, Cpu, Defines, Device, Gpu};
use crate::error::{Error, Result};
use crate::quant::{Codebook, HostMatrix, MatrixSpec};

/// A matrix W [N, K] on a device.
#[derive(Clone)]
pub struct DeviceMatrix {
    rows: usize,
    cols: usize,
    defines: Defines,
    words_per_scale: u32,
    meta: Arc<Meta>,
    storage: Storage,
}

/// `Planned` is on a planned CPU: a size without values.
#[derive(Clone)]
enum Storage {
    Cpu { cpu: Cpu, matrix: Arc<HostMatrix>, _counted: Arc<Counted> },
    Gpu { gpu: Gpu, parts: Arc<Vec<Part>> },
    Planned { cpu: Cpu, counted: Arc<Counted> },
}

const OP: &str = "device matrix";

impl DeviceMatrix {
    /// Puts a matrix on a device. The CPU device shares the host form itself; a GPU gets a packed
    /// copy, and the host form is dropped.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if one row is over the binding limit, [`Error::OutOfMemory`],
    /// [`Error::Invalid`] for an empty matrix or a super-block that is not a power of two.
    pub fn new(device: &Device, matrix: impl Into<Arc<HostMatrix>>) -> Result<DeviceMatrix> {
        let matrix = matrix.into();
        let (rows, cols) = (matrix.rows(), matrix.cols());
        if rows == 0 || cols == 0 {
            return Err(Error::invalid(
                OP,
                "the shape",
                format!("{rows} x {cols}"),
                "a matrix has at least one row and one column",
            ));
        }
        let storage = match device {
            Device::Cpu(cpu) => {
                let counted = Arc::new(cpu.count(matrix.bytes() as u64));
                Storage::Cpu { cpu: cpu.clone(), matrix: matrix.clone(), _counted: counted }
            }
            Device::Gpu(gpu) => Storage::Gpu { gpu: gpu.clone(), parts: Arc::new(upload(gpu, &matrix)?) },
        };
        Ok(DeviceMatrix::with_meta([rows, cols], Meta::of(&matrix), storage))
    }

    /// A matrix without values on a planned device.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if one row is over the binding limit, [`Error::Invalid`] for blocks or
    /// super-blocks of 0.
    pub(crate) fn planned(device: &Device, spec: &MatrixSpec) -> Result<DeviceMatrix> {
        let bytes = spec.device_bytes(device)?;
        let storage = match device {
            Device::Cpu(cpu) => Storage::Planned { cpu: cpu.clone(), counted: Arc::new(cpu.count(bytes)) },
            Device::Gpu(gpu) => Storage::Gpu { gpu: gpu.clone(), parts: Arc::new(reserve(gpu, spec)?) },
        };
        Ok(DeviceMatrix::with_meta([spec.rows, spec.cols], Meta::planned(spec.kind), storage))
    }

    fn with_meta([rows, cols]: [usize; 2], meta: Meta, storage: Storage) -> DeviceMatrix {
        let (defines, words_per_scale) = (defines(&meta, cols), words_per_scale(&meta, cols));
        DeviceMatrix { rows, cols, defines, words_per_scale, meta: Arc::new(meta), storage }
    }

    /// N, number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// K, number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The device that holds the matrix.
    pub fn device(&self) -> Device {
        match &self.storage {
            Storage::Cpu { cpu, .. } | Storage::Planned { cpu, .. } => Device::Cpu(cpu.clone()),
            Storage::Gpu { gpu, .. } => Device::Gpu(gpu.clone()),
        }
    }

    /// Bytes on the device, including padding and tables.
    pub fn resident_bytes(&self) -> u64 {
        match &self.storage {
            Storage::Cpu { matrix, .. } => matrix.bytes() as u64,
            Storage::Gpu { parts, .. } => parts.iter().map(|part| part.buffer.resident_bytes()).sum(),
            Storage::Planned { counted, .. } => counted.bytes(),
        }
    }

    /// Number of buffers that hold the matrix; one on the CPU.
    pub fn part_count(&self) -> usize {
        match &self.storage {
            Storage::Cpu { .. } | Storage::Planned { .. } => 1,
            Storage::Gpu { parts, .. } => parts.len(),
        }
    }

    /// Whether the matrix is dense f32.
    pub fn is_f32(&self) -> bool {
        matches!(*self.meta, Meta::F32)
    }

    /// Whether the matrix is 4-bit with quantized scales.
    pub fn is_double_quantized(&self) -> bool {
        matches!(*self.meta, Meta::Quantized { scales: ScaleMeta::Double { .. }, .. })
    }

    /// The host form, if the matrix is on the CPU device.
    pub(crate) fn host(&self) -> Option<&HostMatrix> {
        match &self.storage {
            Storage::Cpu { matrix, .. } => Some(matrix),
            Storage::Gpu { .. } | Storage::Planned { .. } => None,
        }
    }

    /// The device and the parts, if the matrix is on a GPU.
    pub(crate) fn gpu(&self) -> Option<(&Gpu, &[Part])> {
        match &self.storage {
            Storage::Cpu { .. } | Storage::Planned { .. } => None,
            Storage::Gpu { gpu, parts, .. } => Some((gpu, parts)),
        }
    }

    /// Text constants for `shaders/shared/matrix.wgsl`.
    pub(crate) fn defines(&self) -> Defines {
        self.defines.clone()
    }

    /// The same, for hardware's way of reading: 16 bytes at a time.
    pub(crate) fn wide_defines(&self) -> Defines {
        wide(self.defines.clone(), self.words_per_scale >= 4)
    }

    /// Key that distinguishes kernel variants for this matrix.
    pub(crate) fn variant(&self) -> impl Hash {
        (&self.defines, self.words_per_scale)
    }

    /// Words of eight weights that share a scale: any group of this many in a row that starts at a
    /// multiple of it.
    pub(crate) fn words_per_scale(&self) -> u32 {
        self.words_per_scale
    }

    /// Copies the matrix to the host, from a GPU back. Exact: codes, scales and tables equal the
    /// originals.
    pub fn to_host(&self) -> Result<Arc<HostMatrix>> {
        match &self.storage {
            Storage::Cpu { matrix, .. } => Ok(matrix.clone()),
            Storage::Gpu { gpu, parts } => download(gpu, parts, &self.meta, self.rows, self.cols).map(Arc::new),
            Storage::Planned { .. } => Err(no_values("cpu")),
        }
    }
}

/// Whether `shaders/shared/matrix.wgsl` needs its per-element form, because rows don't end at
/// whole words.
pub(crate) fn is_ragged(cols: usize) -> bool {
    !cols.is_multiple_of(8)
}

fn defines(meta: &Meta, cols: usize) -> Defines {
    let dense = |kind| dense_defines(kind, is_ragged(cols));
    match meta {
        Meta::Quantized { codebook, scales, mins, .. } => {
            quant_defines(codebook, scales.word(), mins.as_ref().map_or("none", ScaleMeta::word), is_ragged(cols))
        }
        Meta::F32 => dense("f32"),
        Meta::F16 => dense("f16"),
        Meta::Bf16 => dense("bf16"),
        Meta::Q8_0 => dense("q8_0"),
    }
}

/// Text constants of a 4-bit matrix. `scales` and `mins` are "plain" or "double"; `mins` can also
/// be "none".
pub(crate) fn quant_defines(codebook: &Codebook, scales: &'static str, mins: &'static str, ragged: bool) -> Defines {
    let values = &codebook.0;
    let counts_up = (0..16).all(|i| values[i].to_bits() == (values[0] + i as f32).to_bits());
    let decoder = if counts_up {
        "offset"
    } else if *codebook == Codebook::INT4 {
        "signed"
    } else {
        "select"
    };
    Defines::new()
        .with("kind", "quant")
        .with("codebook", values.as_slice())
        .with("decoder", decoder)
        .with("scales", scales)
        .with("mins", mins)
        .with("ragged", ragged)
}

/// Text constants of a dense matrix. `kind` is "f32", "f16", "bf16" or "q8_0".
pub(crate) fn dense_defines(kind: &'static str, ragged: bool) -> Defines {
    Defines::new().with("kind", kind).with("mins", "none").with("ragged", ragged)
}

/// Text constants of a matrix that is read 16 bytes at a time. `chunked`: 32 codes of a row that
/// begin at a multiple of 32 share a scale.
pub(crate) fn wide(matrix: Defines, chunked: bool) -> Defines {
    matrix.with("wide", true).with("chunked", chunked)
}

fn words_per_scale(meta: &Meta, cols: usize) -> u32 {
    match meta {
        Meta::Quantized { block, .. } => {
            let fits = |words: &u32| {
                let weights = 8 * *words as usize;
                cols.is_multiple_of(weights) && block.is_multiple_of(weights)
            };
            [8, 4, 2].into_iter().find(fits).unwrap_or(1)
        }
        _ => 1,
    }
}
