//! `--model org/name`: models from a hub. Here a thread serves one on a local port.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::common::hub::{Answer, COMMIT, Hub, Request, git_id, sha1, sha256};
use crate::common::model::path;
use assert_cmd::Command;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Data of token ids, a cache, and the files that the hub serves.
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

    /// The cache's folder for org/NAME.
    fn cache(&self, name: &str) -> PathBuf {
        self.folder.path().join("cache/hub").join(format!("models--org--{name}"))
    }

    /// Serves these files of the recorded Llama model as org/NAME.
    fn add(&self, name: &str, files: &[&str]) {
        let folder = self.root().join(name);
        fs::create_dir_all(&folder).unwrap();
        for file in files {
            fs::copy(path("llama").join(file), folder.join(file)).unwrap();
        }
    }

    fn weights(&self) -> Vec<u8> {
        fs::read(self.root().join("llama/model.safetensors")).unwrap()
    }

    /// Files in the cache that exist only during a download.
    fn incomplete(&self) -> Vec<PathBuf> {
        let blobs = fs::read_dir(self.cache("llama").join("blobs")).into_iter().flatten();
        blobs.map(|blob| blob.unwrap().path()).filter(|path| path.extension().is_some()).collect()
    }

    fn eval(&self, endpoint: &str, model: &str) -> Command {
        let mut qlora = Command::cargo_bin("qlora").unwrap();
        self.prepare(&mut qlora, endpoint);
        qlora.args(["eval", "--device", "cpu", "--json", "--model", model, "--data", "data.jsonl"]);
        qlora
    }

    /// Sets the environment: only these of Hugging Face's variables, and time limits of half a
    /// second.
    fn prepare(&self, qlora: &mut Command, endpoint: &str) {
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("HF_") || name.starts_with("QLORA_")) {
            qlora.env_remove(name);
        }
        for name in ["http_proxy", "https_proxy", "all_proxy", "no_proxy", "ssl_cert_file", "requests_ca_bundle"] {
            qlora.env_remove(name).env_remove(name.to_uppercase());
        }
        qlora.env("HF_ENDPOINT", endpoint).env("HF_HOME", self.folder.path().join("cache"));
        qlora.env("HF_HUB_ETAG_TIMEOUT", "0.5").env("HF_HUB_DOWNLOAD_TIMEOUT", "0.5");
        qlora.current_dir(self.folder.path()).timeout(Duration::from_secs(60));
    }
}

fn stdout(command: &mut Command) -> String {
    String::from_utf8(command.assert().success().get_output().stdout.clone()).unwrap()
}

/// Standard error of a run that ends with this exit code.
fn stderr(command: &mut Command, code: i32) -> String {
    String::from_utf8(command.assert().code(code).get_output().stderr.clone()).unwrap()
}

fn failure(command: &mut Command) -> String {
    let error = stderr(command, 1);
    assert_eq!(error.lines().count(), 1, "{error}");
    error
}

/// The loss of the local copy of the model.
fn local(setup: &Setup) -> String {
    stdout(&mut setup.eval("", path("llama").to_str().unwrap()))
}

