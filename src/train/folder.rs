//! The folder of a run, locked by one process.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::checkpoint;
use super::metrics;
use crate::error::{Error, Result};
use crate::formats::temporary;

/// File that is locked while a run lives. It names the process and is removed at the end.
const LOCK: &str = "run.lock";

/// Subfolder for the adapter with the best evaluation.
pub(super) const BEST: &str = "best";

/// The folder of a run. No other process, and no other run of this process, can hold it at the
/// same time.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    /// Folders that had to be created, deepest first.
    made: Vec<PathBuf>,
    lock: Option<File>,
}

impl RunFolder {
    /// Creates the folder at `path` if needed, locks it, and removes what a killed process left
    /// half-written. If nothing is written to a created folder, it is removed when this value is
    /// dropped.
    ///
    /// # Errors
    /// [`Error::File`] if another run holds it (names its process), or if `path` isn't a folder;
    /// [`Error::Io`].
    pub fn claim(path: impl AsRef<Path>) -> Result<RunFolder> {
        let path = path.as_ref();
        let io_error = |e: io::Error| Error::io(path, e);
        if path.exists() && !path.is_dir() {
            return Err(Error::File { path: path.into(), message: "is not a directory".into() });
        }
        let missing = |folder: &&Path| !folder.as_os_str().is_empty() && !folder.exists();
        let made: Vec<PathBuf> = path.ancestors().take_while(missing).map(Path::to_owned).collect();
        fs::create_dir_all(path).map_err(io_error)?;
        let mut folder = RunFolder { path: path.into(), made, lock: None };
        folder.made.iter().try_for_each(|made| temporary::sync_parent(made)).map_err(io_error)?;
        folder.lock()?;
        checkpoint::remove_leftovers(path)?;
        temporary::remove_abandoned(&path.join(BEST));
        Ok(folder)
    }

    /// Path of the folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Checks that a run can start here. A checkpoint or an adapter is never overwritten; what a
    /// run left that ended before its first checkpoint may be.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn check_unused(&self) -> Result<()> {
        let adapter = ["adapter_model.safetensors", "adapter_config.json"];
        let message = if self.has_checkpoint()? {
            "holds another run; resume it, choose another folder, or remove this one"
        } else if adapter.iter().any(|name| self.path.join(name).exists()) {
            "holds an adapter, but no checkpoint of a run; choose another folder, or remove this one"
        } else {
            return self.check_left();
        };
        Err(Error::File { path: self.path.clone(), message: message.into() })
    }

    /// Checks that files with the names of a run's files come from a run.
    fn check_left(&self) -> Result<()> {
        let has = |name: &&str| self.path.join(name).exists();
        let foreign = if has(&metrics::FILE) {
            metrics::read(&self.path.join(metrics::FILE)).is_err().then_some(metrics::FILE)
        } else {
            [BEST, "loss.svg", "loss.png"].into_iter().find(has)
        };
        let message =
            |name| format!("holds {name}, which isn't from a run and would be replaced; choose another folder");
        foreign.map_or(Ok(()), |name| Err(Error::File { path: self.path.clone(), message: message(name) }))
    }

    /// Whether a run has saved a checkpoint here, damaged or not.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn has_checkpoint(&self) -> Result<bool> {
        Ok(!checkpoint::list(&self.path)?.is_empty())
    }

    /// Removes the metrics of a run that ended before its first checkpoint. Its best adapter stays
    /// until a better one replaces it, because this run may start from it.
    pub(super) fn clear(&self) -> Result<()> {
        let path = self.path.join(metrics::FILE);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io(&path, error)),
            _ => Ok(()),
        }
    }

    fn lock(&mut self) -> Result<()> {
        let path = self.path.join(LOCK);
        let io_error = |e: io::Error| Error::io(&path, e);
        loop {
            let mut options = OpenOptions::new();
            let mut file = options.read(true).write(true).create(true).truncate(false).open(&path).map_err(io_error)?;
            match file.try_lock() {
                Ok(()) if !is_at(&file, &path) => continue, // its last holder just removed it
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let holder = fs::read_to_string(&path).unwrap_or_default();
                    let holder = Some(holder.trim()).filter(|holder| !holder.is_empty()).unwrap_or("another process");
                    let message = format!(
                        "is in use by a running process: {holder}; wait until it ends, or choose another folder"
                    );
                    return Err(Error::File { path: self.path.clone(), message });
                }
                Err(TryLockError::Error(error)) => {
                    let folder = self.path.display();
                    tracing::warn!("{folder}: can't be locked ({error}); make sure that no second run uses it");
                }
            }
            let host = sysinfo::System::host_name().map_or(String::new(), |host| format!(" on {host}"));
            let holder = format!("process {}{host}\n", std::process::id());
            file.set_len(0).and_then(|()| file.write_all(holder.as_bytes())).map_err(io_error)?;
            self.lock = Some(file);
            return Ok(());
        }
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        if self.lock.is_some() {
            // Remove it while locked: a process that opened it meanwhile notices that its name is
            // gone.
            let _ = fs::remove_file(self.path.join(LOCK));
            self.lock = None;
        }
        // Fails if something is in it.
        let _ = self.made.iter().try_for_each(fs::remove_dir);
    }
}

/// Whether an open file is still the one with this name.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let identity = |found: io::Result<fs::Metadata>| found.ok().map(|found| (found.dev(), found.ino()));
    identity(file.metadata()).is_some_and(|file| identity(fs::metadata(path)) == Some(file))
}

/// On other systems an open file can't lose its name.
#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_has_a_folder_and_leaves_no_trace_of_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/run");
        let claimed = RunFolder::claim(&path).unwrap();
        claimed.check_unused().unwrap();
        let message = RunFolder::claim(&path).unwrap_err().to_string();
        assert!(message.contains(&format!("process {}", std::process::id())), "{message}");
        drop(claimed);
        assert!(!folder.path().join("deep").exists());

        // A lock file left by a killed process doesn't count.
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join(LOCK), "process 1").unwrap();
        fs::create_dir(path.join(".qlora-half")).unwrap();
        drop(RunFolder::claim(&path).unwrap());
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);

        // Files that aren't a run's are not replaced.
        for name in [BEST, "loss.svg", metrics::FILE] {
            let theirs = path.join(name);
            if name == BEST { fs::create_dir_all(&theirs) } else { fs::write(&theirs, "mine\n") }.unwrap();
            let claimed = RunFolder::claim(&path).unwrap();
            assert!(claimed.check_unused().unwrap_err().to_string().contains(name));
            if name == BEST { fs::remove_dir(&theirs) } else { fs::remove_file(&theirs) }.unwrap();
        }

        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(RunFolder::claim(&file).unwrap_err().to_string().contains("not a directory"));
    }

    #[test]
    fn threads_that_claim_and_release_never_share_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let inside = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        if let Ok(_claimed) = RunFolder::claim(folder.path()) {
                            use std::sync::atomic::Ordering::SeqCst;
                            assert_eq!(inside.fetch_add(1, SeqCst), 0);
                            inside.fetch_sub(1, SeqCst);
                        }
                    }
                });
            }
        });
    }
}
