//! GGUF files: metadata and tensors in one file, as written by ggml and llama.cpp.
//!
//! ```text
//! "GGUF", version: u32, tensors: u64, entries: u64
//! entries of metadata:  key, type: u32, value
//! tensors:              name, dimensions: u32, lengths: u64 each (the innermost first), type: u32,
//! offset: u64 padding to `general.alignment` (32), and the data; offsets count from here
//! ```
//!
//! Everything is little-endian. Text is a u64 length followed by UTF-8. Versions 2 and 3 are read;
//! they don't differ otherwise. Spec: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

mod blocks;
mod encode;
mod k_quants;
mod parts;
mod types;
mod value;
pub(crate) mod write;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

pub(crate) use encode::encode;
pub(crate) use parts::SPLIT_KEYS;
pub use types::TensorType;
use value::Reader;
pub use value::{Array, FromValue, Value};
pub(crate) use write::{Metadata, OutTensor, OutValue, write};

use super::checkpoint::BaseFormat;
use super::input::regular;
use super::mapped::MappedFile;
use crate::error::{Error, Result};
use crate::memory;
use crate::quant::{HostMatrix, MatrixSpec};

const MAGIC: [u8; 4] = *b"GGUF";
const ALIGNMENT: &str = "general.alignment";
const DEFAULT_ALIGNMENT: usize = 32;
const MAX_DIMENSIONS: u32 = 4;

/// Whether a path ends in `.gguf`, in upper or lower case. There needn't be such a file.
pub fn is_gguf_name(path: impl AsRef<Path>) -> bool {
    path.as_ref().extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// Whether a file is a GGUF file, judging by its name or its first bytes.
///
/// # Errors
/// [`Error::Io`] if it can't be opened, [`Error::File`] if it isn't a regular file.
pub fn is_gguf(path: impl AsRef<Path>) -> Result<bool> {
    let path = path.as_ref();
    let mut file = File::open(regular(path)?).map_err(|e| Error::io(path, e))?;
    let mut start = [0; MAGIC.len()];
    Ok(is_gguf_name(path) || file.read_exact(&mut start).is_ok() && start == MAGIC)
}

/// A memory-mapped GGUF file, or all files of a model that llama.cpp's `gguf-split` has split. The
/// metadata are those of the first file.
#[derive(Debug)]
pub struct GgufFile {
    /// The first file, then the others.
    maps: Vec<MappedFile>,
    header: Header,
}

/// A tensor of a [`GgufFile`].
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    /// Type of the values.
    pub kind: TensorType,
    /// Lengths of the dimensions, outermost first: [rows, cols] for a matrix.
    pub shape: &'a [usize],
    /// Values, row-major in blocks of the type.
    pub bytes: &'a [u8],
}

/// Order of the rows of a matrix, or of the values of a bias, in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    /// The order of Hugging Face models.
    Plain,
    /// Among each head's D rows, 2 i and 2 i + 1 form a rotary pair; Hugging Face stores it at i
    /// and i + D / 2. Files of the llama architecture store q and k this way.
    Interleaved {
        /// D; an even number.
        head_dim: usize,
    },
}

impl RowOrder {
    /// For each of this many rows in a file, the position in Hugging Face's order; `None` if they
    /// aren't a whole number of heads.
    pub(crate) fn sources(self, rows: usize) -> Option<Vec<usize>> {
        match self {
            RowOrder::Plain => Some((0..rows).collect()),
            RowOrder::Interleaved { head_dim } => {
                let heads = head_dim > 0 && head_dim.is_multiple_of(2) && rows.is_multiple_of(head_dim);
                let source = |row| row / head_dim * head_dim + row % 2 * (head_dim / 2) + row % head_dim / 2;
                heads.then(|| (0..rows).map(source).collect())
            }
        }
    }

    /// Reorders `rows` equal spans of bytes into Hugging Face's order; `None` if they aren't a
    /// whole number of heads.
    fn restore<'a>(self, bytes: &'a [u8], rows: usize) -> Option<Cow<'a, [u8]>> {
        if self == RowOrder::Plain {
            return Some(bytes.into());
        }
        let (sources, row_bytes) = (self.sources(rows)?, bytes.len() / rows.max(1));
        let mut out = vec![0; bytes.len()];
        for (row, source) in sources.into_iter().enumerate() {
            out[source * row_bytes..][..row_bytes].copy_from_slice(&bytes[row * row_bytes..][..row_bytes]);
        }
        Some(out.into())
    }

    /// The inverse of [`restore`](Self::restore): reorders bytes from Hugging Face's order into
    /// this one.
    pub(crate) fn arrange(self, bytes: Vec<u8>, rows: usize) -> Option<Vec<u8>> {
        if self == RowOrder::Plain {
            return Some(bytes);
        }
        let (sources, row_bytes) = (self.sources(rows)?, bytes.len() / rows.max(1));
        let mut out = Vec::with_capacity(bytes.len());
        sources.into_iter().for_each(|source| out.extend_from_slice(&bytes[source * row_bytes..][..row_bytes]));
        Some(out)
    }
}