/// An endpoint where nobody listens.
fn nowhere() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[test]
fn a_model_is_fetched_once_and_then_found_in_the_cache() {
    let setup = Setup::new();
    let local = local(&setup);
    let hub = Hub::serve(setup.root());
    let fetched = stdout(setup.eval(&hub.endpoint, "org/llama").env("HF_TOKEN", "hf_secret"));
    assert_eq!(fetched, local);
    assert!(hub.tokens().iter().all(|token| token.as_deref() == Some("Bearer hf_secret")));
    assert_eq!((hub.asked("/README.md"), hub.asked("/generation_config.json")), (0, 1));
    assert_eq!(hub.asked("/model.safetensors"), 1);

    let again = setup.eval(&hub.endpoint, "org/llama@main").assert().success().get_output().clone();
    assert_eq!((again.stdout, again.stderr), (local.clone().into_bytes(), vec![]));
    let pinned = stdout(&mut setup.eval(&hub.endpoint, &format!("org/llama@{COMMIT}")));
    assert_eq!((pinned, hub.asked("/model.safetensors")), (local.clone(), 1));

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
fn the_cache_is_laid_out_as_hugging_faces_tools_have_it() {
    let setup = Setup::new();
    let hub = Hub::serve(setup.root());
    stdout(&mut setup.eval(&hub.endpoint, "org/llama"));
    let (cache, source) = (setup.cache("llama"), setup.root().join("llama"));
    assert_eq!(fs::read_to_string(cache.join("refs/main")).unwrap(), COMMIT);
    for (name, digest) in [("config.json", git_id as fn(&[u8]) -> String), ("model.safetensors", sha256)] {
        let bytes = fs::read(source.join(name)).unwrap();
        let blob = cache.join("blobs").join(digest(&bytes));
        assert_eq!(fs::read(&blob).unwrap(), bytes, "{name}");
        let link = cache.join("snapshots").join(COMMIT).join(name);
        assert_eq!(fs::canonicalize(&link).unwrap(), fs::canonicalize(&blob).unwrap());
        #[cfg(unix)]
        assert_eq!(fs::read_link(&link).unwrap(), Path::new("../../blobs").join(digest(&bytes)));
    }
    assert_eq!(setup.incomplete(), [] as [PathBuf; 0]);
    // A blob of another commit is linked, and a dangling link is replaced.
    let link = cache.join("snapshots").join(COMMIT).join("config.json");
    fs::remove_file(&link).unwrap();
    #[cfg(unix)]
    std::os::unix::fs::symlink("nothing", &link).unwrap();
    stdout(&mut setup.eval(&hub.endpoint, "org/llama"));
    assert!(link.exists());
    // A blob with another size isn't linked.
    fs::remove_file(&link).unwrap();
    let blob = cache.join("blobs").join(git_id(&fs::read(source.join("config.json")).unwrap()));
    fs::write(&blob, "{").unwrap();
    stdout(&mut setup.eval(&hub.endpoint, "org/llama"));
    assert!(fs::read(&blob).unwrap().len() > 1);
}

#[test]
fn the_variables_mean_what_they_mean_to_hugging_faces_tools() {
    let setup = Setup::new();
    let hub = Hub::serve(setup.root());
    let folder = setup.folder.path();
    fs::create_dir(folder.join("home")).unwrap();
    fs::write(folder.join("home/token"), "hf_of_file\n").unwrap();
    let mut qlora = setup.eval(&hub.endpoint, "org/llama");
    stdout(qlora.env("HOME", folder).env("HF_HOME", "~/home").env("HF_HUB_CACHE", "$HOME/elsewhere"));
    assert!(folder.join("elsewhere/models--org--llama/refs/main").exists());
    let tokens = hub.tokens();
    assert!(tokens.iter().all(|token| token.as_deref() == Some("Bearer hf_of_file")), "{tokens:?}");
    stdout(setup.eval(&hub.endpoint, "org/llama").env("HF_HOME", "home").env("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"));
    assert_eq!(hub.tokens()[tokens.len()..], vec![None; hub.tokens().len() - tokens.len()]);

    for (name, value, part) in [
        ("HF_ENDPOINT", "no endpoint", "no endpoint"),
        ("HF_ENDPOINT", "ftp://host", "ftp://host"),
        ("HF_ENDPOINT", "huggingface.co", "https://"),
        ("HF_TOKEN", "hf_ä", "token"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "soon", "soon"),
        ("SSL_CERT_FILE", "SSL_CERT_FILE", "certificates cannot be read"),
    ] {
        let error = failure(setup.eval(&hub.endpoint, "org/llama").env(name, value));
        assert!(error.contains("org/llama: ") && error.contains(name) && error.contains(part), "{error}");
    }
}

#[test]
fn a_download_that_breaks_off_goes_on_where_it_was() {
    let setup = Setup::new();
    let weights = setup.weights();
    let half = weights.len() / 2;
    // Cut off once, within one process.
    let cut = AtomicBool::new(true);
    let hub = Hub::lie(setup.root(), move |request, answer| {
        if request.path.ends_with(".safetensors") && cut.swap(false, Ordering::SeqCst) {
            answer.sent = half;
        }
    });
    assert_eq!(stdout(&mut setup.eval(&hub.endpoint, "org/llama")), local(&setup));
    let asked = |hub: &Hub| -> Vec<Option<usize>> {
        let seen = hub.seen.lock().unwrap();
        seen.iter().filter(|request| request.path.ends_with(".safetensors")).map(|request| request.from).collect()
    };
    assert_eq!(asked(&hub), [None, Some(half)]);

    // A server that never finishes, a process killed meanwhile, and another process after it.
    let setup = Setup::new();
    let hub = Hub::lie(setup.root(), move |request, answer| {
        if request.path.ends_with(".safetensors") && request.from.is_none() {
            (answer.sent, answer.after) = (half, Duration::from_secs(60));
        }
    });
    let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin("qlora"));
    child.env("HF_ENDPOINT", &hub.endpoint).env("HF_HOME", setup.folder.path().join("cache"));
    child.args(["eval", "--device", "cpu", "--model", "org/llama", "--data", "data.jsonl"]);
    let mut child = child.current_dir(setup.folder.path()).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    let part = || setup.incomplete().first().and_then(|path| path.metadata().ok()).map_or(0, |part| part.len());
    while part() < half as u64 {
        assert!(start.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!setup.cache("llama").join("refs").exists());
    let part = setup.incomplete();
    assert_eq!(part, [setup.cache("llama").join(format!("blobs/{}.incomplete", sha256(&weights)))]);
    assert_eq!(stdout(&mut setup.eval(&hub.endpoint, "org/llama")), local(&setup));
    assert_eq!(asked(&hub), [None, None, Some(half)]);

    // The partial file may be wrong, too long, or complete. The server may not support ranges, or
    // reject this one.
    for (part, ranges) in [
        (vec![0; half], "all"),
        (vec![0; weights.len()], "all"),
        (vec![0; weights.len() + 1], "all"),
        (weights.clone(), "all"),
        (weights[..half].to_vec(), "none"),
        (weights[..half].to_vec(), "not satisfiable"),
    ] {
        let setup = Setup::new();
        let hub = Hub::lie(setup.root(), move |request, answer| {
            if request.from.is_some() && ranges != "all" {
                let bytes = fs::read(path("llama").join("model.safetensors")).unwrap();
                answer.headers.retain(|(name, _)| *name != "Content-Range");
                (answer.status, answer.body) = if ranges == "none" { (200, bytes) } else { (416, vec![]) };
            }
        });
        let blobs = setup.cache("llama").join("blobs");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(format!("{}.incomplete", sha256(&weights))), part).unwrap();
        assert_eq!(stdout(&mut setup.eval(&hub.endpoint, "org/llama")), local(&setup));
        assert_eq!(setup.incomplete(), [] as [PathBuf; 0]);
    }
}

