//! Files that are written completely or not at all. Anything other than a regular file (a device,
//! a pipe, a terminal) is written to, never replaced.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::temporary;
use crate::error::{Error, Result};

/// Maximum number of symbolic links to follow to a file that doesn't exist yet; the same as in
/// Linux.
const MOST_LINKS: usize = 40;

/// A complete file on disk under a temporary name, in the folder of its path. Removed when
/// dropped.
pub(crate) struct StagedFile {
    path: PathBuf,
    /// The file and its final name; `None` if a device or pipe was written to.
    temporary: Option<(NamedTempFile, PathBuf)>,
}

/// Destination of what is written to a path.
enum Target {
    /// A regular file that may not exist yet, with symbolic links resolved.
    File(PathBuf),
    /// A device, a pipe, or the target of standard output or standard error, open as it is.
    Stream(File),
}

impl StagedFile {
    /// Writes the file that will be at `path`, or writes directly if `path` exists and isn't a
    /// regular file.
    pub(crate) fn new(path: &Path, write: impl FnOnce(&mut BufWriter<&mut File>) -> Result<()>) -> Result<Self> {
        let io_error = |e: io::Error| Error::io(path, e);
        let fill = |file: &mut File| {
            let mut out = BufWriter::with_capacity(1 << 20, file);
            write(&mut out)?;
            out.flush().map_err(io_error)
        };
        match Target::of(path).map_err(io_error)? {
            Target::File(real) => {
                let folder = real.parent().filter(|folder| !folder.as_os_str().is_empty());
                let folder = folder.unwrap_or(Path::new("."));
                if !folder.exists() {
                    let message = format!("there is no directory {}", folder.display());
                    return Err(io_error(io::Error::new(ErrorKind::NotFound, message)));
                }
                let mut temporary = temporary::file_in(folder).map_err(io_error)?;
                fill(temporary.as_file_mut())?;
                temporary.as_file().sync_all().map_err(io_error)?;
                Ok(StagedFile { path: path.into(), temporary: Some((temporary, real)) })
            }
            Target::Stream(mut file) => {
                fill(&mut file)?;
                Ok(StagedFile { path: path.into(), temporary: None })
            }
        }
    }

    /// Gives the file its name, replacing an existing one.
    pub(crate) fn commit(self) -> Result<()> {
        let StagedFile { path, temporary } = self;
        let Some((temporary, real)) = temporary else { return Ok(()) };
        temporary.persist(&real).map_err(|e| Error::io(&path, e.error))?;
        temporary::sync_parent(&real).map_err(|e| Error::io(&path, e))
    }
}

impl Target {
    fn of(path: &Path) -> io::Result<Target> {
        let found = match fs::metadata(path) {
            Ok(found) => found,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Target::File(linked(path)?)),
            Err(error) => return Err(error),
        };
        if found.is_dir() {
            return Err(io::Error::new(ErrorKind::IsADirectory, "is a directory"));
        }
        // Write through the open stream: its position may be at the end, and others may write to
        // it.
        if let Some(stream) = standard_stream(&found)? {
            return Ok(Target::Stream(stream));
        }
        if !found.is_file() {
            return Ok(Target::Stream(OpenOptions::new().write(true).open(path)?));
        }
        if !path.is_symlink() {
            return Ok(Target::File(path.into()));
        }
        match fs::canonicalize(path) {
            Ok(real) => Ok(Target::File(real)),
            // A file without a name, whose number is in /dev/fd.
            Err(_) => Ok(Target::Stream(OpenOptions::new().write(true).truncate(true).open(path)?)),
        }
    }
}

/// Resolves the symbolic links at a path where no file exists.
fn linked(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_path_buf();
    for _ in 0..MOST_LINKS {
        match fs::read_link(&path) {
            Ok(target) => path = path.parent().unwrap_or(Path::new("")).join(target),
            Err(_) => return Ok(path),
        }
    }
    Err(io::Error::other("too many symbolic links"))
}

/// Whether `path` is the file or pipe that is this process's standard output.
#[cfg(any(feature = "cli", test))]
pub(crate) fn is_standard_output(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| stream_is(&io::stdout(), &found).is_ok_and(|stream| stream.is_some()))
}

