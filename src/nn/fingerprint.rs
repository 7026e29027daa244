//! Fingerprints of base models.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::config::ModelConfig;
use super::source::WeightSource;
use crate::error::Result;
use crate::hash::{Hasher, hex, text_hash};
use crate::quant::HostMatrix;
use crate::quant::{DenseData, QuantizedMatrix, Scales};

/// Identifies a base model wherever its files are. For a training run, two models are the same if
/// all three texts are equal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Family and sizes, and a hash of the whole configuration.
    pub architecture: String,
    /// Storage formats of the matrices, and the number of matrices in each.
    pub formats: String,
    /// Hash of all tensors as they were loaded: after quantization, if `base` asked for it.
    pub tensors: String,
}

/// A source that hashes the tensors it passes on. XXH3 is as fast as memory, so every loaded model
/// can have a fingerprint. It tells models apart but doesn't protect against deliberate
/// collisions.
pub(super) struct Hashed<'a> {
    source: &'a mut dyn WeightSource,
    hasher: Hasher,
    formats: BTreeMap<String, usize>,
}

impl<'a> Hashed<'a> {
    pub(super) fn new(source: &'a mut dyn WeightSource) -> Self {
        Hashed { source, hasher: Hasher::new(), formats: BTreeMap::new() }
    }

    /// Fingerprint of everything that was passed on.
    pub(super) fn fingerprint(self, config: &ModelConfig) -> Fingerprint {
        let formats: Vec<String> = self.formats.iter().map(|(format, count)| format!("{count} x {format}")).collect();
        Fingerprint {
            architecture: format!(
                "{}, {} layers of {}, {} tokens, configuration {}",
                config.architecture,
                config.layers,
                config.hidden_size,
                config.vocab_size,
                text_hash(&format!("{config:?}"))
            ),
            formats: formats.join(", "),
            tensors: hex(self.hasher.finish_128()),
        }
    }
}

impl WeightSource for Hashed<'_> {
    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        let values = self.source.vector(name, len)?;
        self.hasher.write(name.as_bytes());
        self.hasher.write(bytemuck::cast_slice(&values));
        Ok(values)
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize, linear: bool) -> Result<HostMatrix> {
        let matrix = self.source.matrix(name, rows, cols, linear)?;
        let format = format_of(&matrix);
        self.hasher.write(format!("{name} {rows} {cols} {format}").as_bytes());
        hash(&matrix, &mut self.hasher);
        *self.formats.entry(format).or_default() += 1;
        Ok(matrix)
    }
}

fn format_of(matrix: &HostMatrix) -> String {
    match matrix {
        HostMatrix::Quantized(matrix) => {
            let scales = match matrix.scales() {
                Scales::Plain(_) => "plain",
                Scales::Double(_) => "double-quantized",
            };
            format!("{} in blocks of {} with {scales} scales", matrix.format(), matrix.block())
        }
        HostMatrix::Dense(matrix) => match matrix.data() {
            DenseData::F32(_) => "f32".into(),
            DenseData::F16(_) => "f16".into(),
            DenseData::Bf16(_) => "bf16".into(),
            DenseData::Q8_0 { .. } => "q8_0".into(),
        },
    }
}

fn hash(matrix: &HostMatrix, hasher: &mut Hasher) {
    match matrix {
        HostMatrix::Quantized(matrix) => hash_quantized(matrix, hasher),
        HostMatrix::Dense(matrix) => match matrix.data() {
            DenseData::F32(values) => hasher.write(bytemuck::cast_slice(values)),
            DenseData::F16(values) => hasher.write(bytemuck::cast_slice(values)),
            DenseData::Bf16(values) => hasher.write(bytemuck::cast_slice(values)),
            DenseData::Q8_0 { codes, scales } => {
                hasher.write(bytemuck::cast_slice(codes));
                hasher.write(bytemuck::cast_slice(scales));
            }
        },
    }
}

fn hash_quantized(matrix: &QuantizedMatrix, hasher: &mut Hasher) {
    hasher.write(matrix.codes());
    hasher.write(bytemuck::cast_slice(&matrix.codebook().0));
    for scales in [Some(matrix.scales()), matrix.mins()].into_iter().flatten() {
        match scales {
            Scales::Plain(values) => hasher.write(bytemuck::cast_slice(values)),
            Scales::Double(double) => {
                hasher.write(&double.codes);
                hasher.write(bytemuck::cast_slice(&double.table[..]));
                hasher.write(bytemuck::cast_slice(&double.supers));
                hasher.write(&double.super_block.to_le_bytes());
                hasher.write(&double.offset.to_le_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::formats::checkpoint::BaseFormat;
    use crate::model_files::ModelFiles;
    use crate::quant::QuantOptions;
    use crate::testing;

    #[test]
    fn it_is_that_of_the_model_as_loaded_whatever_the_device() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/model/llama");
        let nf4 = QuantOptions::nf4();
        let bases = [BaseFormat::AsIs, BaseFormat::Quantize(nf4), BaseFormat::Quantize(nf4.double_quant())];
        let all: Vec<Vec<Fingerprint>> = testing::devices()
            .iter()
            .map(|device| {
                bases
                    .iter()
                    .map(|base| ModelFiles::open(&path).unwrap().load(device, base).unwrap().fingerprint)
                    .collect()
            })
            .collect();
        assert!(all.iter().all(|of_device| *of_device == all[0]));
        let [plain, quantized, double] = &all[0][..] else { unreachable!() };
        assert_eq!(plain.architecture, quantized.architecture);
        assert!(quantized.formats.contains("14 x nf4 in blocks of 64 with plain scales"), "{}", quantized.formats);
        assert!(plain.formats != quantized.formats && quantized.formats != double.formats);
        assert!(plain.tensors != quantized.tensors && quantized.tensors != double.tensors);
    }
}
