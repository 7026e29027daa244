//! Writes GGUF files: the header first, then tensor by tensor, so that only one is in memory at a
//! time.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::Path;

use super::value::kind;
use super::{DEFAULT_ALIGNMENT, GgufFile, MAGIC, TensorType};
use crate::error::{Error, Result};
use crate::formats::staged::StagedFile;

/// Version of the files.
const VERSION: u32 = 3;

/// A metadata value to write.
#[derive(Clone, Debug, PartialEq)]
pub enum OutValue {
    /// An unsigned 32-bit integer.
    U32(u32),
    /// A 32-bit float.
    F32(f32),
    /// True or false.
    Bool(bool),
    /// Text.
    String(String),
    /// An array of texts.
    Strings(Vec<String>),
    /// An array of 32-bit floats.
    F32s(Vec<f32>),
    /// An array of signed 32-bit integers.
    I32s(Vec<i32>),
    /// Copied from another file.
    Raw {
        /// Number of its type.
        kind: u32,
        /// Its bytes.
        bytes: Vec<u8>,
    },
}

impl OutValue {
    fn kind(&self) -> u32 {
        match self {
            OutValue::U32(_) => kind::U32,
            OutValue::F32(_) => kind::F32,
            OutValue::Bool(_) => kind::BOOL,
            OutValue::String(_) => kind::STRING,
            OutValue::Strings(_) | OutValue::F32s(_) | OutValue::I32s(_) => kind::ARRAY,
            OutValue::Raw { kind, .. } => *kind,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        match self {
            OutValue::U32(value) => value.to_le_bytes().to_vec(),
            OutValue::F32(value) => value.to_le_bytes().to_vec(),
            OutValue::Bool(value) => vec![u8::from(*value)],
            OutValue::String(value) => text(value),
            OutValue::Strings(values) => array(kind::STRING, values, |value| text(value)),
            OutValue::F32s(values) => array(kind::F32, values, |value| value.to_le_bytes()),
            OutValue::I32s(values) => array(kind::I32, values, |value| value.to_le_bytes()),
            OutValue::Raw { bytes, .. } => bytes.clone(),
        }
    }
}

/// Encodes a string for a file.
pub(crate) fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// Encodes an array of this type for a file.
pub(super) fn array<T, B: AsRef<[u8]>>(kind: u32, values: &[T], bytes: impl Fn(&T) -> B) -> Vec<u8> {
    let mut out = [&kind.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
    values.iter().for_each(|value| out.extend_from_slice(bytes(value).as_ref()));
    out
}

/// Keys and values to write, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata(Vec<(String, OutValue)>);

impl Metadata {
    /// All metadata of a file, in its order.
    pub fn of(file: &GgufFile) -> Metadata {
        let raw =
            |(key, kind, bytes): (&str, u32, &[u8])| (key.to_owned(), OutValue::Raw { kind, bytes: bytes.into() });
        Metadata(file.raw_metadata().map(raw).collect())
    }

    /// Sets `key` to a value: in place if it exists, otherwise at the end.
    pub fn set(&mut self, key: impl Into<String>, value: OutValue) {
        let key = key.into();
        match self.0.iter_mut().find(|(known, _)| *known == key) {
            Some((_, old)) => *old = value,
            None => self.0.push((key, value)),
        }
    }

    /// Removes `key`.
    pub fn remove(&mut self, key: &str) {
        self.0.retain(|(known, _)| known != key);
    }
}

/// Makes the bytes of a tensor.
pub type MakeBytes<'a> = Box<dyn Fn() -> Result<Cow<'a, [u8]>> + 'a>;

/// A tensor to write.
pub struct OutTensor<'a> {
    /// Name in the file.
    pub name: String,
    /// Type of the values.
    pub kind: TensorType,
    /// Lengths of the dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Its blocks, made just before they are written.
    pub data: MakeBytes<'a>,
}

/// Writes a GGUF file, version 3, with the tensors in the given order. The file is written
/// completely or not at all; an existing one is replaced.
///
/// # Errors
/// [`Error::Io`] if writing fails; [`Error::Tensor`] for a name that appears twice, a shape that
/// isn't a whole number of blocks, or bytes that don't fit the shape; errors from making tensors.
pub fn write(path: &Path, metadata: &Metadata, tensors: &[OutTensor<'_>]) -> Result<()> {
    let (header, lengths) = header(path, metadata, tensors)?;
    let io_error = |e: io::Error| Error::io(path, e);
    let staged = StagedFile::new(path, |out| {
        out.write_all(&header).map_err(io_error)?;
        for (tensor, length) in tensors.iter().zip(lengths) {
            let bytes = (tensor.data)()?;
            if bytes.len() != length {
                let message = format!("{} bytes do not fill {} {:?}", bytes.len(), tensor.kind, tensor.shape);
                return Err(tensor_error(path, tensor, message));
            }
            out.write_all(&bytes).map_err(io_error)?;
            out.write_all(&padding(length)).map_err(io_error)?;
        }
        Ok(())
    })?;
    staged.commit()
}

/// Makes everything before the data, and the sizes of the tensors in bytes.
fn header(path: &Path, metadata: &Metadata, tensors: &[OutTensor<'_>]) -> Result<(Vec<u8>, Vec<usize>)> {
    let counts = [tensors.len() as u64, metadata.0.len() as u64];
    let mut out = [&MAGIC[..], &VERSION.to_le_bytes(), bytemuck::bytes_of(&counts)].concat();
    for (key, value) in &metadata.0 {
        out.extend(text(key));
        out.extend(value.kind().to_le_bytes());
        out.extend(value.bytes());
    }
    let (mut lengths, mut offset, mut names) = (Vec::with_capacity(tensors.len()), 0, BTreeSet::new());
    for tensor in tensors {
        if !names.insert(&tensor.name) {
            return Err(tensor_error(path, tensor, "would be written twice"));
        }
        let rows_are_whole = tensor.shape.last().is_some_and(|cols| cols.is_multiple_of(tensor.kind.block()));
        let length = tensor.kind.bytes(tensor.shape.iter().product()).filter(|_| rows_are_whole).ok_or_else(|| {
            tensor_error(
                path,
                tensor,
                format!("row length is not a multiple of {}'s block size: {:?}", tensor.kind, tensor.shape),
            )
        })?;
        out.extend(text(&tensor.name));
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|&length| out.extend((length as u64).to_le_bytes()));
        out.extend(tensor.kind.id().to_le_bytes());
        out.extend((offset as u64).to_le_bytes());
        lengths.push(length);
        offset += length.next_multiple_of(DEFAULT_ALIGNMENT);
    }
    out.extend(padding(out.len()));
    Ok((out, lengths))
}

/// Zeros from `length` to the next position where a tensor may begin.
fn padding(length: usize) -> Vec<u8> {
    vec![0; length.next_multiple_of(DEFAULT_ALIGNMENT) - length]
}

fn tensor_error(path: &Path, tensor: &OutTensor<'_>, message: impl ToString) -> Error {
    Error::Tensor { path: path.into(), key: tensor.name.clone(), message: message.to_string() }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::formats::gguf::RowOrder;

    fn tensor(name: &str, shape: &[usize], values: &'static [f32]) -> OutTensor<'static> {
        let data = move || Ok(Cow::Borrowed(bytemuck::cast_slice(values)));
        OutTensor { name: name.into(), kind: TensorType::F32, shape: shape.into(), data: Box::new(data) }
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("a.gguf");
        let mut metadata = Metadata::default();
        metadata.set("general.architecture", OutValue::String("llama".into()));
        metadata.set("a.u32", OutValue::U32(1));
        metadata.set("a.u32", OutValue::U32(7));
        metadata.set("a.f32", OutValue::F32(0.5));
        metadata.set("a.bool", OutValue::Bool(true));
        metadata.set("a.gone", OutValue::Bool(true));
        metadata.set("a.strings", OutValue::Strings(vec!["é".into(), "".into()]));
        metadata.set("a.f32s", OutValue::F32s(vec![1.5, -2.0]));
        metadata.set("a.i32s", OutValue::I32s(vec![-1]));
        metadata.remove("a.gone");
        let tensors = [tensor("b", &[2, 3], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]), tensor("a", &[1], &[9.0])];
        write(&path, &metadata, &tensors).unwrap();

        let file = GgufFile::open(&path).unwrap();
        assert_eq!(file.get::<u32>("a.u32").unwrap(), Some(7));
        assert_eq!(file.get::<f32>("a.f32").unwrap(), Some(0.5));
        assert_eq!(file.get::<bool>("a.bool").unwrap(), Some(true));
        assert_eq!(file.get::<Vec<&str>>("a.strings").unwrap(), Some(vec!["é", ""]));
        assert_eq!(file.get::<Vec<f32>>("a.f32s").unwrap(), Some(vec![1.5, -2.0]));
        assert_eq!(file.get::<Vec<i32>>("a.i32s").unwrap(), Some(vec![-1]));
        assert_eq!(file.keys().count(), 7);
        assert_eq!(file.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(file.tensor("b").unwrap().shape, [2, 3]);
        assert_eq!(file.vector("a", 1, RowOrder::Plain).unwrap(), [9.0]);

        // Keys of another file are copied unchanged.
        let again = folder.path().join("b.gguf");
        write(&again, &Metadata::of(&file), &tensors).unwrap();
        assert_eq!(std::fs::read(again).unwrap(), std::fs::read(path).unwrap());
    }

    #[test]
    fn a_failed_write_leaves_nothing() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("a.gguf");
        let error = |tensors: &[OutTensor<'_>]| write(&path, &Metadata::default(), tensors).unwrap_err().to_string();
        assert!(
            error(&[tensor("w", &[1], &[1.0]), tensor("w", &[1], &[1.0])])
                .contains("tensor \"w\": would be written twice")
        );
        assert!(error(&[tensor("v", &[1], &[1.0]), tensor("w", &[2], &[1.0])]).contains("do not fill"));
        let blocks = OutTensor { kind: TensorType::Q8_0, ..tensor("w", &[2, 48], &[]) };
        assert!(error(&[blocks]).contains("not a multiple of Q8_0's block size: [2, 48]"));
        let failing = || Err(Error::io("there", io::Error::other("no room")));
        assert_eq!(error(&[OutTensor { data: Box::new(failing), ..tensor("w", &[1], &[]) }]), "there: no room");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
