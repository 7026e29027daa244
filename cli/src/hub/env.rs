//! Environment variables of Hugging Face's tools, with the same meanings: `HF_ENDPOINT`,
//! `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE`, `HF_TOKEN`, `HF_TOKEN_PATH`,
//! `HF_HUB_ETAG_TIMEOUT`, `HF_HUB_DOWNLOAD_TIMEOUT`, `SSL_CERT_FILE`, and older names for some.

use std::env;
use std::path::PathBuf;
use std::time::Duration;

use qlora_wgpu::internal::{MAX_SMALL, read_small_text};

const ENDPOINT: &str = "https://huggingface.co";

/// Default limit in seconds, for an answer to begin and for more bytes of a download.
const TIMEOUT: f64 = 10.0;

/// Where models come from and where they are stored.
pub(super) struct Settings {
    /// A URL without a slash at its end.
    pub endpoint: String,
    pub cache: PathBuf,
    pub token: Option<String>,
    pub offline: bool,
    /// File with the certificates to trust.
    pub certificates: Option<PathBuf>,
    /// Time limit for an answer to begin.
    pub answer: Duration,
    /// Time limit for more bytes of a download.
    pub stall: Duration,
}

impl Settings {
    /// # Errors
    /// A sentence, if there is no place for the cache, the token can't be read, or a time isn't a
    /// number.
    pub(super) fn from_env() -> Result<Settings, String> {
        let folder = |home: PathBuf| home.join("huggingface");
        let home = path(&["HF_HOME"])
            .or_else(|| path(&["XDG_CACHE_HOME"]).map(folder))
            .or_else(|| env::home_dir().map(|home| folder(home.join(".cache"))))
            .ok_or("there is no home directory for the cache; set HF_HOME")?;
        let endpoint = variable(&["HF_ENDPOINT"]).unwrap_or_else(|| ENDPOINT.into());
        Ok(Settings {
            endpoint: endpoint.trim_end_matches('/').into(),
            cache: path(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]).unwrap_or_else(|| home.join("hub")),
            token: token(path(&["HF_TOKEN_PATH"]).unwrap_or_else(|| home.join("token")))?,
            offline: is_set("HF_HUB_OFFLINE") || is_set("TRANSFORMERS_OFFLINE"),
            certificates: path(&["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"]),
            answer: seconds("HF_HUB_ETAG_TIMEOUT")?,
            stall: seconds("HF_HUB_DOWNLOAD_TIMEOUT")?,
        })
    }
}

/// The token from the environment, or otherwise from the file that `hf auth login` writes.
fn token(file: PathBuf) -> Result<Option<String>, String> {
    let token = match variable(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]) {
        Some(token) => token,
        None if is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN") || !file.exists() => return Ok(None),
        None => read_small_text(&file, MAX_SMALL).map_err(|e| format!("the token cannot be read: {e}"))?,
    };
    let token = token.trim();
    if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("the token (from HF_TOKEN or the login's file) has invalid characters".into());
    }
    Ok(Some(token.to_owned()).filter(|token| !token.is_empty()))
}

/// The first of these variables that is set and not empty.
fn variable(names: &[&str]) -> Option<String> {
    names.iter().find_map(|name| env::var(name).ok().filter(|value| !value.is_empty()))
}

/// Like [`variable`], for a path. Expands `~` and variables in it, as configuration files may use
/// them.
fn path(names: &[&str]) -> Option<PathBuf> {
    let value = names.iter().find_map(|name| env::var_os(name).filter(|value| !value.is_empty()))?;
    let home = || env::home_dir().and_then(|home| home.into_os_string().into_string().ok());
    let expand = |text: &str| {
        PathBuf::from(shellexpand::full_with_context_no_errors(text, home, |name| env::var(name).ok()).as_ref())
    };
    Some(value.to_str().map_or_else(|| PathBuf::from(&value), expand))
}

fn is_set(name: &str) -> bool {
    variable(&[name]).is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str()))
}

fn seconds(name: &str) -> Result<Duration, String> {
    let Some(text) = variable(&[name]) else { return Ok(Duration::from_secs_f64(TIMEOUT)) };
    let seconds = text.trim().parse().ok().filter(|&seconds: &f64| seconds >= 0.0);
    // 0 means the default, as in Hugging Face's tools.
    let seconds = seconds.map(|seconds| if seconds == 0.0 { TIMEOUT } else { seconds });
    let time = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    time.ok_or_else(|| format!("{name} is {text:?}, but must be a number of seconds"))
}