/// Locations of everything in a file.
#[derive(Debug)]
struct Header {
    /// Type and position of every value.
    metadata: BTreeMap<String, (u32, usize)>,
    tensors: BTreeMap<String, Place>,
}

/// Location of a tensor.
#[derive(Debug)]
struct Place {
    /// Index of the file, if there are several.
    file: usize,
    kind: TensorType,
    /// Outermost dimension first.
    shape: Vec<usize>,
    bytes: Range<usize>,
}

impl GgufFile {
    /// Maps the file at `path` and checks its header: every value, count and length lies inside
    /// the file, every tensor has the size that its type and shape require, and no two overlap. If
    /// a model has several files, this is the first; the others are found next to it by name.
    ///
    /// # Errors
    /// [`Error::Io`] if the file can't be opened or another part is missing; [`Error::File`] if it
    /// isn't a GGUF file of version 2 or 3, is malformed, or is a part of a model but not the
    /// first; [`Error::Tensor`] for a tensor of unknown type, at an impossible position, or in two
    /// parts.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let mut file = GgufFile::open_one(path.as_ref())?;
        for part in parts::others(&file)? {
            file.append(part)?;
        }
        file.check_count()?;
        Ok(file)
    }

    fn open_one(path: &Path) -> Result<Self> {
        let map = MappedFile::open(path)?;
        let header = Header::read(&map).map_err(|malformed| malformed.at(map.path()))?;
        Ok(GgufFile { maps: vec![map], header })
    }

    /// Path of the file; the first, if there are several.
    pub fn path(&self) -> &Path {
        self.first().path()
    }

    /// The file with the metadata.
    fn first(&self) -> &MappedFile {
        &self.maps[0]
    }

    /// All metadata keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.header.metadata.keys().map(String::as_str)
    }

    /// Returns the metadata value of `key`, if there is one.
    pub fn metadata(&self, key: &str) -> Option<Value<'_>> {
        let &(kind, start) = self.header.metadata.get(key)?;
        // Opening the file has already read it once.
        Reader::new(&self.first()[start..]).value(kind, 0).ok()
    }

    /// Key, type number and bytes of every value, in the file's order.
    fn raw_metadata(&self) -> impl Iterator<Item = (&str, u32, &[u8])> {
        let mut entries: Vec<_> = self.header.metadata.iter().collect();
        entries.sort_by_key(|(_, (_, start))| *start);
        entries.into_iter().filter_map(|(key, &(kind, start))| {
            let mut reader = Reader::new(&self.first()[start..]);
            reader.value(kind, 0).ok()?;
            Some((key.as_str(), kind, &self.first()[start..start + reader.at]))
        })
    }

    /// Returns the value of `key` as a `T` (`u32`, `i32`, `usize`, `f32`, `bool`, `&str`, or a
    /// `Vec` of one), if there is one.
    ///
    /// # Errors
    /// [`Error::File`] if it has another type or doesn't fit, or if the file was truncated.
    pub fn get<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>> {
        self.first().check_whole()?;
        let wrong =
            |value: Value<'_>| self.metadata_error(key, format!("is {}, expected {}", value.describe(), T::NAME));
        self.metadata(key).map(|value| T::from_value(value).ok_or_else(|| wrong(value))).transpose()
    }

    /// Like [`get`](Self::get), but the value must exist.
    ///
    /// # Errors
    /// [`Error::File`] if it is missing or has another type.
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T> {
        self.get(key)?.ok_or_else(|| self.metadata_error(key, "is missing"))
    }

    /// Makes an [`Error::File`] about the metadata key `key`.
    pub(crate) fn metadata_error(&self, key: &str, message: impl Display) -> Error {
        Error::File { path: self.path().into(), message: format!("`{key}`: {message}") }
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.header.tensors.keys().map(String::as_str)
    }

    /// Names of all tensors, in the order of their data.
    pub fn names_in_order(&self) -> Vec<&str> {
        let mut places: Vec<_> = self.header.tensors.iter().collect();
        places.sort_by_key(|(_, place)| (place.file, place.bytes.start));
        places.into_iter().map(|(name, _)| name.as_str()).collect()
    }

    /// Whether there is a tensor named `name`.
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.header.tensors.contains_key(name)
    }

    /// Returns the tensor named `name` for reading its bytes; checks the file's size again.
    ///
    /// # Errors
    /// [`Error::Tensor`] if there is none, [`Error::File`] if its file was truncated.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        let Place { file, kind, shape, bytes } =
            self.header.tensors.get(name).ok_or_else(|| self.tensor_error(name, "is missing"))?;
        self.maps[*file].check_whole()?;
        Ok(Tensor { kind: *kind, shape, bytes: &self.maps[*file][bytes.clone()] })
    }

    /// The file that contains a tensor; the first file if none does.
    fn map_of(&self, name: &str) -> &MappedFile {
        &self.maps[self.header.tensors.get(name).map_or(0, |place| place.file)]
    }

    /// Reads the matrix named `name`, [`rows`, `cols`], reordering its rows from `order` into
    /// Hugging Face's.
    ///
    /// Q4_0, Q4_1, Q4_K, IQ4_NL, IQ4_XS and MXFP4 become 4-bit matrices with exactly the same
    /// values. `base` decides about the others: dense (F32, F16, BF16 and Q8_0 as they are, other
    /// quantized types as f32), or quantized to 4 bits.
    ///
    /// # Errors
    /// [`Error::Tensor`] if it is missing, has another shape or an unsupported type, or contains a
    /// scale (or a value to be quantized) that isn't finite.
    pub fn matrix(
        &self,
        name: &str,
        rows: usize,
        cols: usize,
        order: RowOrder,
        base: &BaseFormat,
    ) -> Result<HostMatrix> {
        self.decode(name, &[rows, cols], order, base)
    }

    /// Reads the vector named `name`, with `len` values, as f32, reordered from `order` into
    /// Hugging Face's.
    ///
    /// # Errors
    /// Same as [`matrix`](Self::matrix).
    pub fn vector(&self, name: &str, len: usize, order: RowOrder) -> Result<Vec<f32>> {
        let matrix = self.decode(name, &[len], order, &BaseFormat::AsIs)?;
        let mut values = vec![0.0; len];
        matrix.dequantize_rows(0..matrix.rows(), &mut values);
        Ok(values)
    }

    /// Returns how [`matrix`](Self::matrix) would store the matrix with these arguments, from the
    /// header alone.
    ///
    /// # Errors
    /// [`Error::Tensor`] if it is missing, has another shape, or has an unsupported type.
    pub(crate) fn spec(&self, name: &str, rows: usize, cols: usize, base: &BaseFormat) -> Result<MatrixSpec> {
        let tensor = self.shaped(name, &[rows, cols])?;
        let kind = blocks::matrix_kind(tensor.kind, base).ok_or_else(|| self.not_supported(name, tensor.kind))?;
        Ok(MatrixSpec { rows, cols, kind })
    }

    /// Returns the tensor named `name`, which must have this shape.
    fn shaped(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>> {
        let tensor = self.tensor(name)?;
        if tensor.shape != shape {
            return Err(self.tensor_error(name, format!("has shape {:?}, expected {shape:?}", tensor.shape)));
        }
        Ok(tensor)
    }

    fn not_supported(&self, name: &str, kind: TensorType) -> Error {
        self.tensor_error(name, format!("is {kind}, which is not supported"))
    }

    /// Decodes a tensor of this shape; a vector becomes a matrix with one row.
    fn decode(&self, name: &str, shape: &[usize], order: RowOrder, base: &BaseFormat) -> Result<HostMatrix> {
        let tensor = self.shaped(name, shape)?;
        let (spans, [rows, cols]) = match *shape {
            [rows, cols] => (rows, [rows, cols]),
            // A block can't be split.
            _ => (shape[0] / tensor.kind.block(), [1, shape[0]]),
        };
        let needed = base.memory(rows.saturating_mul(cols), tensor.bytes.len());
        memory::check(needed).map_err(|e| self.tensor_error(name, e))?;
        let bytes = order.restore(tensor.bytes, spans).ok_or_else(|| {
            self.tensor_error(name, format!("is {} of shape {shape:?}, which can't be split into heads", tensor.kind))
        })?;
        let matrix = blocks::matrix(tensor.kind, &bytes, rows, cols, base);
        self.map_of(name).release(tensor.bytes);
        matrix.map_err(|e| self.tensor_error(name, e))?.ok_or_else(|| self.not_supported(name, tensor.kind))
    }

    /// Makes an [`Error::Tensor`] about a tensor in this file.
    pub fn tensor_error(&self, name: &str, message: impl Display) -> Error {
        Error::Tensor { path: self.map_of(name).path().into(), key: name.into(), message: message.to_string() }
    }
}