#[test]
fn two_processes_that_want_the_same_file_fetch_it_once() {
    let setup = Setup::new();
    let hub = Hub::lie(setup.root(), |request, answer| {
        if request.path.ends_with(".safetensors") {
            answer.before = Duration::from_millis(300);
        }
    });
    let local = local(&setup);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| assert_eq!(stdout(&mut setup.eval(&hub.endpoint, "org/llama")), local));
        }
    });
    assert_eq!(setup.incomplete(), [] as [PathBuf; 0]);
    // Waits for a process that holds the lock of the weights.
    fs::remove_dir_all(setup.cache("llama")).unwrap();
    let lock =
        setup.folder.path().join(format!("cache/hub/.locks/models--org--llama/{}.lock", sha256(&setup.weights())));
    let lock = fs::File::open(lock).unwrap();
    lock.lock().unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| stderr(&mut setup.eval(&hub.endpoint, "org/llama"), 0));
        std::thread::sleep(Duration::from_millis(500));
        lock.unlock().unwrap();
        let said = waiting.join().unwrap();
        assert!(said.contains("waiting for another process that downloads model.safetensors"), "{said}");
    });
}

#[cfg(unix)]
#[test]
fn a_full_disk_is_an_error_and_what_came_is_kept() {
    let setup = Setup::new();
    let hub = Hub::serve(setup.root());
    // Simulates a full disk by a limit on file size: 16 blocks of 512 or 1024 bytes.
    let mut limited = Command::new("sh");
    setup.prepare(&mut limited, &hub.endpoint);
    limited.args(["-c", "trap '' XFSZ; ulimit -f 16; exec \"$0\" \"$@\""]).arg(assert_cmd::cargo::cargo_bin("qlora"));
    limited.args(["eval", "--device", "cpu", "--json", "--model", "org/llama", "--data", "data.jsonl"]);
    let error = stderr(&mut limited, 1);
    assert!(error.contains("model.safetensors") && error.contains(".incomplete"), "{error}");
    assert!(error.to_lowercase().contains("too large"), "{error}");
    let snapshot = setup.cache("llama").join("snapshots").join(COMMIT);
    assert!(!snapshot.join("model.safetensors").exists() && !setup.cache("llama").join("refs").exists());
    assert_eq!(setup.incomplete().len(), 1);
    assert_eq!(stdout(&mut setup.eval(&hub.endpoint, "org/llama")), local(&setup));
    let last = hub.seen.lock().unwrap().last().unwrap().clone();
    assert!(last.path.ends_with("/model.safetensors") && last.from.is_some_and(|from| from >= 8192), "{last:?}");
}

