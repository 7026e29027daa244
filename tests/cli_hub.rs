//! `--model org/name`: models from a hub, which here is a thread that serves one on a local port.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use assert_cmd::Command;
use common::model::path;
use serde_json::{Value, json};
use tempfile::TempDir;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A path, and the token that came with it.
type Request = (String, Option<String>);

/// A hub with repositories `org/NAME` that are the folders `NAME` of `root`.
struct Hub {
    endpoint: String,
    address: std::net::SocketAddr,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    seen: Arc<Mutex<Vec<Request>>>,
    /// Cuts the next weights off half-way.
    cut: Arc<AtomicBool>,
}

impl Hub {
    fn serve(root: PathBuf) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (stopped, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let cut = Arc::new(AtomicBool::new(false));
        let (stop, log, cutting) = (stopped.clone(), seen.clone(), cut.clone());
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                if let Some(request) = answer(stream.unwrap(), &root, &cutting) {
                    log.lock().unwrap().push(request);
                }
            }
        });
        Hub { endpoint: format!("http://{address}"), address, stopped, thread: Some(thread), seen, cut }
    }

    /// How often files were asked for that end so.
    fn asked(&self, end: &str) -> usize {
        self.seen.lock().unwrap().iter().filter(|(path, _)| path.ends_with(end)).count()
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        let _ = self.thread.take().unwrap().join();
    }
}

/// Answers one request as the hub does; returns its path and token.
fn answer(mut stream: TcpStream, root: &Path, cut: &AtomicBool) -> Option<Request> {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let path = lines.next()?.ok()?.split(' ').nth(1)?.to_owned();
    let (mut start, mut end, mut token) = (0, usize::MAX, None);
    for line in lines {
        let line = line.ok()?;
        let Some((name, value)) = line.split_once(": ") else { break };
        match name.to_lowercase().as_str() {
            "range" => {
                let (from, to) = value.strip_prefix("bytes=")?.split_once('-')?;
                (start, end) = (from.parse().ok()?, to.parse().map_or(usize::MAX, |to: usize| to + 1));
            }
            "authorization" => token = Some(value.to_owned()),
            _ => {}
        }
    }
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    let found = match parts[..] {
        ["api", "models", "org", name, "revision", "main" | COMMIT] if root.join(name).is_dir() => {
            let files =
                fs::read_dir(root.join(name)).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let siblings: Vec<Value> = files.map(|file| json!({ "rfilename": file })).collect();
            Some((json!({"sha": COMMIT, "siblings": siblings}).to_string().into_bytes(), String::new()))
        }
        ["org", name, "resolve", COMMIT, file] => fs::read(root.join(name).join(file)).ok().map(|bytes| {
            let (len, end) = (bytes.len(), end.min(bytes.len()));
            let headers = format!("Content-Range: bytes {start}-{}/{len}\r\nX-Repo-Commit: {COMMIT}\r\n", end - 1);
            (bytes[start..end].to_vec(), format!("{headers}ETag: \"{name}-{file}\"\r\n"))
        }),
        _ => None,
    };
    let status = match &found {
        None => "404 Not Found",
        Some((_, headers)) if headers.is_empty() => "200 OK",
        Some(_) => "206 Partial Content",
    };
    let (body, headers) = found.unwrap_or_default();
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n", body.len());
    let is_weights = path.ends_with(".safetensors") && body.len() > 1;
    let sent = if is_weights && cut.swap(false, Ordering::SeqCst) { body.len() / 2 } else { body.len() };
    let _ = stream.write_all(&[head.as_bytes(), &body[..sent]].concat());
    Some((path, token))
}

/// Data of token ids, a cache, and what the hub serves.
struct Setup {
    folder: TempDir,
}