/// A fault in a file, with the tensor that has it.
#[derive(Debug)]
struct Malformed {
    tensor: Option<String>,
    message: String,
}

impl Malformed {
    fn at(self, path: &Path) -> Error {
        let (path, message) = (path.to_path_buf(), self.message);
        match self.tensor {
            Some(key) => Error::Tensor { path, key, message },
            None => Error::File { path, message },
        }
    }
}

impl From<String> for Malformed {
    fn from(message: String) -> Self {
        Malformed { tensor: None, message }
    }
}

impl Header {
    fn read(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        if reader.take(MAGIC.len()).ok() != Some(&MAGIC[..]) {
            return Err("not a GGUF file: it does not begin with \"GGUF\"".to_owned().into());
        }
        match reader.u32()? {
            2 | 3 => {}
            version if version.swap_bytes() <= 3 => return Err("is a big-endian GGUF file".to_owned().into()),
            version => return Err(format!("is GGUF version {version}; supported are 2 and 3").into()),
        }
        let (tensors, entries) = (reader.length()?, reader.length()?);

        let mut metadata = BTreeMap::new();
        let mut alignment = DEFAULT_ALIGNMENT;
        for _ in 0..entries {
            let key = reader.string()?;
            let (kind, start) = (reader.u32()?, reader.at);
            let value = reader.value(kind, 0).map_err(|message| format!("`{key}`: {message}"))?;
            if key == ALIGNMENT {
                alignment = u32::from_value(value)
                    .filter(|alignment| alignment.is_power_of_two())
                    .ok_or_else(|| format!("`{key}`: is {}, expected a power of two", value.describe()))?
                    as usize;
            }
            if metadata.insert(key.to_owned(), (kind, start)).is_some() {
                return Err(format!("`{key}`: is given twice").into());
            }
        }

        let mut places = BTreeMap::new();
        for _ in 0..tensors {
            let name = reader.string()?;
            let about = |message: String| Malformed { tensor: Some(name.to_owned()), message };
            let place = Place::read(&mut reader).map_err(about)?;
            if !place.bytes.start.is_multiple_of(alignment) {
                return Err(about(format!("begins at {}, which isn't a multiple of {alignment}", place.bytes.start)));
            }
            if places.insert(name.to_owned(), place).is_some() {
                return Err(about("is given twice".into()));
            }
        }

        let data_start = reader.at.checked_next_multiple_of(alignment).unwrap_or(usize::MAX);
        let data = bytes.len().saturating_sub(data_start);
        for (name, place) in &mut places {
            if place.bytes.end > data {
                let message = format!(
                    "ends at byte {} of {data} bytes of data; if the file is truncated, copy or download it again",
                    place.bytes.end
                );
                return Err(Malformed { tensor: Some(name.clone()), message });
            }
            place.bytes = data_start + place.bytes.start..data_start + place.bytes.end;
        }
        check_apart(&places)?;
        Ok(Header { metadata, tensors: places })
    }
}