#[test]
fn shards_and_single_gguf_files_are_fetched() {
    let setup = Setup::new();
    setup.add("sharded", &["config.json"]);
    let folder = setup.root().join("sharded");
    let shard = "model-00001-of-00001.safetensors";
    fs::copy(path("llama/model.safetensors"), folder.join(shard)).unwrap();
    let tensors = qlora_wgpu::internal::safetensors::SafetensorsFile::open(folder.join(shard)).unwrap();
    let map: serde_json::Map<String, Value> = tensors.names().iter().map(|name| (name.clone(), shard.into())).collect();
    fs::write(folder.join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string()).unwrap();
    fs::create_dir(folder.join("additional_chat_templates")).unwrap();
    fs::write(folder.join("additional_chat_templates/tools.jinja"), "").unwrap();
    let hub = Hub::serve(setup.root());
    let local = local(&setup);
    assert_eq!(stdout(&mut setup.eval(&hub.endpoint, "org/sharded")), local);
    let snapshot = setup.cache("sharded").join("snapshots").join(COMMIT);
    assert!(snapshot.join("additional_chat_templates/tools.jinja").exists());
    assert_eq!(stdout(setup.eval(&nowhere(), "org/sharded").env("HF_HUB_OFFLINE", "1")), local);

    let gguf = setup.root().join("gguf");
    fs::create_dir_all(gguf.join("parts")).unwrap();
    for name in
        ["a-Q4_0.gguf", "a-Q8_0.gguf", "a b#c.gguf", "parts/b-00001-of-00002.gguf", "parts/b-00002-of-00002.gguf"]
    {
        fs::write(gguf.join(name), format!("GGUF{name}")).unwrap();
    }
    let error = failure(&mut setup.eval(&hub.endpoint, "org/gguf"));
    assert!(error.contains("org/gguf/a") && error.contains("a-Q4_0.gguf") && error.contains("a-Q8_0.gguf"), "{error}");
    for (name, missing) in [("none.gguf", "none.gguf"), ("a-00001-of-00002.gguf", "a-00001-of-00002.gguf")] {
        let error = failure(&mut setup.eval(&hub.endpoint, &format!("org/gguf/{name}")));
        assert!(error.contains(&format!("no {missing}")) && error.contains("a-Q4_0.gguf"), "{error}");
    }
    // They are fetched, alone or with all parts, and turn out not to be models.
    for name in ["a-Q4_0.gguf", "a b#c.gguf", "parts/b-00001-of-00002.gguf"] {
        let error = stderr(&mut setup.eval(&hub.endpoint, &format!("org/gguf/{name}")), 1);
        assert!(error.contains("snapshots") && error.contains(name) && !error.contains("downloaded"), "{error}");
        let error = failure(setup.eval(&nowhere(), &format!("org/gguf/{name}")).env("HF_HUB_OFFLINE", "1"));
        assert!(error.contains("snapshots") && error.contains(name), "{error}");
    }
    let count = ["/a-Q4_0.gguf", "/a-Q8_0.gguf", "/a%20b%23c.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf"];
    assert_eq!(count.map(|name| hub.asked(name)), [1, 0, 1, 1, 1]);
}

