//! Files that appear whole or not at all.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::temporary;
use crate::error::{Error, Result};

/// A file that is complete and on the disk under a temporary name, in the folder of its path. Dropped, it is removed.
pub(crate) struct StagedFile {
    path: PathBuf,
    temporary: NamedTempFile,
}

impl StagedFile {
    /// Writes the file that is to be at `path`.
    pub(crate) fn new(path: &Path, write: impl FnOnce(&mut BufWriter<&mut File>) -> Result<()>) -> Result<Self> {
        let io_error = |e: io::Error| Error::io(path, e);
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let mut temporary = temporary::file_in(folder.unwrap_or(Path::new("."))).map_err(io_error)?;
        let mut out = BufWriter::with_capacity(1 << 20, temporary.as_file_mut());
        write(&mut out)?;
        out.flush().map_err(io_error)?;
        drop(out);
        temporary.as_file().sync_all().map_err(io_error)?;
        Ok(StagedFile { path: path.into(), temporary })
    }

    /// Gives the file its name; one that has it is replaced.
    pub(crate) fn commit(self) -> Result<()> {
        let StagedFile { path, temporary } = self;
        temporary.persist(&path).map_err(|e| Error::io(&path, e.error))?;
        temporary::sync_parent(&path).map_err(|e| Error::io(&path, e))
    }
}
