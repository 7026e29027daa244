//! Weights of a Hugging Face checkpoint: `model.safetensors`, or the shards listed in
//! `model.safetensors.index.json`.
//!
//! Files are mapped and matrices are quantized from the mapped bytes, so host memory holds only
//! the result.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::bitsandbytes;
use super::json::JsonObject;
use super::safetensors::{Floats, SafetensorsFile, Tensor, TensorType, Tensors};
use crate::error::{Error, Result};
use crate::memory;
use crate::quant::{DenseData, DenseMatrix, QuantOptions, QuantizedMatrix};
use crate::quant::{HostMatrix, MatrixKind, MatrixSpec};

/// File of a checkpoint without shards.
#[doc(hidden)]
pub const SINGLE: &str = "model.safetensors";
/// List of a checkpoint's shards.
#[doc(hidden)]
pub const INDEX: &str = "model.safetensors.index.json";

/// Maximum size of that list in bytes; the largest in use have 10 MB.
const MAX_INDEX: u64 = 64 << 20;

/// Target format for a matrix stored in 16 or 32 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum BaseFormat {
    /// Dense, in the file's type.
    #[default]
    AsIs,
    /// 4-bit.
    Quantize(QuantOptions),
}

impl BaseFormat {
    /// Storage of a matrix whose values in the file are of this kind.
    pub(super) fn kind(&self, stored: MatrixKind) -> MatrixKind {
        match self {
            BaseFormat::Quantize(options) => MatrixKind::quantized(options),
            BaseFormat::AsIs => stored,
        }
    }

    /// Converts a file's values.
    pub(super) fn matrix(&self, floats: Floats<'_>, rows: usize, cols: usize) -> Result<HostMatrix> {
        match self {
            BaseFormat::Quantize(options) => {
                QuantizedMatrix::quantize(floats.source(), rows, cols, options).map(HostMatrix::from)
            }
            BaseFormat::AsIs => {
                let data = match floats {
                    Floats::F32(values) => DenseData::F32(values.into_owned()),
                    Floats::F16(values) => DenseData::F16(values.into_owned()),
                    Floats::Bf16(values) => DenseData::Bf16(values.into_owned()),
                };
                DenseMatrix::new(rows, cols, data).map(HostMatrix::from)
            }
        }
    }

    /// Approximate bytes of memory needed to convert this many of a file's values.
    pub(super) fn memory(&self, values: usize, stored: usize) -> u64 {
        match self {
            // 4-bit codes and the scales.
            BaseFormat::Quantize(options) => (values / 2 + values / options.block.max(1) * 4) as u64,
            BaseFormat::AsIs => stored as u64,
        }
    }
}

/// Tensors of a checkpoint, by the names in a causal language model (`model.layers.0...`,
/// `lm_head.weight`). If a checkpoint of the bare decoder omits the prefix `model.`, it is added.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    files: Vec<SafetensorsFile>,
    places: BTreeMap<String, Place>,
    /// Names of the 4-bit weights.
    quantized: BTreeSet<String>,
}

/// Location of a tensor.
#[derive(Debug)]
struct Place {
    file: usize,
    /// Name of the tensor in that file.
    name: String,
}

impl Checkpoint {
    /// Maps the files of the checkpoint in `folder` and checks their headers.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::File`] for a missing or malformed file, [`Error::Tensor`] for a
    /// tensor that is in two shards, or that the index lists but its shard lacks.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let single = folder.join(SINGLE);
        let mut listed = BTreeMap::new();
        let files = if single.exists() {
            vec![SafetensorsFile::open(single)?]
        } else {
            listed = weight_map(folder)?;
            open_shards(folder, &listed)?
        };

