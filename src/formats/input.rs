//! Small files that are read whole: configurations, tokenizers, settings.

use std::fs::{File, Metadata};
use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result};

/// Default maximum size of a file that is read whole, in bytes. The largest `tokenizer.json` in
/// use have 35 MB.
pub const MAX_SMALL: u64 = 256 << 20;

/// Maximum size of a JSON settings file, in bytes. The largest `tokenizer_config.json` in use have
/// 1 MB.
pub(crate) const MAX_JSON: u64 = 16 << 20;

/// First bytes of the file that replaces a large one in a clone made without Git LFS.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/v1";

/// Reads a regular file of at most `most` bytes.
///
/// # Errors
/// [`Error::Io`] if it can't be read; [`Error::File`] if it is larger, not a regular file (a
/// device or a pipe might have no end), or only a Git LFS pointer.
pub fn read_small(path: &Path, most: u64) -> Result<Vec<u8>> {
    let mut file = File::open(regular(path)?).map_err(|e| Error::io(path, e))?;
    let mut bytes = Vec::new();
    // A file may grow while it is read.
    Read::by_ref(&mut file).take(most + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > most {
        let message = format!("is larger than {most} bytes, the limit for files of this kind");
        return Err(Error::File { path: path.into(), message });
    }
    check_no_pointer(path, &bytes)?;
    Ok(bytes)
}

/// Reads the text of a regular file of at most `most` bytes. Drops the byte order mark that some
/// editors write.
///
/// # Errors
/// Same as [`read_small`]; [`Error::File`] if it isn't UTF-8.
pub fn read_small_text(path: &Path, most: u64) -> Result<String> {
    let not_utf8 =
        |e: std::string::FromUtf8Error| Error::File { path: path.into(), message: format!("is not UTF-8: {e}") };
    let text = String::from_utf8(read_small(path, most)?).map_err(not_utf8)?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

/// Checks that a file beginning with these bytes isn't a Git LFS pointer.
///
/// # Errors
/// [`Error::File`] if it is one.
pub(crate) fn check_no_pointer(path: &Path, bytes: &[u8]) -> Result<()> {
    if !bytes.starts_with(LFS_POINTER) {
        return Ok(());
    }
    let message = "is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, or download the file";
    Err(Error::File { path: path.into(), message: message.into() })
}

/// Returns the path if it is a regular file. Check before opening, because opening a pipe waits
/// for a writer.
///
/// # Errors
/// [`Error::Io`] if there is no such file, [`Error::File`] if it is not a regular file.
pub(crate) fn regular(path: &Path) -> Result<&Path> {
    let metadata: Metadata = path.metadata().map_err(|e| Error::io(path, e))?;
    if metadata.is_file() {
        return Ok(path);
    }
    let what = if metadata.is_dir() { "a directory" } else { "not a regular file" };
    Err(Error::File { path: path.into(), message: format!("is {what}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_within_the_limit_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, "\u{feff}{}").unwrap();
        assert_eq!(read_small_text(&path, 5).unwrap(), "{}");
        assert!(read_small(&path, 4).unwrap_err().to_string().contains("larger than 4 bytes"));
        assert!(read_small(folder.path(), 4).unwrap_err().to_string().contains("is a directory"));
        #[cfg(unix)]
        assert!(read_small("/dev/zero".as_ref(), 4).unwrap_err().to_string().contains("not a regular file"));
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 14693368\n";
        std::fs::write(&path, pointer).unwrap();
        assert!(read_small(&path, 99).unwrap_err().to_string().contains("git lfs pull"));
        std::fs::write(&path, [0xff]).unwrap();
        assert!(read_small_text(&path, 5).unwrap_err().to_string().contains("not UTF-8"));
    }
}