/// Returns standard output or standard error if it is redirected to `found`.
fn standard_stream(found: &Metadata) -> io::Result<Option<File>> {
    match stream_is(&io::stdout(), found)? {
        Some(stream) => Ok(Some(stream)),
        None => stream_is(&io::stderr(), found),
    }
}

#[cfg(unix)]
fn stream_is(stream: &impl std::os::fd::AsFd, found: &Metadata) -> io::Result<Option<File>> {
    use std::os::unix::fs::FileTypeExt;
    // Devices are the same however they are opened. A stream may be closed.
    let Ok(stream) = stream.as_fd().try_clone_to_owned() else { return Ok(None) };
    let stream = File::from(stream);
    let same = !found.file_type().is_char_device() && identity(&stream.metadata()?) == identity(found);
    Ok(same.then_some(stream))
}

#[cfg(not(unix))]
fn stream_is<S>(_: &S, _: &Metadata) -> io::Result<Option<File>> {
    Ok(None)
}

/// Identity of a file, whatever its name: its device, and its number there.
#[cfg(unix)]
fn identity(found: &Metadata) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    (found.dev(), found.ino())
}

/// Whether two paths are the same regular file or folder, also through symbolic or hard links.
#[cfg(any(feature = "cli", test))]
pub(crate) fn is_same(one: &Path, other: &Path) -> bool {
    let (Ok(found), Ok(other_found)) = (fs::metadata(one), fs::metadata(other)) else { return false };
    let counts = |found: &Metadata| found.is_file() || found.is_dir();
    if !counts(&found) || !counts(&other_found) {
        return false;
    }
    #[cfg(unix)]
    return identity(&found) == identity(&other_found);
    #[cfg(not(unix))]
    return fs::canonicalize(one).is_ok_and(|one| fs::canonicalize(other).is_ok_and(|other| one == other));
}

#[cfg(all(test, unix))]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::{FileTypeExt, symlink};

    use super::*;

    fn write(path: &Path, text: &str) -> Result<()> {
        StagedFile::new(path, |out| out.write_all(text.as_bytes()).map_err(|e| Error::io(path, e)))?.commit()
    }

    #[test]
    fn links_are_followed_and_stay_links() {
        let folder = tempfile::tempdir().unwrap();
        let error = write(&folder.path().join("none/file"), "").unwrap_err().to_string();
        assert!(error.contains("there is no directory") && !error.contains(".qlora-"), "{error}");
        let path = |name: &str| folder.path().join(name);
        fs::create_dir(path("deep")).unwrap();
        symlink("deep/file", path("link")).unwrap();
        symlink("link", path("again")).unwrap();
        for text in ["made", "replaced"] {
            write(&path("again"), text).unwrap();
            assert_eq!(fs::read_to_string(path("deep/file")).unwrap(), text);
            assert!(path("link").is_symlink() && path("again").is_symlink());
        }
        symlink("round", path("round")).unwrap();
        assert!(write(&path("round"), "").is_err());
        assert!(write(&path("deep"), "").unwrap_err().to_string().contains("is a directory"));
        // Nothing else was left behind.
        assert_eq!((fs::read_dir(folder.path()).unwrap().count(), fs::read_dir(path("deep")).unwrap().count()), (4, 1));
        assert!(is_same(&path("again"), &path("deep/file")) && !is_same(&path("link"), &path("round")));
        fs::hard_link(path("deep/file"), path("hard")).unwrap();
        assert!(is_same(&path("hard"), &path("link")));
    }

    #[test]
    fn devices_and_pipes_are_written_to() {
        write("/dev/null".as_ref(), "gone").unwrap();
        assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let reader = std::thread::spawn({
            let pipe = pipe.clone();
            move || {
                let mut text = String::new();
                File::open(pipe).unwrap().read_to_string(&mut text).unwrap();
                text
            }
        });
        write(&pipe, "through").unwrap();
        assert_eq!(reader.join().unwrap(), "through");
        assert!(fs::metadata(&pipe).unwrap().file_type().is_fifo());
        assert!(!is_same("/dev/null".as_ref(), "/dev/null".as_ref()));
    }
}