        let names = || files.iter().flat_map(|file| file.names());
        let bare = names().any(|name| name.starts_with("layers.")) && !names().any(|name| name.starts_with("model."));
        let mut places = BTreeMap::new();
        for (file, name) in
            files.iter().enumerate().flat_map(|(i, file)| file.names().iter().map(move |name| (i, name)))
        {
            if let Some(shard) = listed.remove(name).filter(|shard| !files[file].path().ends_with(shard)) {
                return Err(files[file].tensor_error(name, format!("is listed in {INDEX} as a part of {shard}")));
            }
            let prefix = if bare && !name.starts_with("lm_head.") { "model." } else { "" };
            let place = Place { file, name: name.clone() };
            if let Some(Place { file: other, .. }) = places.insert(format!("{prefix}{name}"), place) {
                let message = format!("is in {} too", files[other].path().display());
                return Err(files[file].tensor_error(name, message));
            }
        }
        if let Some((key, shard)) = listed.pop_first() {
            let message = format!("is missing, but {INDEX} lists it");
            return Err(Error::Tensor { path: folder.join(shard), key, message });
        }
        let mut checkpoint = Checkpoint { folder: folder.into(), files, places, quantized: BTreeSet::new() };
        checkpoint.quantized = bitsandbytes::quantized_weights(&checkpoint).into_iter().map(String::from).collect();
        Ok(checkpoint)
    }

    /// Folder of the checkpoint.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// All names, sorted. A 4-bit weight has several tensors: its codes, and what bitsandbytes
    /// stores beside them.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// Whether there is a tensor named `name`.
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// Reads the vector named `name`, with `len` values, as f32.
    ///
    /// # Errors
    /// [`Error::Tensor`] if it is missing, has another shape, or isn't F32, F16 or BF16.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        Ok(self.floats(name, &[len])?.into_f32())
    }

    /// Reads the matrix named `name`, [`rows`, `cols`]: as 4-bit if it is stored so, otherwise in
    /// the format `base`.
    ///
    /// # Errors
    /// [`Error::Tensor`] if it is missing, has another shape or type, or contains a value that
    /// can't be quantized.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize, base: &BaseFormat) -> Result<HostMatrix> {
        let matrix = if self.quantized.contains(name) {
            let matrix = bitsandbytes::read(self, name)?;
            self.check_shape(name, &[matrix.rows(), matrix.cols()], &[rows, cols])?;
            matrix.into()
        } else {
            let tensor = self.tensor(name)?;
            self.check_shape(name, tensor.shape, &[rows, cols])?;
            let bytes = base.memory(rows.saturating_mul(cols), tensor.bytes.len());
            memory::check(bytes).map_err(|e| self.tensor_error(name, e))?;
            let not_floats = || self.not_floats(name, &tensor);
            let matrix = match base {
                BaseFormat::Quantize(options) => {
                    let source = tensor.source().ok_or_else(not_floats)?;
                    QuantizedMatrix::quantize(source, rows, cols, options).map(HostMatrix::from)
                }
                BaseFormat::AsIs => base.matrix(tensor.floats().ok_or_else(not_floats)?, rows, cols),
            };
            matrix.map_err(|e| self.tensor_error(name, e))?
        };
        if let Some(Place { file, name }) = self.places.get(name) {
            self.files[*file].release(name);
        }
        Ok(matrix)
    }

    /// Returns how [`Checkpoint::matrix`] would store the matrix with these arguments, from
    /// headers alone.
    ///
    /// # Errors
    /// [`Error::Tensor`] if it is missing, or has another shape or type.
    pub(crate) fn spec(&self, name: &str, rows: usize, cols: usize, base: &BaseFormat) -> Result<MatrixSpec> {
        if self.quantized.contains(name) {
            let spec = bitsandbytes::spec(self, name)?;
            self.check_shape(name, &[spec.rows, spec.cols], &[rows, cols])?;
            return Ok(spec);
        }
        let tensor = self.tensor(name)?;
        self.check_shape(name, tensor.shape, &[rows, cols])?;
        let stored = match tensor.dtype {
            TensorType::F32 => MatrixKind::F32,
            TensorType::F16 | TensorType::BF16 => MatrixKind::Half,
            _ => return Err(self.not_floats(name, &tensor)),
        };
        Ok(MatrixSpec { rows, cols, kind: base.kind(stored) })
    }

    /// Whether all tensors of the weight named `name` are bit-identical to those of the weight
    /// named `of`.
    ///
    /// # Errors
    /// [`Error::File`] for a truncated file.
    pub(crate) fn is_copy(&self, name: &str, of: &str) -> Result<bool> {
        let parts = |weight: &str| -> BTreeMap<&str, &str> {
            let of = self.names().filter_map(|key| Some((key.strip_prefix(weight)?, key)));
            of.filter(|(end, _)| end.is_empty() || end.starts_with('.')).collect()
        };
        let (ours, theirs) = (parts(name), parts(of));
        if !ours.keys().eq(theirs.keys()) {
            return Ok(false);
        }
        for (one, other) in ours.values().zip(theirs.values()) {
            let [a, b] = [self.tensor(one)?, self.tensor(other)?];
            if (a.dtype, a.shape, a.bytes) != (b.dtype, b.shape, b.bytes) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Checks that nothing was left out: every tensor is in `used`, belongs to a 4-bit weight in
    /// it, or is a buffer of rotary frequencies. Old checkpoints contain such buffers; their
    /// values follow from the config.
    ///
    /// # Errors
    /// [`Error::File`] with the names of unused tensors.
    pub fn check_all_used(&self, used: &BTreeSet<String>) -> Result<()> {
        let is_side = |name: &str| {
            bitsandbytes::weight_of(name).is_some_and(|weight| self.quantized.contains(weight) && used.contains(weight))
        };
        let is_used = |name: &str| used.contains(name) || name.ends_with("rotary_emb.inv_freq") || is_side(name);
        let unused: Vec<&str> = self.names().filter(|name| !is_used(name)).collect();
        if unused.is_empty() {
            return Ok(());
        }
        let message = format!("has tensors that the model doesn't use: {}", unused.join(", "));
        Err(Error::File { path: self.folder.clone(), message })
    }

    /// Returns the values of tensor `name`, which must have this shape.
    fn floats(&self, name: &str, shape: &[usize]) -> Result<Floats<'_>> {
        let tensor = self.tensor(name)?;
        self.check_shape(name, tensor.shape, shape)?;
        tensor.floats().ok_or_else(|| self.not_floats(name, &tensor))
    }

    fn not_floats(&self, name: &str, tensor: &Tensor<'_>) -> Error {
        self.tensor_error(name, format!("is {}, expected F32, F16 or BF16", tensor.dtype))
    }

    fn check_shape(&self, name: &str, got: &[usize], expected: &[usize]) -> Result<()> {
        if got == expected {
            return Ok(());
        }
        Err(self.tensor_error(name, format!("has shape {got:?}, expected {expected:?}")))
    }
}

