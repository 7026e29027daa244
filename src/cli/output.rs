//! Checks of output paths: never overwrite an input, and nothing else without --force.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};
use crate::formats::staged::{is_same, is_standard_output};

/// A path and its name in messages.
pub(super) type Named<'a> = (&'a Path, &'a str);

/// Whether an output file is standard output.
static ON_STDOUT: AtomicBool = AtomicBool::new(false);

/// Refuses an output that is an input, or a file in an input folder, through whatever links.
/// Devices and pipes may be both.
///
/// # Errors
/// [`Error::File`] with the output's path.
pub(super) fn check<'a>(outputs: impl IntoIterator<Item = &'a Path>, inputs: &[Named<'_>]) -> Result<()> {
    for output in outputs {
        for (input, what) in inputs {
            if is_same(output, input) {
                return Err(refused(output, what));
            }
            if files(input).iter().any(|file| is_same(output, file)) {
                return Err(refused(output, &format!("a file of {what}")));
            }
        }
        if is_standard_output(output) {
            ON_STDOUT.store(true, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// Refuses an output that is also another output.
///
/// # Errors
/// [`Error::File`] with the output's path.
pub(super) fn check_apart(output: &Path, (other, what): Named<'_>) -> Result<()> {
    if is_same_place(output, other) { Err(refused(output, what)) } else { Ok(()) }
}

fn refused(output: &Path, what: &str) -> Error {
    Error::File { path: output.into(), message: format!("is {what} too; choose another output") }
}

/// Whether an output file goes to standard output, so that nothing else may.
pub(super) fn has_stdout() -> bool {
    ON_STDOUT.load(Ordering::Relaxed)
}

/// Whether the output would replace a file or a folder that isn't empty.
pub(super) fn would_replace(output: &Path) -> bool {
    match fs::metadata(output) {
        Ok(found) if found.is_dir() => output.read_dir().is_ok_and(|mut entries| entries.next().is_some()),
        Ok(found) => found.is_file() && !is_standard_output(output),
        Err(_) => false,
    }
}

/// The files in a folder and in its direct subfolders.
pub(super) fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = |folder: &Path| -> Vec<PathBuf> {
        folder.read_dir().into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    };
    let (folders, mut files): (Vec<_>, Vec<_>) = entries(folder).into_iter().partition(|path| path.is_dir());
    files.extend(folders.iter().flat_map(|folder| entries(folder)).filter(|path| !path.is_dir()));
    files
}

/// Whether two outputs, which needn't exist yet, are the same file.
fn is_same_place(one: &Path, other: &Path) -> bool {
    let place = |path: &Path| {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Some(fs::canonicalize(folder).ok()?.join(path.file_name()?))
    };
    if one.exists() || other.exists() {
        return is_same(one, other);
    }
    place(one).is_some_and(|one| Some(one) == place(other))
}
