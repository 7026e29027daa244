//! safetensors files: a length, a JSON header, and the little-endian bytes of the tensors.
//!
//! Reading maps the file. Writing streams one tensor at a time and renames the finished file into
//! place. The layout is that of <https://github.com/huggingface/safetensors>, whose header types
//! and checks are used here.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::io::{self, Write};
use std::path::Path;

use bytemuck::Pod;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
pub use safetensors::Dtype as TensorType;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::de::{Deserializer as _, Error as _, MapAccess, Visitor};

use super::mapped::MappedFile;
use super::staged::StagedFile;
use crate::error::{Error, Result};
use crate::quant::{Dtype, Source};

#[cfg(target_endian = "big")]
compile_error!("tensor files are little-endian and are read in place");

/// Bytes of the header's length at the start of a file.
const LENGTH_BYTES: usize = 8;

/// Maximum header size that the format allows, in bytes.
const MAX_HEADER: usize = 100_000_000;

/// Tensors by name, in one file or several.
pub trait Tensors {
    /// Names of all tensors.
    fn names(&self) -> impl Iterator<Item = &str>;

    /// Returns the tensor named `name`, if there is one.
    fn get(&self, name: &str) -> Option<Tensor<'_>>;

    /// Makes an [`Error::Tensor`] about the tensor named `name`, whether it exists or not.
    fn tensor_error(&self, name: &str, message: impl ToString) -> Error;

    /// Checks that the file with the tensor named `name` still has all its bytes.
    ///
    /// # Errors
    /// [`Error::File`] if it was truncated.
    fn check_whole(&self, name: &str) -> Result<()>;

    /// Returns the tensor named `name` for reading its bytes; checks the file's size again.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is none, [`Error::File`] if its file was truncated.
    fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        self.check_whole(name)?;
        self.get(name).ok_or_else(|| self.tensor_error(name, "is missing"))
    }
}

/// A memory-mapped safetensors file.
#[derive(Debug)]
pub struct SafetensorsFile {
    map: MappedFile,
    data_start: usize,
    header: Metadata,
    names: Vec<String>,
}

impl SafetensorsFile {
    /// Maps the file at `path` and checks its header: every tensor lies inside the file and has
    /// the size that its type and shape require.
    ///
    /// # Errors
    /// [`Error::Io`] if the file can't be opened, [`Error::File`] if it is truncated, too long, or
    /// has no valid safetensors header.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let map = MappedFile::open(path.as_ref())?;
        let (data_start, header) =
            parse_header(&map).map_err(|message| Error::File { path: map.path().into(), message })?;
        let names = header.offset_keys();
        Ok(SafetensorsFile { map, data_start, header, names })
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        self.map.path()
    }

    /// Names of all tensors, in the order of their data.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Text entries besides the tensors (`__metadata__`).
    pub fn metadata(&self) -> BTreeMap<String, String> {
        self.header.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    /// Returns the tensor named `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<Tensor<'_>> {
        let TensorInfo { dtype, shape, data_offsets: (start, end) } = self.header.info(name)?;
        let bytes = &self.map[self.data_start..][*start..*end];
        Some(Tensor { dtype: *dtype, shape, bytes })
    }

    /// Releases the memory that reading a tensor's bytes took; they can be read again.
    pub(super) fn release(&self, name: &str) {
        if let Some(tensor) = self.get(name) {
            self.map.release(tensor.bytes);
        }
    }

    /// Returns the tensor named `name` for reading its bytes; checks the file's size again.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is none, [`Error::File`] if the file was truncated.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        Tensors::tensor(self, name)
    }

    /// Makes an [`Error::Tensor`] about a tensor in this file.
    pub fn tensor_error(&self, name: &str, message: impl ToString) -> Error {
        Error::Tensor { path: self.path().into(), key: name.into(), message: message.to_string() }
    }
}