impl Tensors for Checkpoint {
    fn names(&self) -> impl Iterator<Item = &str> {
        Checkpoint::names(self)
    }

    fn get(&self, name: &str) -> Option<Tensor<'_>> {
        let Place { file, name } = self.places.get(name)?;
        self.files[*file].get(name)
    }

    fn tensor_error(&self, name: &str, message: impl ToString) -> Error {
        match self.places.get(name) {
            Some(Place { file, name }) => self.files[*file].tensor_error(name, message),
            None => Error::Tensor { path: self.folder.clone(), key: name.into(), message: message.to_string() },
        }
    }

    fn check_whole(&self, name: &str) -> Result<()> {
        match self.places.get(name) {
            Some(Place { file, name }) => self.files[*file].check_whole(name),
            None => Ok(()),
        }
    }
}

/// Returns the names of the shards listed in the index in `folder`.
///
/// # Errors
/// [`Error::Io`] or [`Error::File`] if it can't be read or is malformed.
#[doc(hidden)]
pub fn shards(folder: &Path) -> Result<BTreeSet<String>> {
    Ok(weight_map(folder)?.into_values().collect())
}

/// Maps every tensor in the index in `folder` to its shard.
fn weight_map(folder: &Path) -> Result<BTreeMap<String, String>> {
    let index = folder.join(INDEX);
    if !index.exists() {
        let pickled = ["pytorch_model.bin", "pytorch_model.bin.index.json"];
        let hint = if pickled.iter().any(|name| folder.join(name).exists()) {
            "; convert pytorch_model.bin to safetensors"
        } else {
            ""
        };
        return Err(Error::File { path: folder.into(), message: format!("has neither {SINGLE} nor {INDEX}{hint}") });
    }
    let json = JsonObject::read_within(&index, MAX_INDEX)?;
    let map: BTreeMap<String, String> = json.require("weight_map")?;
    if let Some(shard) = map.values().find(|shard| Path::new(shard).file_name() != Some(shard.as_str().as_ref())) {
        return Err(json.error("weight_map", format!("names {shard:?}, which is not a file in its folder")));
    }
    Ok(map)
}

