//! Files mapped into memory.
//!
//! The bytes of a mapped file are its bytes as they are now. A program that cuts it short while it is mapped takes them away, and
//! the system ends whoever reads them then (SIGBUS). So the file's size is asked for again before each tensor is read. What
//! remains is a file that is cut short while one of its tensors is being read: replace a model by renaming, as downloads
//! and this crate's writers do, and never write over it in place.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::input::{check_no_pointer, regular};
use crate::error::{Error, Result};

/// The bytes of a file, brought in from the disk as they are read.
#[derive(Debug)]
pub(super) struct MappedFile {
    path: PathBuf,
    file: File,
    map: Mmap,
}

impl MappedFile {
    /// Maps a regular file.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened, [`Error::File`] if it is of another kind or a pointer of Git LFS.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let io_error = |e: io::Error| Error::io(path, e);
        let file = File::open(regular(path)?).map_err(io_error)?;
        // SAFETY: the mapped bytes change only if another process writes to the file in place while it
        // is open here, which model files are not meant for; this crate's own writers never do.
        let map = unsafe { Mmap::map(&file) }.map_err(io_error)?;
        check_no_pointer(path, &map)?;
        Ok(MappedFile { path: path.into(), file, map })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Checks that the file still has all the bytes that it had when it was opened.
    ///
    /// # Errors
    /// [`Error::File`] if it has been cut short.
    pub(super) fn check_whole(&self) -> Result<()> {
        let (was, is) = (self.map.len() as u64, self.file.metadata().map_err(|e| Error::io(&self.path, e))?.len());
        if is >= was {
            return Ok(());
        }
        let message = format!("has been cut short while it is in use: it had {was} bytes, and has {is}");
        Err(Error::File { path: self.path.clone(), message })
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