impl Tensors for SafetensorsFile {
    fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    fn get(&self, name: &str) -> Option<Tensor<'_>> {
        SafetensorsFile::get(self, name)
    }

    fn tensor_error(&self, name: &str, message: impl ToString) -> Error {
        SafetensorsFile::tensor_error(self, name, message)
    }

    fn check_whole(&self, _: &str) -> Result<()> {
        self.map.check_whole()
    }
}

/// Entries of a header, in its order. The safetensors crate's own type reads each entry through a
/// JSON value, which takes 35 times as much memory as the text.
struct Entries(Option<HashMap<String, String>>, Vec<(String, TensorInfo)>);

impl<'de> Visitor<'de> for Entries {
    type Value = Entries;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with an entry per tensor")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
        let Entries(mut metadata, mut tensors) = self;
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                metadata = map.next_value()?;
            } else {
                tensors.push((name, map.next_value()?));
            }
        }
        Ok(Entries(metadata, tensors))
    }
}

/// Parses a header; tensors are in the order of their data.
fn header(text: &[u8]) -> Result<Metadata, serde_json::Error> {
    let mut text = serde_json::Deserializer::from_slice(text);
    let Entries(metadata, mut tensors) = text.deserialize_map(Entries(None, Vec::new()))?;
    text.end()?;
    let mut names = HashSet::with_capacity(tensors.len());
    if let Some((name, _)) = tensors.iter().find(|(name, _)| !names.insert(name)) {
        return Err(serde_json::Error::custom(format!("{name:?} is given twice")));
    }
    tensors.sort_by_key(|(_, tensor)| tensor.data_offsets);
    Metadata::new(metadata, tensors).map_err(serde_json::Error::custom)
}

/// Returns the start of the data, and the header. The error says what is wrong with the bytes.
fn parse_header(bytes: &[u8]) -> Result<(usize, Metadata), String> {
    let (length, rest) = bytes.split_first_chunk::<LENGTH_BYTES>().ok_or("is too short for a safetensors file")?;
    let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
    if length > MAX_HEADER {
        return Err(format!("not a safetensors file: the header would take {length} bytes"));
    }
    let header = rest.get(..length).ok_or_else(|| {
        format!("is truncated: the header takes {length} bytes, but {} follow; copy or download it again", rest.len())
    })?;
    let header = self::header(header).map_err(|e| format!("has a malformed safetensors header: {e}"))?;
    let (expected, got) = (header.data_len(), rest.len() - length);
    if got != expected {
        let what = if got < expected { "is truncated" } else { "has trailing bytes" };
        let message = format!("{what}: the header describes {expected} bytes of tensors, but {got} follow it");
        return Err(format!("{message}; copy or download it again"));
    }
    Ok((LENGTH_BYTES + length, header))
}

/// A tensor of a [`SafetensorsFile`].
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    /// Type of the values.
    pub dtype: TensorType,
    /// Lengths of the dimensions, outermost first.
    pub shape: &'a [usize],
    /// Values, little-endian, row-major.
    pub bytes: &'a [u8],
}

impl<'a> Tensor<'a> {
    /// Returns the values if they are f32, f16 or bf16.
    pub(crate) fn floats(&self) -> Option<Floats<'a>> {
        match self.dtype {
            TensorType::F32 => Some(Floats::F32(values(self.bytes))),
            TensorType::F16 => Some(Floats::F16(values(self.bytes))),
            TensorType::BF16 => Some(Floats::Bf16(values(self.bytes))),
            _ => None,
        }
    }

    /// Returns the values for quantization in place, if they are f32, f16 or bf16.
    pub fn source(&self) -> Option<Source<'a>> {
        let (bytes, dtype) = (self.bytes, self.dtype()?);
        let aligned = match dtype {
            Dtype::F32 => bytemuck::try_cast_slice(bytes).map(Source::F32),
            Dtype::F16 => bytemuck::try_cast_slice(bytes).map(Source::F16),
            Dtype::Bf16 => bytemuck::try_cast_slice(bytes).map(Source::Bf16),
        };
        Some(aligned.unwrap_or(Source::Bytes(dtype, bytes)))
    }

    /// Returns the type, if it is a float type.
    pub fn dtype(&self) -> Option<Dtype> {
        match self.dtype {
            TensorType::F32 => Some(Dtype::F32),
            TensorType::F16 => Some(Dtype::F16),
            TensorType::BF16 => Some(Dtype::Bf16),
            _ => None,
        }
    }

    /// Returns the values as f32, exactly, if they are f32, f16 or bf16.
    pub fn to_f32(&self) -> Option<Vec<f32>> {
        Some(self.floats()?.into_f32())
    }

    /// Returns the values if they are f32.
    pub fn f32s(&self) -> Option<Cow<'a, [f32]>> {
        (self.dtype == TensorType::F32).then(|| values(self.bytes))
    }
}