/// Opens every shard in `listed` once.
fn open_shards(folder: &Path, listed: &BTreeMap<String, String>) -> Result<Vec<SafetensorsFile>> {
    let shards: BTreeSet<&String> = listed.values().collect();
    let open = |shard| {
        SafetensorsFile::open(folder.join(shard)).map_err(|error| match error {
            Error::Io { path, kind, message } => {
                Error::Io { path, kind, message: format!("{message}, but {INDEX} names it") }
            }
            error => error,
        })
    };
    shards.into_iter().map(open).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use half::{bf16, f16};
    use serde_json::json;
    use tempfile::TempDir;

    use super::*;
    use crate::formats::safetensors::{OutData, OutTensor, write};

    fn values(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.37).sin()).collect()
    }

    fn tensor(name: &str, dtype: TensorType, shape: &[usize]) -> OutTensor<'static> {
        let values = values(shape.iter().product());
        let bytes = match dtype {
            TensorType::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            TensorType::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
            TensorType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            _ => vec![0; values.len() * dtype.bitsize() / 8],
        };
        OutTensor { name: name.into(), dtype, shape: shape.into(), data: OutData::Bytes(bytes.into()) }
    }

    /// A folder with these shards and an index that lists `map`; by default, it lists the shards'
    /// contents.
    fn sharded(shards: Vec<Vec<OutTensor<'_>>>, map: Option<serde_json::Value>) -> TempDir {
        let folder = TempDir::new().unwrap();
        let mut listed = serde_json::Map::new();
        for (i, tensors) in shards.into_iter().enumerate() {
            let name = format!("model-{}.safetensors", i + 1);
            listed.extend(tensors.iter().map(|tensor| (tensor.name.clone(), json!(name))));
            write(&folder.path().join(name), tensors, BTreeMap::new()).unwrap();
        }
        let index = json!({"metadata": {}, "weight_map": map.unwrap_or(listed.into())});
        fs::write(folder.path().join(INDEX), index.to_string()).unwrap();
        folder
    }

    fn single(tensors: Vec<OutTensor<'_>>) -> (TempDir, Checkpoint) {
        let folder = TempDir::new().unwrap();
        write(&folder.path().join(SINGLE), tensors, BTreeMap::new()).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        (folder, checkpoint)
    }

    fn open_error(folder: &TempDir) -> String {
        Checkpoint::open(folder.path()).unwrap_err().to_string()
    }

    #[test]
    fn every_type_is_read_or_quantized() {
        let types = [TensorType::F32, TensorType::F16, TensorType::BF16];
        let all = types.iter().flat_map(|&dtype| {
            [tensor(&format!("{dtype}.weight"), dtype, &[6, 32]), tensor(&format!("{dtype}.bias"), dtype, &[7])]
        });
        let (_folder, checkpoint) = single(all.collect());
        for dtype in types {
            let round: fn(f32) -> f32 = match dtype {
                TensorType::F16 => |v| f16::from_f32(v).to_f32(),
                TensorType::BF16 => |v| bf16::from_f32(v).to_f32(),
                _ => |v| v,
            };
            let rounded = |n| values(n).into_iter().map(round).collect::<Vec<_>>();
            assert_eq!(checkpoint.vector(&format!("{dtype}.bias"), 7).unwrap(), rounded(7));

            let name = format!("{dtype}.weight");
            let HostMatrix::Dense(dense) = checkpoint.matrix(&name, 6, 32, &BaseFormat::AsIs).unwrap() else {
                panic!("{name}")
            };
            assert_eq!(dense.to_f32(), rounded(192));
            assert_eq!(dense.bytes(), 192 * dtype.bitsize() / 8, "{name} keeps its type");

            let options = QuantOptions::nf4().double_quant();
            let quantized = checkpoint.matrix(&name, 6, 32, &BaseFormat::Quantize(options)).unwrap();
            let source = checkpoint.tensor(&name).unwrap().source().unwrap();
            let expected = QuantizedMatrix::quantize(source, 6, 32, &options).unwrap();
            assert_eq!(quantized, HostMatrix::Quantized(expected));
            for base in [BaseFormat::AsIs, BaseFormat::Quantize(options), BaseFormat::Quantize(QuantOptions::fp4())] {
                let matrix = checkpoint.matrix(&name, 6, 32, &base).unwrap();
                assert_eq!(checkpoint.spec(&name, 6, 32, &base).unwrap(), MatrixSpec::of(&matrix));
            }
        }
    }

    #[test]
    fn tensors_that_do_not_fit_are_named() {
        let mut infinite = tensor("infinite", TensorType::F32, &[1, 32]);
        infinite.data = OutData::Bytes(f32::INFINITY.to_le_bytes().repeat(32).into());
        let (folder, checkpoint) =
            single(vec![tensor("w", TensorType::F32, &[2, 3]), tensor("ids", TensorType::I64, &[4]), infinite]);
        let error = |result: Result<()>| {
            let error = result.unwrap_err();
            assert!(matches!(&error, Error::Tensor { path, .. } if path.starts_with(folder.path())), "{error}");
            error.to_string()
        };
        let matrix = |name: &str, rows, cols, base| error(checkpoint.matrix(name, rows, cols, &base).map(drop));
        let vector = |name: &str, len| error(checkpoint.vector(name, len).map(drop));
        let quantize = BaseFormat::Quantize(QuantOptions::nf4());
        let spec = |name: &str, rows, cols| error(checkpoint.spec(name, rows, cols, &BaseFormat::AsIs).map(drop));
        assert!(spec("w", 3, 2).contains("\"w\": has shape [2, 3], expected [3, 2]"));
        assert!(spec("none", 3, 2).contains("\"none\": is missing"));
        assert!(matrix("w", 3, 2, BaseFormat::AsIs).contains("\"w\": has shape [2, 3], expected [3, 2]"));
        assert!(vector("w", 6).contains("\"w\": has shape [2, 3], expected [6]"));
        assert!(vector("ids", 4).contains("\"ids\": is I64, expected F32, F16 or BF16"));
        assert!(vector("none", 4).contains("\"none\": is missing"));
        assert!(matrix("infinite", 1, 32, quantize).contains("\"infinite\": "));
    }

    #[test]
    fn shards_are_one_checkpoint() {
        let quantized = QuantizedMatrix::quantize(values(96)[..].into(), 3, 32, &QuantOptions::nf4()).unwrap();
        // A 4-bit weight with tensors in two shards.
        let mut second = bitsandbytes::tensors("model.q.weight", &quantized).unwrap();
        let first = second.drain(..2).chain([tensor("model.norm.weight", TensorType::F32, &[4])]).collect();
        second.push(tensor("lm_head.weight", TensorType::BF16, &[2, 4]));
        let folder = sharded(vec![first, second], None);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();

        assert_eq!(checkpoint.names().count(), 6);
        assert_eq!(checkpoint.vector("model.norm.weight", 4).unwrap(), values(4));
        assert_eq!(checkpoint.matrix("lm_head.weight", 2, 4, &BaseFormat::AsIs).unwrap().rows(), 2);
        let other = QuantOptions::int4();
        let read = checkpoint.matrix("model.q.weight", 3, 32, &BaseFormat::Quantize(other)).unwrap();
        assert_eq!(read, HostMatrix::Quantized(quantized), "4-bit weights stay as they are");
        let error = checkpoint.matrix("model.q.weight", 32, 3, &BaseFormat::AsIs).unwrap_err().to_string();
        assert!(error.contains("has shape [3, 32], expected [32, 3]"), "{error}");

        let used = ["model.norm.weight", "model.q.weight", "lm_head.weight"].map(String::from);
        checkpoint.check_all_used(&used.clone().into()).unwrap();
        let error = checkpoint.check_all_used(&[used[0].clone()].into()).unwrap_err().to_string();
        assert!(
            error.ends_with(
                "doesn't use: lm_head.weight, model.q.weight, model.q.weight.absmax, \
            model.q.weight.quant_map, model.q.weight.quant_state.bitsandbytes__nf4"
            ),
            "{error}"
        );
    }

    #[test]
    fn shards_that_do_not_fit_their_index_are_errors() {
        let error = |shards: &[&[&str]], map: serde_json::Value| {
            let shard = |names: &&[&str]| names.iter().map(|name| tensor(name, TensorType::F32, &[2])).collect();
            open_error(&sharded(shards.iter().map(shard).collect(), Some(map)))
        };
        let [one, two] = ["model-1.safetensors", "model-2.safetensors"];
        let missing = error(&[&["a"]], json!({"a": one, "b": two}));
        assert!(missing.contains("model-2.safetensors: ") && missing.contains("index.json names it"), "{missing}");
        let absent = error(&[&["a"]], json!({"a": one, "b": one}));
        assert!(absent.contains("model-1.safetensors: tensor \"b\": is missing, but model.safetensors"), "{absent}");
        let twice = error(&[&["a"], &["a", "b"]], json!({"a": one, "b": two}));
        assert!(twice.contains("model-2.safetensors: tensor \"a\": is in"), "{twice}");
        assert!(twice.ends_with("model-1.safetensors too"), "{twice}");
        let swapped = error(&[&["a"], &["b"]], json!({"a": two, "b": one}));
        assert!(swapped.ends_with("is listed in model.safetensors.index.json as a part of model-2.safetensors"));
        for name in ["../x.safetensors", "/x", "", ".."] {
            assert!(error(&[], json!({"a": name})).contains("not a file in its folder"), "{name}");
        }
        assert!(error(&[], json!([1])).contains("`weight_map`"));

        let folder = TempDir::new().unwrap();
        assert!(open_error(&folder).ends_with("has neither model.safetensors nor model.safetensors.index.json"));
        fs::write(folder.path().join("pytorch_model.bin"), "").unwrap();
        assert!(open_error(&folder).contains("convert pytorch_model.bin to safetensors"));
    }

    #[test]
    fn bare_decoders_are_read_by_their_full_names() {
        let names =
            ["layers.0.w.weight", "embed_tokens.weight", "norm.weight", "layers.0.self_attn.rotary_emb.inv_freq"];
        let mut tensors: Vec<_> = names.iter().map(|name| tensor(name, TensorType::F32, &[2])).collect();
        tensors.push(tensor("lm_head.weight", TensorType::F32, &[2, 2]));
        let (_folder, checkpoint) = single(tensors);
        assert!(checkpoint.contains("model.norm.weight") && !checkpoint.contains("norm.weight"));
        assert_eq!(checkpoint.vector("model.layers.0.w.weight", 2).unwrap(), values(2));
        let error = checkpoint.vector("model.norm.weight", 3).unwrap_err().to_string();
        assert!(error.contains("tensor \"norm.weight\": has shape"), "{error}");
        let used = ["model.norm.weight", "model.embed_tokens.weight", "model.layers.0.w.weight", "lm_head.weight"];
        checkpoint.check_all_used(&used.map(String::from).into()).unwrap();
    }
}
