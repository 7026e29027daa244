//! A hub on a local port, which can be made to lie.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use percent_encoding::percent_decode_str;
use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A received request.
#[derive(Clone, Debug)]
pub struct Request {
    pub path: String,
    pub token: Option<String>,
    /// First requested byte, if not the whole file was requested.
    pub from: Option<usize>,
}

impl Request {
    pub fn is_api(&self) -> bool {
        self.path.starts_with("/api/")
    }
}

/// An answer, before a lie changes it.
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    /// Whether `Content-Length` is sent.
    pub tells_length: bool,
    /// Bytes of the body to send before the connection ends.
    pub sent: usize,
    /// Delays before the first byte and before the connection ends.
    pub before: Duration,
    pub after: Duration,
}

impl Answer {
    fn new(status: u16, headers: Vec<(&'static str, String)>, body: Vec<u8>) -> Answer {
        let (sent, before, after) = (usize::MAX, Duration::ZERO, Duration::ZERO);
        Answer { status, headers, body, tells_length: true, sent, before, after }
    }

    /// Sets a header.
    pub fn set(&mut self, name: &'static str, value: impl ToString) {
        self.headers.retain(|(other, _)| *other != name);
        self.headers.push((name, value.to_string()));
    }

    pub fn redirect(&mut self, to: impl ToString) {
        (self.status, self.body) = (302, vec![]);
        self.set("Location", to);
    }
}

type Lie = dyn Fn(&Request, &mut Answer) + Send + Sync;

/// A hub whose repositories `org/NAME` are the folders `NAME` of `root`.
pub struct Hub {
    pub endpoint: String,
    address: SocketAddr,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    pub seen: Arc<Mutex<Vec<Request>>>,
}

impl Hub {
    pub fn serve(root: PathBuf) -> Hub {
        Hub::lie(root, |_, _| {})
    }

    /// Starts a hub whose answers are changed.
    pub fn lie(root: PathBuf, lie: impl Fn(&Request, &mut Answer) + Send + Sync + 'static) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (stopped, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (stop, log, lie): (_, _, Arc<Lie>) = (stopped.clone(), seen.clone(), Arc::new(lie));
        let thread = thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let (stream, root, log, lie) = (stream.unwrap(), root.clone(), log.clone(), lie.clone());
                thread::spawn(move || serve(stream, &root, &log, &*lie));
            }
        });
        Hub { endpoint: format!("http://{address}"), address, stopped, thread: Some(thread), seen }
    }

    /// Number of requests for files whose names end like this.
    pub fn asked(&self, end: &str) -> usize {
        self.seen.lock().unwrap().iter().filter(|request| request.path.ends_with(end)).count()
    }

    /// The tokens received.
    pub fn tokens(&self) -> Vec<Option<String>> {
        self.seen.lock().unwrap().iter().map(|request| request.token.clone()).collect()
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        let _ = self.thread.take().unwrap().join();
    }
}

/// Answers one request.
fn serve(mut stream: TcpStream, root: &Path, log: &Mutex<Vec<Request>>, lie: &Lie) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let path = lines.next()?.ok()?.split(' ').nth(1)?.to_owned();
    let mut request = Request { path, token: None, from: None };
    for line in lines {
        let line = line.ok()?;
        let Some((name, value)) = line.split_once(": ") else { break };
        match name.to_lowercase().as_str() {
            "range" => request.from = Some(value.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()?),
            "authorization" => request.token = Some(value.to_owned()),
            _ => {}
        }
    }
    log.lock().unwrap().push(request.clone());
    let mut answer = honest(&request, root);
    lie(&request, &mut answer);
    thread::sleep(answer.before);
    let mut head = format!("HTTP/1.1 {} Status\r\nConnection: close\r\n", answer.status);
    if answer.tells_length {
        head += &format!("Content-Length: {}\r\n", answer.body.len());
    }
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    let sent = answer.sent.min(answer.body.len());
    stream.write_all(&[head.as_bytes(), b"\r\n", &answer.body[..sent]].concat()).ok()?;
    thread::sleep(answer.after);
    Some(())
}

/// The honest answer of a hub.
fn honest(request: &Request, root: &Path) -> Answer {
    let path = percent_decode_str(&request.path).decode_utf8().unwrap();
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    match parts[..] {
        ["api", "models", "org", name, "revision", "main" | COMMIT] if root.join(name).is_dir() => {
            let siblings: Vec<Value> =
                files(&root.join(name), "").iter().map(|file| json!({"rfilename": file})).collect();
            Answer::new(200, vec![], json!({"sha": COMMIT, "siblings": siblings}).to_string().into_bytes())
        }
        ["org", name, "resolve", COMMIT, ref file @ ..] => match fs::read(root.join(name).join(file.join("/"))) {
            Ok(bytes) => {
                let (len, start) = (bytes.len(), request.from.unwrap_or(0).min(bytes.len()));
                let tag = if file[file.len() - 1].ends_with(".json") { git_id(&bytes) } else { sha256(&bytes) };
                let headers = vec![("X-Repo-Commit", COMMIT.into()), ("ETag", format!("\"{tag}\""))];
                let mut answer = Answer::new(200, headers, bytes[start..].to_vec());
                if request.from.is_some() {
                    answer.status = 206;
                    answer.set("Content-Range", format!("bytes {start}-{}/{len}", len - 1));
                }
                answer
            }
            Err(_) => Answer::new(404, vec![("X-Error-Code", "EntryNotFound".into())], vec![]),
        },
        _ => Answer::new(404, vec![("X-Error-Code", "RepoNotFound".into())], vec![]),
    }
}

/// Names of the files in a folder and in its subfolders.
fn files(folder: &Path, prefix: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap().map(Result::unwrap);
    let names = entries.flat_map(|entry| {
        let name = format!("{prefix}{}", entry.file_name().to_str().unwrap());
        if entry.path().is_dir() { files(&entry.path(), &format!("{name}/")) } else { vec![name] }
    });
    names.collect()
}

pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// git's id of a file.
pub fn git_id(bytes: &[u8]) -> String {
    hex(&Sha1::new_with_prefix(format!("blob {}\0", bytes.len())).chain_update(bytes).finalize())
}

pub fn sha1(bytes: &[u8]) -> String {
    hex(&Sha1::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
