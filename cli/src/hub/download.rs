//! Downloads one file of a commit into the cache. Files there are complete and match the hub's
//! description.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use indicatif::{HumanBytes, ProgressBar};
use qlora_wgpu::error::Error;
use qlora_wgpu::internal::MAX_SMALL;
use ureq::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG};
use ureq::http::{HeaderMap, StatusCode};

use super::cache::{Digest, Folder, is_inside, sha256, sha256_of};
use super::client::{Answer, Client, Fault, TRIES};
use crate::output;

/// Bytes per read.
const CHUNK: usize = 1 << 18;

/// Progress in bytes that resets the count of tries, because a long download may break off often.
const PROGRESS: u64 = 1 << 20;

/// Minimum bytes per second; a slower download is broken off.
const MIN_RATE: f64 = 1024.0;

/// Downloads files of one commit of a repository into the cache.
pub(super) struct Download<'a> {
    client: &'a Client,
    folder: &'a Folder,
    repo: &'a str,
    commit: &'a str,
    /// Whether the warning about missing digests was given.
    has_warned: Cell<bool>,
}

/// A file as the hub describes it.
struct Remote {
    url: String,
    name: String,
    /// `None` if a mirror's ETag isn't a digest.
    digest: Option<Digest>,
    size: Option<u64>,
}

