//! Small files, read whole: configurations, tokenizers, settings.

use std::fs::{File, Metadata};
use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result};

/// The most bytes of a file that is read whole, unless its reader says otherwise. The largest `tokenizer.json` in use have 35 MB.
pub(crate) const MAX_SMALL: u64 = 256 << 20;

/// The most bytes of a file of settings that is read as JSON. The largest `tokenizer_config.json` in use have 1 MB.
pub(crate) const MAX_JSON: u64 = 16 << 20;

/// How a file begins that stands for a large one in a clone made without Git LFS.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/v1";

/// The bytes of a regular file of at most `most` bytes.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::File`] if it is larger or no regular file (a device or a pipe may have no end),
/// or only a pointer of Git LFS.
pub(crate) fn read_small(path: &Path, most: u64) -> Result<Vec<u8>> {
    let mut file = File::open(regular(path)?).map_err(|e| Error::io(path, e))?;
    let mut bytes = Vec::new();
    // A file may also grow while it is read.
    Read::by_ref(&mut file).take(most + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > most {
        let message = format!("is larger than {most} bytes, the most that is read of a file of its kind");
        return Err(Error::File { path: path.into(), message });
    }
    check_no_pointer(path, &bytes)?;
    Ok(bytes)
}

/// The text of a regular file of at most `most` bytes, without the byte order mark that some editors put before it.
///
/// # Errors
/// Same as [`read_small`]; [`Error::File`] if it is not UTF-8.
pub(crate) fn read_small_text(path: &Path, most: u64) -> Result<String> {
    let not_utf8 =
        |e: std::string::FromUtf8Error| Error::File { path: path.into(), message: format!("is not UTF-8: {e}") };
    let text = String::from_utf8(read_small(path, most)?).map_err(not_utf8)?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

/// Checks that a file that begins with these bytes is not a pointer of Git LFS.
///
/// # Errors
/// [`Error::File`] if it is.
pub(crate) fn check_no_pointer(path: &Path, bytes: &[u8]) -> Result<()> {
    if !bytes.starts_with(LFS_POINTER) {
        return Ok(());
    }
    let message = "is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, or download the file";
    Err(Error::File { path: path.into(), message: message.into() })
}

/// The path, if it leads to a regular file. Asked before it is opened, as opening a pipe waits for someone to write.
///
/// # Errors
/// [`Error::Io`] if there is no such file, [`Error::File`] if it is of another kind.
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
