//! Temporary files next to their final names, and folders whose entries survive a power failure.
//!
//! A temporary file is locked while its command lives. If nobody holds the lock, the command was
//! killed, and the next command that writes to the folder removes the file.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::path::Path;

use tempfile::NamedTempFile;

/// Prefix of the names of temporary files and folders.
pub(crate) const PREFIX: &str = ".qlora-";
const SUFFIX: &str = ".tmp";

/// Creates a temporary file with the permissions of an ordinary new file, not only the owner's.
pub(crate) fn file_in(folder: &Path) -> io::Result<NamedTempFile> {
    remove_abandoned(folder);
    let mut builder = tempfile::Builder::new();
    builder.prefix(PREFIX).suffix(SUFFIX);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    loop {
        let file = builder.tempfile_in(folder)?;
        match file.as_file().try_lock() {
            // Another command may have considered it abandoned before it was locked.
            Ok(()) if !file.path().exists() => {}
            Err(TryLockError::WouldBlock) => {}
            // If the file system has no locks, nobody considers it abandoned.
            Ok(()) | Err(TryLockError::Error(_)) => return Ok(file),
        }
    }
}

/// Removes the temporary files of killed commands from a folder, as far as possible.
pub(crate) fn remove_abandoned(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let is_ours = name.to_str().is_some_and(|name| name.starts_with(PREFIX) && name.ends_with(SUFFIX));
        if is_ours
            && entry.file_type().is_ok_and(|kind| kind.is_file())
            && let Ok(file) = OpenOptions::new().write(true).open(entry.path())
            && file.try_lock().is_ok()
        {
            // Another command may have been faster.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Makes the entries of a folder survive a power failure. Only Unix supports this and needs it.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    use io::ErrorKind::{InvalidInput, PermissionDenied, Unsupported};
    let synced = if cfg!(unix) { File::open(folder).and_then(|folder| folder.sync_all()) } else { Ok(()) };
    match synced {
        // Some file systems can't do it, and a folder may be writable but not readable.
        Err(error) if [InvalidInput, PermissionDenied, Unsupported].contains(&error.kind()) => Ok(()),
        synced => synced,
    }
}

/// Like [`sync_folder`], for the folder that a path is in.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    sync_folder(path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new(".")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_command_left_is_removed_and_what_a_live_one_writes_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in [".qlora-old.tmp", ".qlora-other", "mine.tmp"] {
            fs::write(path(name), "x").unwrap();
        }
        fs::create_dir(path(".qlora-folder.tmp")).unwrap();
        let live = file_in(folder.path()).unwrap();
        let _other = file_in(folder.path()).unwrap();
        assert!(live.path().exists() && !path(".qlora-old.tmp").exists());
        assert!(path(".qlora-other").exists() && path("mine.tmp").exists() && path(".qlora-folder.tmp").exists());
        // A killed process drops its locks and leaves the file.
        let (file, left) = live.keep().unwrap();
        drop(file);
        remove_abandoned(folder.path());
        assert!(!left.exists());
    }
}