#[test]
fn the_token_goes_to_the_endpoint_and_redirects_are_followed() {
    let setup = Setup::new();
    let other = Hub::serve(setup.root());
    let base = other.endpoint.replace("127.0.0.1", "localhost");
    let by_path = Arc::new(Mutex::new(vec![]));
    let seen = by_path.clone();
    // Like the real hub: large files are on another host, small ones at another path, given
    // without a host.
    let hub = Hub::lie(setup.root(), move |request, answer| {
        seen.lock().unwrap().push(request.path.clone());
        if request.path.ends_with(".safetensors") {
            let bytes = fs::read(path("llama").join("model.safetensors")).unwrap();
            answer.set("X-Linked-ETag", format!("\"{}\"", sha256(&bytes)));
            answer.set("X-Linked-Size", bytes.len());
            answer.set("ETag", "\"of-the-redirect\"");
            answer.redirect(format!("{base}{}", request.path));
        } else if request.path.contains("/resolve/") && !request.path.ends_with("?moved") {
            answer.redirect(match request.path.as_str() {
                path if path.ends_with("generation_config.json") => "generation_config.json?moved".into(),
                path => format!("{path}?moved"),
            });
        } else if let Some(name) = request.path.strip_suffix("?moved") {
            let bytes = fs::read(path("llama").join(Path::new(name).file_name().unwrap())).unwrap();
            (answer.status, answer.headers) = (200, vec![]);
            answer.set("ETag", format!("W/\"{}\"", git_id(&bytes)));
            answer.body = bytes;
        }
    });
    let fetched = stdout(setup.eval(&hub.endpoint, "org/llama").env("HF_TOKEN", "hf_secret"));
    assert_eq!(fetched, local(&setup));
    assert!(hub.tokens().iter().all(Option::is_some), "{:?}", hub.tokens());
    assert_eq!(other.tokens(), [None]);
    let blob = setup.cache("llama").join("blobs").join(sha256(&setup.weights()));
    assert!(blob.exists());
}