impl<'a> Download<'a> {
    pub(super) fn new(client: &'a Client, folder: &'a Folder, repo: &'a str, commit: &'a str) -> Download<'a> {
        Download { client, folder, repo, commit, has_warned: Cell::new(false) }
    }

    /// Returns the path of the file `name`; fetches it if the cache lacks it.
    ///
    /// # Errors
    /// A sentence.
    pub(super) fn file(&self, name: &str) -> Result<PathBuf, String> {
        if !is_inside(name) {
            return Err(format!("{name:?} isn't a valid name for a file in a model"));
        }
        let path = self.folder.snapshot(self.commit).join(name);
        if path.exists() {
            return Ok(path);
        }
        let mut tries = Tries { client: self.client, count: 0, most: 0 };
        let (remote, answer) = loop {
            match self.describe(name) {
                Ok(described) => break described,
                Err(fault) => tries.again(fault, 0)?,
            }
        };
        // Without a digest, use a name that no other file has.
        let key = match &remote.digest {
            Some(digest) => digest.hex().to_owned(),
            None => sha256_of(&format!("{}/{name}", self.commit)),
        };
        let wait = || output::progress(format!("waiting for another process that downloads {name}"));
        let _lock = self.folder.lock(&key, wait).map_err(|e| e.to_string())?;
        // It may exist from another commit, or from the process that held the lock.
        let blob = self.folder.blob(&key).metadata();
        let blob = match blob.is_ok_and(|blob| remote.size.is_none_or(|size| size == blob.len())) {
            true => key,
            false => self.fetch(&remote, answer, &key, tries)?,
        };
        self.folder.link(&blob, self.commit, name).map_err(|e| e.to_string())
    }

    /// Requests the file. Returns its description, and the answer with its bytes.
    fn describe(&self, name: &str) -> Result<(Remote, Answer), Fault> {
        let url = self.client.file_url(self.repo, self.commit, name);
        let answer = self.client.get(&url, 0, None)?;
        if !answer.status.is_success() {
            return Err(self.client.refusal(self.repo, &answer));
        }
        let mut remote = Remote { url, name: name.into(), digest: None, size: None };
        for head in &answer.hub {
            if let Some(commit) = text(head, "x-repo-commit")?.filter(|commit| *commit != self.commit) {
                return Err(Fault::Final(format!("the hub answers with commit {commit:?} instead of {}", self.commit)));
            }
            // A large file is stored elsewhere; the redirect describes it.
            for tag in ["x-linked-etag", ETAG.as_str()] {
                if let Some(tag) = text(head, tag)?.filter(|_| remote.digest.is_none()) {
                    remote.digest = digest(tag)?;
                }
            }
            if let Some(size) = text(head, "x-linked-size")?.filter(|_| remote.size.is_none()) {
                let size = size.parse().map_err(|_| Fault::Final(format!("the hub gives its size as {size:?}")))?;
                remote.size = Some(size);
            }
        }
        let (_, total) = remote.extent(&answer, 0)?;
        remote.size = remote.size.or(total);
        if remote.digest.is_none() && remote.size.is_none() {
            return Err(Fault::Final("the hub gives neither its digest nor its size".into()));
        }
        Ok((remote, answer))
    }

    /// Fetches a file as the blob `key`, from `answer` and further requests if needed. Returns the
    /// blob's name, which differs from `key` if there is no digest.
    fn fetch(&self, remote: &Remote, answer: Answer, key: &str, mut tries: Tries<'_>) -> Result<String, String> {
        let (path, mut file) = self.folder.incomplete(key).map_err(|e| e.to_string())?;
        let failed = |e: io::Error| Error::io(&path, e).to_string();
        if remote.digest.is_none() && !self.has_warned.replace(true) {
            let name = &remote.name;
            output::warning(format!("{}: the hub gives no digest for {name}, so only its size is checked", self.repo));
        }
        let bar = bar(remote);
        let mut answer = Some(answer);
        loop {
            let result = self.go_on(remote, answer.take(), &path, &mut file, &bar);
            let len = file.metadata().map_err(failed)?.len();
            let Err(fault) = result else { break };
            if let Err(message) = tries.again(fault, len) {
                if len == 0 {
                    let _ = fs::remove_file(&path);
                }
                return Err(message);
            }
        }
        bar.finish_and_clear();
        file.sync_all().map_err(failed)?;
        drop(file);
        let blob = if remote.digest.is_some() { key.to_owned() } else { sha256(&path).map_err(failed)? };
        fs::rename(&path, self.folder.blob(&blob)).map_err(failed)?;
        Ok(blob)
    }

    /// Adds what the file at `path` lacks, and checks the whole. After an error, a later try may
    /// continue from the partial file.
    fn go_on(
        &self,
        remote: &Remote,
        answer: Option<Answer>,
        path: &Path,
        file: &mut File,
        bar: &ProgressBar,
    ) -> Result<(), Fault> {
        let failed = |e: io::Error| Fault::Final(Error::io(path, e).to_string());
        let mut start = file.metadata().map_err(failed)?.len();
        // Only a digest can tell whether two parts belong together.
        if remote.digest.is_none() || remote.size.is_some_and(|size| start > size) {
            start = 0;
            file.set_len(0).map_err(failed)?;
        }
        if remote.size != Some(start) || start == 0 {
            let answer = match answer.filter(|_| start == 0) {
                Some(answer) => answer,
                None => self.client.get(&remote.url, start, None)?,
            };
            if answer.status == StatusCode::RANGE_NOT_SATISFIABLE {
                file.set_len(0).map_err(failed)?;
                return Err(Fault::Passing(format!("the server has nothing from byte {start} on")));
            }
            if !answer.status.is_success() {
                return Err(self.client.refusal(self.repo, &answer));
            }
            let (from, _) = remote.extent(&answer, start).inspect_err(|_| drop(file.set_len(0)))?;
            file.set_len(from).and_then(|()| file.seek(SeekFrom::Start(from))).map_err(failed)?;
            self.receive(remote, answer, from, file, path, bar)?;
        }
        let Some(digest) = &remote.digest else { return Ok(()) };
        let Err(wrong) = digest.check(path).map_err(failed)? else { return Ok(()) };
        file.set_len(0).map_err(failed)?;
        let message = format!("it is not the file that the hub describes: {wrong}");
        // An old partial file may have been the wrong part.
        Err(if start > 0 { Fault::Passing(message) } else { Fault::Final(message) })
    }

    /// Writes the answer's bytes to the file, from byte `at` on.
    fn receive(
        &self,
        remote: &Remote,
        answer: Answer,
        mut at: u64,
        file: &mut File,
        path: &Path,
        bar: &ProgressBar,
    ) -> Result<(), Fault> {
        let most = remote.size.unwrap_or(MAX_SMALL);
        let of = remote.size.map_or(String::new(), |size| format!(" of {size}"));
        let mut body = answer.body.into_reader();
        let mut chunk = vec![0; CHUNK];
        let (mut since, mut before) = (Instant::now(), at);
        loop {
            bar.set_position(at);
            let broken = |e: io::Error| {
                Fault::Passing(format!("it broke off after {at}{of} bytes: {}", self.client.cause(e.into())))
            };
            let got = body.read(&mut chunk).map_err(broken)?;
            if got == 0 {
                break;
            }
            if at + got as u64 > most {
                let _ = file.set_len(0);
                return Err(Fault::Final(format!("the hub sends more than {most} bytes, the size of the file")));
            }
            file.write_all(&chunk[..got]).map_err(|e| Fault::Final(Error::io(path, e).to_string()))?;
            at += got as u64;
            let time = since.elapsed();
            if time >= self.client.stall() {
                if ((at - before) as f64) < MIN_RATE * time.as_secs_f64() {
                    return Err(Fault::Passing(format!("only {} bytes came in {time:.1?}", at - before)));
                }
                (since, before) = (Instant::now(), at);
            }
        }
        if remote.size.is_some_and(|size| at < size) {
            return Err(Fault::Passing(format!("it broke off after {at}{of} bytes")));
        }
        Ok(())
    }
}

