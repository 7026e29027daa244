//! The cache, in the layout of Hugging Face's tools, so that each program finds the other's files:
//!
//! ```text
//! models--org--name/blobs/DIGEST              a file; DIGEST.incomplete while it downloads
//! models--org--name/snapshots/COMMIT/NAME     links to blobs
//! models--org--name/refs/REVISION             the last known commit of a branch or tag
//! .locks/models--org--name/DIGEST.lock        locked by the process that fetches it
//! ```

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::internal::read_small_text;
use sha1::Sha1;
use sha2::{Digest as Hash, Sha256};

/// One repository's part of the cache.
pub(super) struct Folder {
    cache: PathBuf,
    name: String,
}

/// Digest that identifies a file's contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Digest {
    /// SHA-256, for large files.
    Sha256(String),
    /// Git's file id: SHA-1 of a header with the file's size, followed by its bytes. Some mirrors
    /// send the SHA-1 of the bytes alone.
    Sha1(String),
}

impl Folder {
    pub(super) fn new(cache: &Path, repo: &str) -> Folder {
        Folder { cache: cache.into(), name: format!("models--{}", repo.replace('/', "--")) }
    }

    /// The whole cache, including other repositories.
    pub(super) fn cache(&self) -> &Path {
        &self.cache
    }

    /// Folder with the files of a commit.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root().join("snapshots").join(commit)
    }

    /// Path of the file with this digest.
    pub(super) fn blob(&self, digest: &str) -> PathBuf {
        self.root().join("blobs").join(digest)
    }

    /// Opens the partial file of a download for reading and writing, or creates it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn incomplete(&self, digest: &str) -> Result<(PathBuf, File)> {
        let path = self.blob(&format!("{digest}.incomplete"));
        make_parent(&path)?;
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        Ok((path.clone(), file.map_err(|e| Error::io(&path, e))?))
    }

    /// Locks a digest until the returned file is dropped. Calls `wait` first if another process
    /// holds the lock. On a filesystem without locks, it doesn't lock.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn lock(&self, digest: &str, wait: impl FnOnce()) -> Result<File> {
        let path = self.cache.join(".locks").join(&self.name).join(format!("{digest}.lock"));
        make_parent(&path)?;
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(|e| Error::io(&path, e))?;
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            wait();
            file.lock().map_err(|e| Error::io(&path, e))?;
        }
        Ok(file)
    }

    /// Makes a blob the file `name` of a commit: by a link if the filesystem has links, otherwise
    /// by a copy.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn link(&self, digest: &str, commit: &str, name: &str) -> Result<PathBuf> {
        let (blob, path) = (self.blob(digest), self.snapshot(commit).join(name));
        make_parent(&path)?;
        // From the file's folder up to the repository's, then down to the blob.
        let up: PathBuf = std::iter::repeat_n("..", name.split('/').count() + 1).collect();
        let target = up.join("blobs").join(digest);
        // Made under another name first. Renaming replaces what is there, such as a dangling link,
        // and a copy appears complete.
        let new = self.blob(&format!("{digest}.link"));
        let _ = fs::remove_file(&new);
        symlink(&target, &new)
            .or_else(|_| fs::hard_link(&blob, &new))
            .or_else(|_| fs::copy(&blob, &new).map(drop))
            .and_then(|()| fs::rename(&new, &path))
            .map_err(|e| Error::io(&path, e))?;
        Ok(path)
    }

    /// The commit that a revision stood for when it was last fetched. A commit stands for itself.
    ///
    /// # Errors
    /// [`Error::File`] if the cache's entry isn't a commit.
    pub(super) fn commit(&self, revision: &str) -> Result<String> {
        let path = self.root().join("refs").join(revision);
        if !path.exists() {
            return Ok(revision.to_owned());
        }
        let text = read_small_text(&path, 1024)?.trim().to_owned();
        if is_commit(&text) {
            Ok(text)
        } else {
            Err(Error::File { path, message: "doesn't contain a commit id".into() })
        }
    }

    /// Records the commit that a revision stands for.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn set_commit(&self, revision: &str, commit: &str) -> Result<()> {
        let path = self.root().join("refs").join(revision);
        if revision == commit || fs::read_to_string(&path).is_ok_and(|text| text == commit) {
            return Ok(());
        }
        make_parent(&path)?;
        let new = self.root().join("refs").join(format!("{commit}.{}", std::process::id()));
        fs::write(&new, commit).and_then(|()| fs::rename(&new, &path)).map_err(|e| Error::io(&path, e))
    }

    fn root(&self) -> PathBuf {
        self.cache.join(&self.name)
    }
}