impl Setup {
    fn new() -> Setup {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("data.jsonl"), json!({"input_ids": [1, 2, 3, 4, 5]}).to_string()).unwrap();
        let setup = Setup { folder };
        setup.add("llama", &["config.json", "generation_config.json", "model.safetensors"]);
        fs::write(setup.root().join("llama/README.md"), "Not needed.").unwrap();
        setup
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("hub")
    }

    /// Serves these files of the recorded Llama model as org/NAME.
    fn add(&self, name: &str, files: &[&str]) {
        let folder = self.root().join(name);
        fs::create_dir_all(&folder).unwrap();
        for file in files {
            fs::copy(path("llama").join(file), folder.join(file)).unwrap();
        }
    }

    fn eval(&self, endpoint: &str, model: &str) -> Command {
        let mut qlora = Command::cargo_bin("qlora").unwrap();
        for name in ["HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "QLORA_DEVICE", "QLORA_TIER"] {
            qlora.env_remove(name);
        }
        for name in ["http_proxy", "https_proxy", "all_proxy"] {
            qlora.env_remove(name).env_remove(name.to_uppercase());
        }
        qlora.env("HF_ENDPOINT", endpoint).env("HF_HOME", self.folder.path().join("cache"));
        qlora.args(["eval", "--device", "cpu", "--json", "--model", model]).current_dir(self.folder.path());
        qlora.args(["--data", "data.jsonl"]);
        qlora
    }
}

fn stdout(command: &mut Command) -> String {
    String::from_utf8(command.assert().success().get_output().stdout.clone()).unwrap()
}

fn failure(command: &mut Command) -> String {
    let error = String::from_utf8(command.assert().code(1).get_output().stderr.clone()).unwrap();
    assert_eq!(error.lines().count(), 1, "{error}");
    error
}

/// An endpoint where nobody listens.
fn nowhere() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[test]
fn a_model_is_fetched_once_and_then_found_in_the_cache() {
    let setup = Setup::new();
    let local = stdout(&mut setup.eval("", path("llama").to_str().unwrap()));
    let hub = Hub::serve(setup.root());
    let fetched = stdout(setup.eval(&hub.endpoint, "org/llama").env("HF_TOKEN", "hf_secret"));
    assert_eq!(fetched, local);
    assert!(hub.seen.lock().unwrap().iter().all(|(_, token)| token.as_deref() == Some("Bearer hf_secret")));
    assert_eq!((hub.asked("/README.md"), hub.asked("/generation_config.json") > 0), (0, true));
    let asked = hub.asked("/model.safetensors");
    assert!(asked > 0);

    let again = setup.eval(&hub.endpoint, "org/llama@main").assert().success().get_output().clone();
    assert_eq!((again.stdout, again.stderr), (local.clone().into_bytes(), vec![]));
    let pinned = stdout(&mut setup.eval(&hub.endpoint, &format!("org/llama@{COMMIT}")));
    assert_eq!((pinned, hub.asked("/model.safetensors")), (local.clone(), asked));

    let endpoint = hub.endpoint.clone();
    drop(hub);
    let mut without = setup.eval(&endpoint, "org/llama");
    let without = without.assert().success().get_output().clone();
    let note = String::from_utf8(without.stderr).unwrap();
    assert_eq!(without.stdout, local.as_bytes());
    assert!(note.contains(&endpoint) && note.contains("using the copy in"), "{note}");
    let offline = setup.eval(&endpoint, "org/llama").env("HF_HUB_OFFLINE", "1").assert().success().get_output().clone();
    assert_eq!((offline.stdout, offline.stderr), (local.into_bytes(), vec![]), "asked for, so no note");
}

#[test]
fn a_download_that_breaks_off_goes_on_where_it_was() {
    let setup = Setup::new();
    let hub = Hub::serve(setup.root());
    hub.cut.store(true, Ordering::SeqCst);
    let fetched = stdout(&mut setup.eval(&hub.endpoint, "org/llama"));
    assert_eq!(fetched, stdout(&mut setup.eval("", path("llama").to_str().unwrap())));
    assert!(!hub.cut.load(Ordering::SeqCst));
    assert_eq!(hub.asked("/model.safetensors"), 3, "its size, a half, and the rest");
}

