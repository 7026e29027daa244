//! Files mapped into memory.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{Error, Result};

/// The bytes of a file, brought in from the disk as they are read.
#[derive(Debug)]
pub(super) struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let io_error = |e: io::Error| Error::io(path, e);
        let file = File::open(path).map_err(io_error)?;
        // SAFETY: the mapped bytes change only if another process writes to the file in place while it
        // is open here, which model files are not meant for; this crate's own writers never do.
        let map = unsafe { Mmap::map(&file) }.map_err(io_error)?;
        Ok(MappedFile { path: path.into(), map })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives back the memory that a part of the file took when it was read; it can be read again. A model would otherwise
    /// count twice while it is loaded: as the file's pages, and in its own form.
    pub(super) fn release(&self, part: &[u8]) {
        #[cfg(unix)]
        {
            let start = (part.as_ptr() as usize).wrapping_sub(self.map.as_ptr() as usize);
            if start < self.map.len() && !part.is_empty() {
                // SAFETY: the mapping is of a file, is never written through, and so has the same bytes when it is read again.
                // A failure costs memory and nothing else.
                let _ =
                    unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, part.len()) };
            }
        }
        #[cfg(not(unix))]
        let _ = part;
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}