impl Digest {
    /// Parses the digest in an ETag, quoted or not.
    pub(super) fn parse(text: &str) -> Option<Digest> {
        let text = text.strip_prefix("W/").unwrap_or(text).trim_matches('"').to_ascii_lowercase();
        let is_hex = text.bytes().all(|byte| byte.is_ascii_hexdigit());
        match text.len() {
            64 if is_hex => Some(Digest::Sha256(text)),
            40 if is_hex => Some(Digest::Sha1(text)),
            _ => None,
        }
    }

    pub(super) fn hex(&self) -> &str {
        match self {
            Digest::Sha256(hex) | Digest::Sha1(hex) => hex,
        }
    }

    /// Compares the file's digest. The inner error describes a mismatch.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub(super) fn check(&self, path: &Path) -> io::Result<std::result::Result<(), String>> {
        let (kind, hex, got) = match self {
            Digest::Sha256(hex) => ("SHA-256", hex, vec![sha256(path)?]),
            Digest::Sha1(hex) => {
                let header = format!("blob {}\0", path.metadata()?.len());
                ("git id", hex, vec![hashed::<Sha1>(header.as_bytes(), path)?, hashed::<Sha1>(b"", path)?])
            }
        };
        Ok(if got.contains(hex) { Ok(()) } else { Err(format!("its {kind} is {} instead of {hex}", got[0])) })
    }
}

/// SHA-256 of a file, in hexadecimal.
pub(super) fn sha256(path: &Path) -> io::Result<String> {
    hashed::<Sha256>(b"", path)
}

/// SHA-256 of a text, in hexadecimal.
pub(super) fn sha256_of(text: &str) -> String {
    hex(&Sha256::digest(text))
}

/// Whether a text is 40 hexadecimal digits.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether a name is a relative path with slashes that stays in its folder on every system. On
/// Windows, a colon follows a drive or a file name.
pub(super) fn is_inside(name: &str) -> bool {
    let is_plain = |c: char| !c.is_control() && !matches!(c, '\\' | ':');
    name.chars().all(is_plain) && name.split('/').all(|part| !["", ".", ".."].contains(&part))
}

fn hashed<H: Hash>(header: &[u8], path: &Path) -> io::Result<String> {
    let (mut hash, mut file, mut chunk) = (H::new_with_prefix(header), File::open(path)?, vec![0; 1 << 18]);
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(hex(&hash.finalize())),
            len => hash.update(&chunk[..len]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn make_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), |folder| fs::create_dir_all(folder).map_err(|e| Error::io(folder, e)))
}

#[cfg(unix)]
fn symlink(target: &Path, path: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, path)
}

#[cfg(windows)]
fn symlink(target: &Path, path: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target, path)
}

#[cfg(not(any(unix, windows)))]
fn symlink(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_in_their_folder() {
        for name in ["a", "a b.gguf", "a/b", "..a", "a..b/c", "ä"] {
            assert!(is_inside(name), "{name}");
        }
        for name in
            ["", "/a", "a/", "a//b", ".", "..", "a/../b", "a/.", "..\\a", "a\\b", "C:a", "a:b", "a\0", "a\n", "\u{9b}"]
        {
            assert!(!is_inside(name), "{name:?}");
        }
    }

    #[test]
    fn digests_are_those_of_git_and_of_large_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(&path, "hello\n").unwrap();
        // Printed by `git hash-object`, `sha1sum` and `sha256sum`.
        for right in [
            "ce013625030ba8dba906f756967f9e9ca394464a",
            "W/\"CE013625030BA8DBA906F756967F9E9CA394464A\"",
            "f572d396fae9206628714fb2ce00f72e94f2258f",
            "\"5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03\"",
        ] {
            assert_eq!(Digest::parse(right).unwrap().check(&path).unwrap(), Ok(()), "{right}");
        }
        let wrong = Digest::parse(&"0".repeat(40)).unwrap().check(&path).unwrap().unwrap_err();
        assert!(wrong.contains("git id is ce013625030ba8dba906f756967f9e9ca394464a"), "{wrong}");
        for none in ["", "\"\"", &"0".repeat(39), &"g".repeat(40), &"0".repeat(63), &"0".repeat(65)] {
            assert_eq!(Digest::parse(none), None, "{none}");
        }
    }
}