impl Remote {
    /// Where in the file an answer to a request from byte `start` on begins, and the file's size
    /// if the answer has it.
    fn extent(&self, answer: &Answer, start: u64) -> Result<(u64, Option<u64>), Fault> {
        let headers = &answer.headers;
        if let Some(encoding) = text(headers, CONTENT_ENCODING.as_str())?.filter(|&encoding| encoding != "identity") {
            return Err(Fault::Final(format!("the hub sends it as {encoding}, which was not asked for")));
        }
        let (from, total) = if answer.status == StatusCode::PARTIAL_CONTENT {
            let range = text(headers, CONTENT_RANGE.as_str())?.unwrap_or_default();
            let extent = content_range(range).filter(|&(from, _)| from == start);
            extent.ok_or_else(|| {
                Fault::Final(format!(
                    "the hub answers a request for the bytes from {start} on with Content-Range {range:?}"
                ))
            })?
        } else {
            (0, text(headers, CONTENT_LENGTH.as_str())?.and_then(|length| length.parse().ok()))
        };
        match (self.size, total) {
            (Some(size), Some(total)) if size != total => {
                Err(Fault::Final(format!("the hub gives it two sizes, {size} and {total} bytes")))
            }
            _ => Ok((from, total)),
        }
    }
}

/// Counts tries for one file.
struct Tries<'a> {
    client: &'a Client,
    count: u32,
    /// Maximum length of the partial file so far.
    most: u64,
}

impl Tries<'_> {
    /// Waits, if another try makes sense after this fault, with `len` bytes received.
    ///
    /// # Errors
    /// Why another try doesn't make sense.
    fn again(&mut self, fault: Fault, len: u64) -> Result<(), String> {
        let message = match fault {
            Fault::Final(message) => return Err(message),
            Fault::Passing(message) | Fault::Away(message) => message,
        };
        if len >= self.most + PROGRESS {
            self.count = 0;
        }
        self.most = self.most.max(len);
        self.count += 1;
        if self.count == TRIES {
            return Err(format!("{message}; run the command again to continue"));
        }
        self.client.pause(self.count);
        Ok(())
    }
}

/// Parses the digest in an ETag. An ETag that isn't a digest must at least be a valid name, as
/// Hugging Face's tools name files by it.
fn digest(tag: &str) -> Result<Option<Digest>, Fault> {
    let name = tag.strip_prefix("W/").unwrap_or(tag).trim_matches('"');
    let is_name = !name.starts_with('.') && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:+=".contains(&b));
    match Digest::parse(name) {
        None if !is_name => {
            Err(Fault::Final(format!("the hub identifies it by the ETag {name:?}, which isn't a digest")))
        }
        digest => Ok(digest),
    }
}

/// A header's text, if the header exists.
fn text<'h>(headers: &'h HeaderMap, name: &str) -> Result<Option<&'h str>, Fault> {
    let odd = |_| Fault::Final(format!("the hub answers with a header {name} that isn't text"));
    headers.get(name).map(|value| value.to_str().map_err(odd)).transpose()
}

/// Parses `bytes 0-9/10`: the first byte, and the file's size if known.
fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    let total = if total == "*" { None } else { Some(total.parse().ok()?) };
    (first <= last && total.is_none_or(|total| last < total)).then_some((first, total))
}

/// Shows a bar, or prints a line if bars are hidden.
fn bar(remote: &Remote) -> ProgressBar {
    let size = remote.size.unwrap_or(0);
    let bar = output::bar(size as usize, "{wide_msg} {bar:8} {percent}% of {total_bytes}, {eta}");
    if bar.is_hidden() {
        output::progress(format!("{} ({})", remote.name, HumanBytes(size)));
    }
    bar.with_message(remote.name.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_content_range_makes_sense_or_is_none() {
        assert_eq!(content_range("bytes 0-9/10"), Some((0, Some(10))));
        assert_eq!(content_range("bytes 5-9/*"), Some((5, None)));
        for none in
            ["", "bytes", "bytes 5-4/10", "bytes 0-10/10", "bytes */10", "bytes -1-2/3", "lines 0-9/10", "bytes 0-9"]
        {
            assert_eq!(content_range(none), None, "{none}");
        }
    }
}