/// Returns the bytes as values: in place if they are aligned, otherwise copied.
pub(super) fn values<T: Pod>(bytes: &[u8]) -> Cow<'_, [T]> {
    match bytemuck::try_cast_slice(bytes) {
        Ok(values) => Cow::Borrowed(values),
        Err(_) => Cow::Owned(bytemuck::pod_collect_to_vec(bytes)),
    }
}

/// Floating-point values of a [`Tensor`], borrowed from the file if alignment allows.
#[derive(Clone, Debug)]
pub(crate) enum Floats<'a> {
    /// 32-bit values.
    F32(Cow<'a, [f32]>),
    /// 16-bit IEEE values.
    F16(Cow<'a, [f16]>),
    /// 16-bit brain floats.
    Bf16(Cow<'a, [bf16]>),
}

impl Floats<'_> {
    /// Returns the values as a source for quantization.
    pub fn source(&self) -> Source<'_> {
        match self {
            Floats::F32(values) => Source::F32(values),
            Floats::F16(values) => Source::F16(values),
            Floats::Bf16(values) => Source::Bf16(values),
        }
    }

    /// Converts the values to f32, exactly.
    pub(crate) fn into_f32(self) -> Vec<f32> {
        match self {
            Floats::F32(values) => values.into_owned(),
            Floats::F16(values) => values.to_f32_vec(),
            Floats::Bf16(values) => values.to_f32_vec(),
        }
    }
}

/// A tensor to write.
pub struct OutTensor<'a> {
    /// Its key in the file.
    pub name: String,
    /// Type of the values.
    pub dtype: TensorType,
    /// Lengths of the dimensions, outermost first.
    pub shape: Vec<usize>,
    /// The values.
    pub data: OutData<'a>,
}

/// Little-endian, row-major bytes of an [`OutTensor`].
pub enum OutData<'a> {
    /// Available in memory.
    Bytes(Cow<'a, [u8]>),
    /// Made just before they are written, and dropped afterwards.
    Lazy(Box<dyn Fn() -> Result<Vec<u8>> + 'a>),
}

/// Writes a safetensors file. Tensors are ordered by decreasing type size, then by name, like in
/// the reference implementation. `"format": "pt"` is added to `metadata` unless it names another
/// format.
///
/// The file is written under a temporary name in the same folder, flushed to disk and renamed, so
/// `path` is never half a file. An existing file is replaced.
///
/// # Errors
/// [`Error::Io`] if writing fails, [`Error::Tensor`] for a name that appears twice or bytes that
/// don't fit the shape; errors from making lazy bytes.
pub fn write(path: &Path, tensors: Vec<OutTensor<'_>>, metadata: BTreeMap<String, String>) -> Result<()> {
    stage(path, tensors, metadata)?.commit()
}

/// Like [`write`], but without renaming.
pub(crate) fn stage(
    path: &Path,
    mut tensors: Vec<OutTensor<'_>>,
    mut metadata: BTreeMap<String, String>,
) -> Result<StagedFile> {
    let io_error = |e: io::Error| Error::io(path, e);
    let json_error = |e: serde_json::Error| Error::io(path, e);
    metadata.entry("format".into()).or_insert_with(|| "pt".into());
    tensors.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));

    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), serde_json::to_value(metadata).map_err(json_error)?);
    let mut end = 0;
    for tensor in &tensors {
        let start = end;
        end += byte_len(tensor).ok_or_else(|| tensor_error(path, tensor, "is too large"))?;
        let info = TensorInfo { dtype: tensor.dtype, shape: tensor.shape.clone(), data_offsets: (start, end) };
        let info = serde_json::to_value(info).map_err(json_error)?;
        if header.insert(tensor.name.clone(), info).is_some() {
            return Err(tensor_error(path, tensor, "would be written twice"));
        }
    }
    let mut header = serde_json::to_vec(&header).map_err(json_error)?;
    header.resize(header.len().next_multiple_of(LENGTH_BYTES), b' ');

    StagedFile::new(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(io_error)?;
        out.write_all(&header).map_err(io_error)?;
        for tensor in &tensors {
            let bytes = match &tensor.data {
                OutData::Bytes(bytes) => Cow::Borrowed(&**bytes),
                OutData::Lazy(make) => Cow::Owned(make()?),
            };
            if byte_len(tensor) != Some(bytes.len()) {
                let message = format!("{} bytes do not fill {} {:?}", bytes.len(), tensor.dtype, tensor.shape);
                return Err(tensor_error(path, tensor, message));
            }
            out.write_all(&bytes).map_err(io_error)?;
        }
        Ok(())
    })
}