/// Checks what a lying hub leads to: an error that contains `error`, or success for `None`.
fn check_lie(what: &str, error: Option<&str>, lie: impl Fn(&Request, &mut Answer) + Send + Sync + 'static) {
    let setup = Setup::new();
    let hub = Hub::lie(setup.root(), lie);
    let start = Instant::now();
    match error {
        None => assert_eq!(stdout(&mut setup.eval(&hub.endpoint, "org/llama")), local(&setup), "{what}"),
        Some(part) => {
            let said = stderr(&mut setup.eval(&hub.endpoint, "org/llama"), 1);
            let last = said.lines().last().unwrap();
            assert!(last.starts_with("error: org/llama: ") && last.contains(part), "{what}: {said}");
            assert!(!setup.cache("llama").join("refs").exists(), "{what}");
        }
    }
    assert!(start.elapsed() < Duration::from_secs(20), "{what}: {:?}", start.elapsed());
    // Files in the cache are right or incomplete, and no file is anywhere else.
    let (cache, source) = (setup.cache("llama"), setup.root().join("llama"));
    for link in fs::read_dir(cache.join("snapshots").join(COMMIT)).into_iter().flatten().map(Result::unwrap) {
        if let Ok(right) = fs::read(source.join(link.file_name())) {
            assert_eq!(fs::read(link.path()).unwrap(), right, "{what}");
        }
    }
    for blob in fs::read_dir(cache.join("blobs")).into_iter().flatten().map(Result::unwrap) {
        let (name, bytes) = (blob.file_name().into_string().unwrap(), fs::read(blob.path()).unwrap());
        let right = [git_id(&bytes), sha256(&bytes), sha1(&bytes)];
        assert!(name.ends_with(".incomplete") || right.contains(&name), "{what}: {name}");
    }
    let here: Vec<_> = fs::read_dir(setup.folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(
        here.iter().all(|name| ["cache", "data.jsonl", "hub"].iter().any(|known| name == known)),
        "{what}: {here:?}"
    );
}

#[test]
fn names_that_lie_lead_nowhere() {
    for tag in ["../../../../pwn", "/pwn", "..", "C:\\pwn", "..\\pwn"] {
        let name = if tag.starts_with("..\\") || tag.starts_with('C') { tag.replace('\\', "\\\\") } else { tag.into() };
        check_lie(tag, Some(&format!("ETag \"{name}\"")), move |_, answer| answer.set("ETag", format!("\"{tag}\"")));
        check_lie(tag, Some("ETag"), move |_, answer| answer.set("X-Linked-ETag", tag));
    }
    for commit in ["../../../../pwn", "/pwn", "0123"] {
        let other = format!("commit \"{commit}\" instead of {COMMIT}");
        check_lie(commit, Some(&other), move |_, answer| answer.set("X-Repo-Commit", commit));
        check_lie(commit, Some("which isn't a commit id"), move |request, answer| {
            if request.is_api() {
                answer.body = json!({"sha": commit, "siblings": []}).to_string().into_bytes();
            }
        });
    }
    // Files that nobody requests may have any name.
    check_lie("siblings", None, |request, answer| {
        if request.is_api() {
            let mut info: Value = serde_json::from_slice(&answer.body).unwrap();
            let siblings = info["siblings"].as_array_mut().unwrap();
            siblings.extend(["../../../../pwn", "/pwn", "C:\\pwn"].map(|name| json!({"rfilename": name})));
            answer.body = info.to_string().into_bytes();
        }
    });
    let (leads, odd) = ("not a file in its folder", "isn't a valid name for a file in a model");
    for (shard, part) in
        [("../../pwn", leads), (".", leads), ("..\\pwn", if cfg!(windows) { leads } else { odd }), ("a:b", odd)]
    {
        check_lie(shard, Some(part), move |request, answer| {
            if request.is_api() {
                let names = ["config.json", "model.safetensors.index.json"].map(|name| json!({"rfilename": name}));
                answer.body = json!({"sha": COMMIT, "siblings": names}).to_string().into_bytes();
            } else if request.path.ends_with("index.json") {
                let body = json!({"weight_map": {"a": shard}}).to_string().into_bytes();
                answer.status = 200;
                answer.set("ETag", git_id(&body));
                answer.body = body;
            }
        });
    }
}

#[test]
fn content_that_lies_is_found_out() {
    let is_file = |request: &Request| !request.is_api();
    check_lie("another content", Some("instead of"), move |request, answer| {
        if is_file(request) {
            *answer.body.last_mut().unwrap() ^= 1;
        }
    });
    check_lie("a digest of something else", Some("its SHA-256 is"), |_, answer| {
        answer.set("ETag", "\"".to_owned() + &"0".repeat(64) + "\"")
    });
    // Some mirrors send the SHA-1 of the contents.
    check_lie("a plain SHA-1", None, |_, answer| answer.set("ETag", sha1(&answer.body)));
    // Then only sizes are checked, with one warning.
    let setup = Setup::new();
    let hub = Hub::lie(setup.root(), |_, answer| answer.set("ETag", "\"5f3e-1234\""));
    let said = stderr(&mut setup.eval(&hub.endpoint, "org/llama"), 0);
    assert_eq!(said.matches("gives no digest for config.json, so only its size is checked").count(), 1, "{said}");
    assert_eq!(said.matches("warning").count(), 1, "{said}");

    check_lie("a half, always", Some("broke off after"), move |request, answer| {
        if is_file(request) {
            answer.sent = answer.body.len() / 2;
        }
    });
    check_lie("a half, without a length", Some("broke off after"), move |request, answer| {
        if is_file(request) {
            answer.set("X-Linked-Size", answer.body.len());
            (answer.sent, answer.tells_length) = (answer.body.len() / 2, false);
        }
    });
    check_lie("two sizes", Some("two sizes"), |_, answer| answer.set("X-Linked-Size", 1_u64 << 63));
    check_lie("no size", Some("\"a lot\""), |_, answer| answer.set("X-Linked-Size", "a lot"));
    check_lie("neither size nor digest", Some("neither its digest nor its size"), move |request, answer| {
        if is_file(request) {
            answer.headers.clear();
            answer.tells_length = false;
        }
    });
    check_lie("no end", Some("sends more than"), move |request, answer| {
        if is_file(request) {
            answer.set("X-Linked-Size", answer.body.len());
            answer.body = vec![b'x'; 8 << 20];
            answer.tells_length = false;
        }
    });
    check_lie("compressed", Some("gzip"), |_, answer| answer.set("Content-Encoding", "gzip"));
    for range in ["bytes 0-9/10", "bytes 5-4/3", "lines 1-2/3", ""] {
        check_lie(range, Some(&format!("Content-Range {range:?}")), move |request, answer| {
            if is_file(request) && request.from.is_none() && request.path.ends_with(".safetensors") {
                answer.sent = 100;
            } else if request.from.is_some() {
                answer.set("Content-Range", range);
            }
        });
    }
    check_lie("odd headers", Some("isn't text"), |_, answer| answer.set("ETag", "\"ä\""));
}

#[test]
fn redirects_that_lead_nowhere_end() {
    let is_file = |request: &Request| !request.is_api();
    check_lie("no location", Some("no Location"), move |request, answer| {
        if is_file(request) {
            answer.status = 302;
        }
    });
    check_lie("a loop", Some("in a loop"), move |request, answer| {
        if is_file(request) {
            answer.redirect(&request.path);
        }
    });
    check_lie("ever new places", Some("more than 10 times"), move |request, answer| {
        if is_file(request) {
            answer.redirect(format!("{}x", request.path));
        }
    });
    for location in ["http://", "file:///etc/passwd", "//", "http://[", "ä"] {
        check_lie(location, Some("isn't a URL"), move |request, answer| {
            if is_file(request) {
                answer.redirect(location);
            }
        });
    }
}

#[test]
fn a_hub_that_hangs_is_not_waited_for() {
    check_lie("no answer", Some("no answer within 500ms"), |_, answer| answer.before = Duration::from_secs(9));
    check_lie("a file that stalls", Some("nothing came for 500ms"), |request, answer| {
        if !request.is_api() {
            (answer.sent, answer.after) = (answer.body.len() / 2, Duration::from_secs(9));
        }
    });
    check_lie("a long answer", Some("longer than 32 MiB"), |request, answer| {
        if request.is_api() {
            (answer.body, answer.tells_length) = (vec![b' '; 33 << 20], false);
        }
    });
    check_lie("no model's answer", Some("not a model's"), |request, answer| {
        if request.is_api() {
            answer.body = b"<html>Log in</html>".to_vec();
        }
    });
    // Temporary failures are tried again.
    let count = Arc::new(Mutex::new(0_usize));
    check_lie("busy at first", None, move |_, answer| {
        let mut count = count.lock().unwrap();
        *count += 1;
        if !count.is_multiple_of(3) {
            (answer.status, answer.body) = ([429, 503][*count % 2], vec![]);
        }
    });
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
    let error = stderr(setup.eval(&hub.endpoint, "org/llama").env("HF_HUB_CACHE", &blocked), 1);
    assert!(error.contains("could not be downloaded to") && error.contains("data.jsonl"), "{error}");
    // A path that exists takes precedence over an id, and what isn't an id isn't requested.
    fs::create_dir_all(setup.folder.path().join("org/llama")).unwrap();
    let error = failure(&mut setup.eval(&hub.endpoint, "org/llama"));
    assert!(error.contains("config.json"), "{error}");
    let error = failure(&mut setup.eval(&hub.endpoint, "./org/none"));
    assert!(error.contains("no such file or directory"), "{error}");
}

#[test]
fn a_gated_model_says_what_to_do() {
    let setup = Setup::new();
    // The model's page is public, its files aren't.
    let hub = Hub::lie(setup.root(), |request, answer| {
        if !request.is_api() && request.token.as_deref() != Some("Bearer hf_good") {
            (answer.status, answer.body) = (if request.token.is_some() { 403 } else { 401 }, vec![]);
            answer.set("X-Error-Code", "GatedRepo");
        }
    });
    let page = format!("{}/org/llama", hub.endpoint);
    let error = stderr(&mut setup.eval(&hub.endpoint, "org/llama"), 1);
    assert!(error.contains("set HF_TOKEN") && error.contains(&page) && error.contains("401"), "{error}");
    let error = stderr(setup.eval(&hub.endpoint, "org/llama").env("HF_TOKEN", "hf_bad"), 1);
    assert!(error.contains("this HF_TOKEN has no access") && error.contains(&page) && error.contains("403"), "{error}");
    assert!(!error.contains("hf_bad"), "{error}");
    stdout(setup.eval(&hub.endpoint, "org/llama").env("HF_TOKEN", "hf_good"));
    // A private model, or one that doesn't exist.
    let hub = Hub::lie(setup.root(), |_, answer| answer.status = 401);
    let error = failure(&mut setup.eval(&hub.endpoint, "org/private"));
    assert!(error.contains("private") && error.contains("HF_TOKEN") && error.contains("401"), "{error}");
    let error = failure(setup.eval(&hub.endpoint, "org/private").env("HF_TOKEN", "hf_bad"));
    assert!(error.contains("does not know this HF_TOKEN"), "{error}");
}
