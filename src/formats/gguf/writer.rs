//! GGUF files for tests.

use std::fs;

use tempfile::TempDir;

pub(crate) use super::write::text;
use super::{GgufFile, TensorType};
use crate::error::Result;

/// Builds GGUF files for tests.
#[derive(Clone, Default)]
pub struct Writer {
    entries: Vec<Vec<u8>>,
    tensors: Vec<(Vec<u8>, u64)>,
    data: Vec<u8>,
    /// End positions of the fields in the last file.
    pub seams: Vec<usize>,
}

/// An array of a type.
pub fn array(kind: u32, elements: &[Vec<u8>]) -> Vec<u8> {
    super::write::array(kind, elements, Vec::clone)
}

impl Writer {
    pub fn entry(mut self, key: &str, kind: u32, value: impl AsRef<[u8]>) -> Self {
        self.entries.push([&text(key), &kind.to_le_bytes()[..], value.as_ref()].concat());
        self
    }

    pub fn u32(self, key: &str, value: u32) -> Self {
        self.entry(key, 4, value.to_le_bytes())
    }

    pub fn f32(self, key: &str, value: f32) -> Self {
        self.entry(key, 6, value.to_le_bytes())
    }

    pub fn string(self, key: &str, value: &str) -> Self {
        self.entry(key, 8, text(value))
    }

    /// Adds a tensor; outermost dimension first.
    pub fn tensor(mut self, name: &str, shape: &[usize], kind: TensorType, bytes: &[u8]) -> Self {
        let offset = self.data.len().next_multiple_of(32);
        self.data.resize(offset, 0);
        self.data.extend(bytes);
        self.placed(name, shape, kind.id(), offset as u64)
    }

    /// Adds a tensor at `offset` in the data, without bytes of its own.
    pub fn placed(mut self, name: &str, shape: &[usize], kind: u32, offset: u64) -> Self {
        let lengths = shape.iter().rev().flat_map(|&length| (length as u64).to_le_bytes());
        let mut info = [&text(name), &(shape.len() as u32).to_le_bytes()[..]].concat();
        info.extend(lengths.chain(kind.to_le_bytes()));
        self.tensors.push((info, offset));
        self
    }

    /// Returns the whole file.
    pub fn bytes(&mut self) -> Vec<u8> {
        let counts = [self.tensors.len() as u64, self.entries.len() as u64];
        let mut out = [b"GGUF", &3_u32.to_le_bytes()[..], bytemuck::bytes_of(&counts)].concat();
        self.seams = vec![0, 4, 8, 16, 24];
        for entry in &self.entries {
            out.extend(entry);
            self.seams.push(out.len());
        }
        for (info, offset) in &self.tensors {
            out.extend(info);
            self.seams.push(out.len());
            out.extend(offset.to_le_bytes());
            self.seams.push(out.len());
        }
        out.resize(out.len().next_multiple_of(32), 0);
        self.seams.push(out.len());
        out.extend(&self.data);
        out
    }

    /// Writes the file into `folder` and opens it.
    pub fn open(&mut self, folder: &TempDir) -> Result<GgufFile> {
        let path = folder.path().join("x.gguf");
        fs::write(&path, self.bytes()).unwrap();
        GgufFile::open(path)
    }
}