fn tensor_error(path: &Path, tensor: &OutTensor<'_>, message: impl ToString) -> Error {
    Error::Tensor { path: path.into(), key: tensor.name.clone(), message: message.to_string() }
}

/// Size in bytes required by the type and shape of `tensor`, unless it overflows.
fn byte_len(tensor: &OutTensor<'_>) -> Option<usize> {
    let elements = tensor.shape.iter().try_fold(1_usize, |n, &d| n.checked_mul(d))?;
    elements.checked_mul(tensor.dtype.bitsize()).map(|bits| bits / 8)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use tempfile::TempDir;

    use super::*;

    fn tensor(name: &str, shape: &[usize], values: &[f32]) -> OutTensor<'static> {
        let bytes = bytemuck::cast_slice(values).to_vec();
        OutTensor { name: name.into(), dtype: TensorType::F32, shape: shape.into(), data: OutData::Bytes(bytes.into()) }
    }

    /// A file with the header `json` and `data`.
    fn file(folder: &TempDir, json: &str, data: &[u8]) -> PathBuf {
        let path = folder.path().join("x.safetensors");
        let length = (json.len() as u64).to_le_bytes();
        fs::write(&path, [&length[..], json.as_bytes(), data].concat()).unwrap();
        path
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("a.safetensors");
        let bytes = OutTensor {
            name: "a".into(),
            dtype: TensorType::U8,
            shape: vec![3],
            data: OutData::Lazy(Box::new(|| Ok(vec![1, 2, 3]))),
        };
        let tensors = vec![bytes, tensor("c", &[2, 1], &[0.5, -1.0]), tensor("b", &[0], &[])];
        write(&path, tensors, BTreeMap::from([("made by".into(), "a test".into())])).unwrap();

        let file = SafetensorsFile::open(&path).unwrap();
        assert_eq!(file.names(), ["b", "c", "a"], "by type, then name");
        assert_eq!(file.metadata()["format"], "pt");
        assert_eq!(file.metadata()["made by"], "a test");
        let c = file.tensor("c").unwrap();
        assert_eq!((c.dtype, c.shape, &*c.f32s().unwrap()), (TensorType::F32, &[2, 1][..], &[0.5, -1.0][..]));
        let a = file.tensor("a").unwrap();
        assert_eq!((a.bytes, a.floats().is_none()), (&[1, 2, 3][..], true));
        let error = file.tensor("d").unwrap_err();
        assert!(matches!(&error, Error::Tensor { key, .. } if key == "d"), "{error}");
    }

    #[test]
    fn unaligned_values_are_copied() {
        let folder = TempDir::new().unwrap();
        let json = r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        for pad in 0..4 {
            let json = format!("{json}{}", " ".repeat(pad));
            let path = file(&folder, &json, bytemuck::cast_slice(&[1.5_f32, -2.0]));
            let file = SafetensorsFile::open(path).unwrap();
            assert_eq!(*file.tensor("w").unwrap().f32s().unwrap(), [1.5, -2.0]);
        }
    }

    #[test]
    fn malformed_files_are_errors() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("x.safetensors");
        let error = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            let error = SafetensorsFile::open(&path).unwrap_err();
            assert!(matches!(&error, Error::File { path: p, .. } if *p == path), "{error}");
            error.to_string()
        };
        assert!(error(b"").contains("too short"));
        assert!(error(b"1234567").contains("too short"));
        assert!(error(&u64::MAX.to_le_bytes()).contains("not a safetensors file"));
        assert!(error(b"\x20\0\0\0\0\0\0\0{}").contains("header takes 32 bytes, but 2 follow"));
        assert!(error(b"\x02\0\0\0\0\0\0\0{]").contains("x.safetensors: has a malformed safetensors header: "));
        assert!(error(b"\x02\0\0\0\0\0\0\0\xff\xfe").contains("x.safetensors: has a malformed safetensors header: "));

        let error = |json: &str, data: &[u8]| SafetensorsFile::open(file(&folder, json, data)).unwrap_err().to_string();
        let good = r#"{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;
        assert!(error(good, &[0; 3]).contains("truncated: the header describes 4 bytes of tensors, but 3 follow"));
        assert!(error(good, &[0; 5]).contains("trailing bytes"));
        let twice = format!(r#"{},"w":{{"dtype":"U8","shape":[0],"data_offsets":[4,4]}}}}"#, &good[..good.len() - 1]);
        assert!(error(&twice, &[0; 4]).contains("\"w\" is given twice"), "{twice}");
        for bad in ["[0,3]", "[1,5]", "[4,0]", "[0,18446744073709551615]"] {
            assert!(
                error(&good.replace("[0,4]", bad), &[0; 4])
                    .contains("x.safetensors: has a malformed safetensors header: "),
                "{bad}"
            );
        }
        let overflow = good.replace("[4]", "[18446744073709551615,2]");
        assert!(error(&overflow, &[0; 4]).contains("x.safetensors: has a malformed safetensors header: "));
    }

    #[test]
    fn a_file_that_is_not_there_is_an_io_error() {
        let error = SafetensorsFile::open("/no/such/file").unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_other() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("a.safetensors");
        write(&path, vec![tensor("w", &[1], &[1.0])], BTreeMap::new()).unwrap();
        let before = fs::read(&path).unwrap();

        let twice = vec![tensor("w", &[1], &[1.0]), tensor("w", &[1], &[2.0])];
        assert!(
            write(&path, twice, BTreeMap::new())
                .unwrap_err()
                .to_string()
                .contains("tensor \"w\": would be written twice")
        );
        let short = vec![tensor("v", &[1], &[1.0]), tensor("w", &[2], &[1.0])];
        assert!(write(&path, short, BTreeMap::new()).unwrap_err().to_string().contains("do not fill"));
        let huge = vec![tensor("w", &[usize::MAX, 2], &[1.0])];
        assert!(write(&path, huge, BTreeMap::new()).unwrap_err().to_string().contains("too large"));

        assert_eq!(fs::read(&path).unwrap(), before);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        let error = write(&folder.path().join("no/folder"), vec![], BTreeMap::new()).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn permissions_are_those_of_any_new_file() {
        use std::os::unix::fs::PermissionsExt;
        let folder = TempDir::new().unwrap();
        let [ours, plain] = ["a", "b"].map(|name| folder.path().join(name));
        write(&ours, vec![], BTreeMap::new()).unwrap();
        fs::write(&plain, "").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&ours), mode(&plain));
    }
}