impl Place {
    /// Reads a tensor's entry after its name. Positions are relative to the data.
    fn read(reader: &mut Reader<'_>) -> Result<Self, String> {
        let dimensions = reader.u32()?;
        if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
            return Err(format!("has {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}"));
        }
        let mut shape = (0..dimensions).map(|_| reader.length()).collect::<Result<Vec<_>, _>>()?;
        shape.reverse();
        let id = reader.u32()?;
        let kind = TensorType::from_id(id).ok_or_else(|| format!("is of unknown type {id}"))?;
        if !shape.last().is_some_and(|cols| cols.is_multiple_of(kind.block())) {
            return Err(format!("is {kind} of shape {shape:?}; rows must be whole blocks of {}", kind.block()));
        }
        let start = reader.length()?;
        let values = shape.iter().try_fold(1_usize, |n, &length| n.checked_mul(length));
        let len = values.and_then(|values| kind.bytes(values));
        let end = len.and_then(|len| start.checked_add(len));
        let end = end.ok_or_else(|| format!("is {kind} of shape {shape:?} at {start}, which is too large"))?;
        Ok(Place { file: 0, kind, shape, bytes: start..end })
    }
}

/// Checks that no byte belongs to two tensors.
fn check_apart(places: &BTreeMap<String, Place>) -> Result<(), Malformed> {
    let mut sorted: Vec<_> = places.iter().filter(|(_, place)| !place.bytes.is_empty()).collect();
    sorted.sort_by_key(|(_, place)| place.bytes.start);
    match sorted.windows(2).find(|pair| pair[0].1.bytes.end > pair[1].1.bytes.start) {
        Some(pair) => {
            Err(Malformed { tensor: Some(pair[1].0.clone()), message: format!("overlaps tensor {:?}", pair[0].0) })
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) mod writer;