#[test]
fn shards_and_single_gguf_files_are_fetched() {
    let setup = Setup::new();
    setup.add("sharded", &["config.json"]);
    let folder = setup.root().join("sharded");
    let shard = "model-00001-of-00001.safetensors";
    fs::copy(path("llama/model.safetensors"), folder.join(shard)).unwrap();
    let tensors = qlora_wgpu::formats::safetensors::SafetensorsFile::open(folder.join(shard)).unwrap();
    let map: serde_json::Map<String, Value> = tensors.names().iter().map(|name| (name.clone(), shard.into())).collect();
    fs::write(folder.join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string()).unwrap();
    let hub = Hub::serve(setup.root());
    let local = stdout(&mut setup.eval("", path("llama").to_str().unwrap()));
    assert_eq!(stdout(&mut setup.eval(&hub.endpoint, "org/sharded")), local);

    fs::create_dir(setup.root().join("gguf")).unwrap();
    for name in ["a-Q4_0.gguf", "a-Q8_0.gguf"] {
        fs::write(setup.root().join("gguf").join(name), "GGUF").unwrap();
    }
    let error = failure(&mut setup.eval(&hub.endpoint, "org/gguf"));
    assert!(
        error.contains("org/gguf/a-Q") && error.contains("a-Q4_0.gguf") && error.contains("a-Q8_0.gguf"),
        "{error}"
    );
    let error = failure(&mut setup.eval(&hub.endpoint, "org/gguf/none.gguf"));
    assert!(error.contains("no none.gguf") && error.contains("a-Q4_0.gguf"), "{error}");
    // It is fetched, alone, and turns out to be cut off.
    let output = setup.eval(&hub.endpoint, "org/gguf/a-Q4_0.gguf").assert().code(1).get_output().clone();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("snapshots") && error.contains("a-Q4_0.gguf: is truncated"), "{error}");
    assert_eq!((hub.asked("/a-Q4_0.gguf") > 0, hub.asked("/a-Q8_0.gguf")), (true, 0));
}

#[test]
fn what_cannot_be_fetched_is_told_in_one_sentence_and_soon() {
    let setup = Setup::new();
    setup.add("config-only", &["config.json"]);
    let hub = Hub::serve(setup.root());
    let error = failure(&mut setup.eval(&hub.endpoint, "org/none"));
    assert!(error.contains("org/none: ") && error.contains("404") && error.contains("HF_TOKEN"), "{error}");
    let error = failure(&mut setup.eval(&hub.endpoint, "org/llama@no-such-branch"));
    assert!(error.contains("org/llama@no-such-branch: ") && error.contains("404"), "{error}");
    let error = failure(&mut setup.eval(&hub.endpoint, "org/config-only"));
    assert!(error.contains("model.safetensors"), "{error}");

    let start = Instant::now();
    let endpoint = nowhere();
    let error = failure(&mut setup.eval(&endpoint, "org/llama"));
    for part in ["org/llama: ", &endpoint, "not in the cache", "give its directory"] {
        assert!(error.contains(part), "{part} in {error}");
    }
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    let error = failure(setup.eval(&hub.endpoint, "org/llama").env("HF_HUB_OFFLINE", "true"));
    assert!(error.contains("HF_HUB_OFFLINE") && hub.asked("/model.safetensors") == 0, "{error}");
    let blocked = setup.folder.path().join("data.jsonl");
    let output = setup.eval(&hub.endpoint, "org/llama").env("HF_HOME", &blocked).assert().code(1).get_output().clone();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("could not be downloaded to") && error.contains("data.jsonl"), "{error}");
    let error = failure(&mut setup.eval("no endpoint", "org/llama"));
    assert!(error.contains("org/llama: ") && error.contains("no endpoint"), "{error}");
    // A path that exists goes before an id, and what is no id is not asked for.
    fs::create_dir_all(setup.folder.path().join("org/llama")).unwrap();
    let error = failure(&mut setup.eval(&hub.endpoint, "org/llama"));
    assert!(error.contains("config.json"), "{error}");
    let error = failure(&mut setup.eval(&hub.endpoint, "./org/none"));
    assert!(error.contains("no such file or directory"), "{error}");
}
