//! Files mapped into memory.
//!
//! A mapping always shows the file's current bytes. If a program truncates the file while it is
//! mapped, the system kills any process that reads the missing bytes (SIGBUS). So the file's size
//! is checked again before each tensor is read. The remaining risk is truncation during such a
//! read: replace a model by renaming, as downloads and this crate's writers do, and never
//! overwrite it in place.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::input::{check_no_pointer, regular};
use crate::error::{Error, Result};

/// Bytes of a file, loaded from disk as they are read.
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
    /// [`Error::Io`] if it can't be opened, [`Error::File`] if it isn't a regular file or is a Git
    /// LFS pointer.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let io_error = |e: io::Error| Error::io(path, e);
        let file = File::open(regular(path)?).map_err(io_error)?;
        // SAFETY: the mapped bytes change only if another process writes to the file in place
        // while it is open here. Model files aren't meant for that, and this crate's own writers
        // never do it.
        let map = unsafe { Mmap::map(&file) }.map_err(io_error)?;
        check_no_pointer(path, &map)?;
        Ok(MappedFile { path: path.into(), file, map })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Checks that the file still has all the bytes it had when it was opened.
    ///
    /// # Errors
    /// [`Error::File`] if it was truncated.
    pub(super) fn check_whole(&self) -> Result<()> {
        let (was, is) = (self.map.len() as u64, self.file.metadata().map_err(|e| Error::io(&self.path, e))?.len());
        if is >= was {
            return Ok(());
        }
        let message = format!("was truncated while in use: it had {was} bytes, now it has {is}");
        Err(Error::File { path: self.path.clone(), message })
    }

    /// Releases the memory that reading a part of the file took; the part can be read again.
    /// Otherwise a model would count twice while loading: as the file's pages, and in its own
    /// form.
    pub(super) fn release(&self, part: &[u8]) {
        #[cfg(unix)]
        {
            let start = (part.as_ptr() as usize).wrapping_sub(self.map.as_ptr() as usize);
            if start < self.map.len() && !part.is_empty() {
                // SAFETY: the mapping belongs to a file and is never written through, so it has
                // the same bytes when read again. A failure only costs memory.
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
