//! Checks of paths before any work is done: an input exists; an output never replaces an input, and
//! nothing else without --force.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::internal::gguf::is_gguf_name;
use qlora_wgpu::internal::{is_same, is_standard_output};

use super::output::leave_stdout;

/// A path and its name in messages.
pub(super) type Named<'a> = (&'a Path, &'a str);

/// Checks that a path exists. People often mistype paths, so the error is plainer than the
/// system's.
pub(super) fn exists(path: &Path) -> Result<()> {
    match path.try_exists() {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::io(path, io::Error::new(io::ErrorKind::NotFound, "no such file or directory"))),
        Err(error) => Err(Error::io(path, error)),
    }
}

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
            leave_stdout();
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

/// Refuses to replace an output without --force, and to replace an input at all.
pub(super) fn check_model_output(output: &Path, model: &Path, adapter: &Path, force: bool) -> Result<()> {
    let refuse = |message: &str| Err(Error::File { path: output.into(), message: message.into() });
    check_model_inputs(output, model, adapter)?;
    match (is_gguf_name(output), output.is_dir()) {
        (true, true) => refuse("is a directory; a GGUF file can't replace it"),
        (false, false) if output.exists() => refuse("is a file; name a directory, or a file that ends in .gguf"),
        _ if !force && would_replace(output) => refuse("exists; pass --force to replace it"),
        _ => Ok(()),
    }
}

/// Refuses to write over files of the model or the adapter. An output folder may have any of its
/// files replaced except GGUF files.
pub(super) fn check_model_inputs(output: &Path, model: &Path, adapter: &Path) -> Result<()> {
    let files = if is_gguf_name(output) { Vec::new() } else { files(output) };
    let files = files.iter().map(PathBuf::as_path).filter(|file| !is_gguf_name(file));
    check(std::iter::once(output).chain(files), &[(model, "the model"), (adapter, "the adapter")])
}

/// Refuses to replace a file without --force, and to replace the input at all.
pub(super) fn check_file_output(output: &Path, input: &Path, force: bool) -> Result<()> {
    check([output], &[(input, "the input")])?;
    if !force && would_replace(output) {
        let message = "exists; pass --force to replace it".into();
        return Err(Error::File { path: output.into(), message });
    }
    Ok(())
}
