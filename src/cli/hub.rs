//! Models by their ids on the Hugging Face hub, fetched into the cache folder that Hugging Face's own tools use.
//!
//! Read from the environment, as those tools do: `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE`, `HF_TOKEN`.

use std::env;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::api::RepoInfo;
use hf_hub::api::sync::{Api, ApiBuilder};
use hf_hub::{Cache, Repo, RepoType};

use super::say;
use crate::error::{Error, Result};
use crate::formats::checkpoint;

const ENDPOINT: &str = "https://huggingface.co";

/// For the name and then for the connection.
const CONNECT: Duration = Duration::from_secs(5);

/// For the whole first answer, which is small.
const ANSWER: Duration = Duration::from_secs(20);

/// Files beside the weights that are fetched where the repository has them.
const OPTIONAL: [&str; 4] =
    ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];

/// What is to be done where nothing can be fetched.
const HINT: &str = "check the path or id, or download the model yourself and give its directory";

/// A model on the hub, `org/name` or `org/name@revision`; or one file of it, with `/FILE.gguf` after that.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct HubId {
    repo: String,
    revision: String,
    file: Option<String>,
}

impl HubId {
    /// The id that `text` is, if it looks like one.
    pub(super) fn parse(text: &str) -> Option<HubId> {
        let (name, revision, file) = match text.split_once('@') {
            Some((name, rest)) if is_gguf(rest) => {
                let (revision, file) = rest.split_once('/')?;
                (name, revision, Some(file))
            }
            Some((name, revision)) => (name, revision, None),
            None if is_gguf(text) => {
                let (org, rest) = text.split_once('/')?;
                let (name, file) = rest.split_once('/')?;
                (&text[..org.len() + 1 + name.len()], "main", Some(file))
            }
            None => (text, "main", None),
        };
        let valid = |part: &str| {
            !part.starts_with(['.', '-']) && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        let parts = |path: &str| path.split('/').all(|part| !part.is_empty() && valid(part));
        let whole = name.split('/').count() == 2 && parts(name) && parts(revision);
        // Names of files may have any letters, but lead nowhere else.
        let inside = file.is_none_or(|file| file.split('/').all(|part| !["", ".", ".."].contains(&part)));
        (whole && inside).then(|| HubId { repo: name.into(), revision: revision.into(), file: file.map(String::from) })
    }

    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.repo.clone(), RepoType::Model, revision.into())
    }

    /// The file, or the folder with the model's files, fetched first if the cache does not have them.
    ///
    /// # Errors
    /// [`Error::Io`] if the hub cannot be reached and the cache lacks the model, the hub has no such model, or it is of no
    /// kind that is read here.
    pub(super) fn fetch(&self) -> Result<PathBuf> {
        let hub = Hub::from_env().map_err(|message| self.error(message))?;
        if hub.offline {
            return self.cached(&hub).map_err(|message| {
                self.error(format!("is no path here, and HF_HUB_OFFLINE is set, but {message}; {HINT}"))
            });
        }
        let api = hub.api().map_err(|message| self.error(message))?;
        match self.info(&api) {
            Ok(info) => self.download(&hub, &api, &info).map_err(|message| self.error(message)),
            Err(Refusal::Final(message)) => Err(self.error(message)),
            Err(Refusal::Unreachable(message)) => match self.cached(&hub) {
                Ok(path) => {
                    say::warning(format!("{self}: {message}; using the copy in {}", hub.cache.path().display()));
                    Ok(path)
                }
                Err(lacks) => Err(self.error(format!("is no path here, {message}, and {lacks}; {HINT}"))),
            },
        }
    }

    /// The commit that the revision is now, and the files in it.
    fn info(&self, api: &Api) -> Result<RepoInfo, Refusal> {
        let unreachable =
            |e: &dyn fmt::Display| Refusal::Unreachable(format!("{} cannot be reached ({e})", endpoint()));
        let request = api.repo(self.repo(&self.revision)).info_request().config();
        let request =
            request.timeout_resolve(Some(CONNECT)).timeout_connect(Some(CONNECT)).timeout_global(Some(ANSWER));
        let mut response = request.http_status_as_error(false).build().call().map_err(|e| unreachable(&e))?;
        match response.status().as_u16() {
            200 => {}
            status @ (401 | 403 | 404) => {
                return Err(Refusal::Final(format!(
                    "is no path here, and {} has no such model or revision, or not for this HF_TOKEN (status {status}); \
                     {HINT}",
                    endpoint()
                )));
            }
            status => return Err(unreachable(&format!("status {status}"))),
        }
        let info: RepoInfo = response.body_mut().read_json().map_err(|e| unreachable(&e))?;
        // It becomes a part of paths.
        let is_commit = !info.sha.is_empty() && info.sha.bytes().all(|b| b.is_ascii_hexdigit());
        if is_commit { Ok(info) } else { Err(unreachable(&format!("it answers with the commit {:?}", info.sha))) }
    }

    fn download(&self, hub: &Hub, api: &Api, info: &RepoInfo) -> Result<PathBuf, String> {
        // One commit for all files, whatever becomes of the branch in the meantime.
        let (pinned, snapshot) = (api.repo(self.repo(&info.sha)), hub.snapshot(self, &info.sha));
        let names: Vec<String> = info.siblings.iter().map(|sibling| sibling.rfilename.clone()).collect();
        let mut told = false;
        let path = self.assemble(&names, |name| {
            let path = snapshot.join(name);
            if path.exists() {
                return Ok(path);
            }
            if !told {
                say::progress(format!("{self}: downloading to {}", hub.cache.path().display()));
                told = true;
            }
            let failed = |e| {
                let cache = hub.cache.path().display();
                format!("{name} could not be downloaded to {cache} ({e}); run again to go on from there")
            };
            pinned.download(name).map_err(failed)
        })?;
        // Last, so that what this names is whole.
        let write = hub.cache.repo(self.repo(&self.revision)).create_ref(&info.sha);
        write.map_err(|e| format!("the cache {} cannot be written ({e})", hub.cache.path().display()))?;
        Ok(path)
    }

    /// The model in the cache. The error says what is missing there.
    fn cached(&self, hub: &Hub) -> Result<PathBuf, String> {
        let missing = || format!("it is not in the cache {}", hub.cache.path().display());
        let reference = hub.cache.path().join(self.repo("").folder_name()).join("refs").join(&self.revision);
        let commit =
            fs::read_to_string(reference).map_or_else(|_| self.revision.clone(), |text| text.trim().to_owned());
        let snapshot = hub.snapshot(self, &commit);
        let entries = fs::read_dir(&snapshot).map_err(|_| missing())?;
        let mut names: Vec<String> =
            entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.extend(self.file.iter().filter(|file| snapshot.join(file).exists()).cloned());
        self.assemble(&names, |name| {
            let path = snapshot.join(name);
            if path.exists() { Ok(path) } else { Err(format!("its copy in the cache lacks {name}")) }
        })
        .map_err(|message| format!("in the cache {}: {message}", hub.cache.path().display()))
    }

    /// Gets all files of a model among `names`.
    fn assemble(
        &self,
        names: &[String],
        mut get: impl FnMut(&str) -> Result<PathBuf, String>,
    ) -> Result<PathBuf, String> {
        let has = |name: &str| names.iter().any(|other| other == name);
        let ggufs = || names.iter().filter(|name| is_gguf(name)).map(String::as_str).collect::<Vec<_>>();
        if let Some(file) = &self.file {
            if has(file) {
                return get(file);
            }
            let others = if ggufs().is_empty() { "no .gguf file".into() } else { ggufs().join(", ") };
            return Err(format!("there is no {file}; there is {others}"));
        }
        let (single, index) = (checkpoint::SINGLE, checkpoint::INDEX);
        if !has("config.json") || !(has(single) || has(index)) {
            return Err(match ggufs().as_slice() {
                [] => format!("there is no config.json with {single} or {index}, so it is no model that can be read"),
                [first, ..] => {
                    let list = ggufs().join(", ");
                    format!("it has only GGUF files; name one, as in {}/{first}, of {list}", self.name())
                }
            });
        }
        let config = get("config.json")?;
        let folder = config.parent().unwrap_or(Path::new("")).to_path_buf();
        for name in OPTIONAL.into_iter().filter(|name| has(name)) {
            get(name)?;
        }
        if has(single) {
            get(single)?;
            return Ok(folder);
        }
        get(index)?;
        for shard in checkpoint::shards(&folder).map_err(|e| e.to_string())? {
            get(&shard)?;
        }
        Ok(folder)
    }

    /// As it is written, without the file.
    fn name(&self) -> String {
        match self.revision.as_str() {
            "main" => self.repo.clone(),
            revision => format!("{}@{revision}", self.repo),
        }
    }

    /// The last part of the file, or of the model's name.
    pub(super) fn last(&self) -> &str {
        let whole = self.file.as_ref().unwrap_or(&self.repo);
        whole.rsplit_once('/').map_or(whole, |(_, last)| last)
    }

    fn error(&self, message: impl fmt::Display) -> Error {
        Error::Io { path: self.to_string().into(), message: message.to_string() }
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())?;
        self.file.iter().try_for_each(|file| write!(f, "/{file}"))
    }
}

/// Why there is no answer about a model.
enum Refusal {
    /// The cache may do.
    Unreachable(String),
    /// There is no such model.
    Final(String),
}

/// Where models come from and go to.
struct Hub {
    cache: Cache,
    token: Option<String>,
    offline: bool,
}

impl Hub {
    fn from_env() -> Result<Hub, String> {
        let folder = |home: PathBuf| home.join("huggingface");
        let home = variable("HF_HOME")
            .map(PathBuf::from)
            .or_else(|| variable("XDG_CACHE_HOME").map(|cache| folder(cache.into())))
            .or_else(|| env::home_dir().map(|home| folder(home.join(".cache"))))
            .ok_or("there is no home directory for the cache; set HF_HOME")?;
        let hub = home.join("hub");
        let token = variable("HF_TOKEN").or_else(|| Cache::new(hub.clone()).token());
        let cache = Cache::new(variable("HF_HUB_CACHE").map_or(hub, PathBuf::from));
        let yes = |value: String| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str());
        Ok(Hub { cache, token, offline: variable("HF_HUB_OFFLINE").is_some_and(yes) })
    }

    fn api(&self) -> Result<Api, String> {
        let builder = ApiBuilder::from_cache(self.cache.clone()).with_endpoint(endpoint());
        builder.with_token(self.token.clone()).with_retries(2).build().map_err(|e| e.to_string())
    }

    /// The folder of a commit.
    fn snapshot(&self, id: &HubId, commit: &str) -> PathBuf {
        self.cache.repo(id.repo(commit)).pointer_path(commit)
    }
}

fn endpoint() -> String {
    variable("HF_ENDPOINT").map_or(ENDPOINT.into(), |endpoint| endpoint.trim_end_matches('/').into())
}

/// A variable of the environment, unless it is empty.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

fn is_gguf(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(repo: &str, revision: &str, file: Option<&str>) -> Option<HubId> {
        Some(HubId { repo: repo.into(), revision: revision.into(), file: file.map(String::from) })
    }

    #[test]
    fn what_looks_like_an_id_is_one() {
        assert_eq!(HubId::parse("org/name-1.5B_x"), id("org/name-1.5B_x", "main", None));
        assert_eq!(HubId::parse("org/name@v1.0"), id("org/name", "v1.0", None));
        assert_eq!(HubId::parse("org/name@refs/pr/1"), id("org/name", "refs/pr/1", None));
        assert_eq!(HubId::parse("org/name/a b.gguf"), id("org/name", "main", Some("a b.gguf")));
        assert_eq!(HubId::parse("org/name/Q4/a.GGUF"), id("org/name", "main", Some("Q4/a.GGUF")));
        assert_eq!(HubId::parse("org/name@v1/Q4/a.gguf"), id("org/name", "v1", Some("Q4/a.gguf")));
        for path in [
            "",
            "/",
            "name",
            "a/",
            "/a",
            "a//b",
            "a/b/c",
            "./a",
            "../a",
            "a/..",
            "/a/b",
            "a/.b",
            "-a/b",
            "a/b.gguf",
            "a/b@",
            "a@b",
            "a/b@../c",
            "a/b@c/../d.gguf",
            "a/b/../c.gguf",
            "a b/c",
            "a/b?c",
            "a\\b/c",
            "~/a",
        ] {
            assert_eq!(HubId::parse(path), None, "{path}");
        }
        for text in ["org/name", "org/name@v1", "org/name/Q4/a.gguf", "org/name@v1/a.gguf"] {
            assert_eq!(HubId::parse(text).unwrap().to_string(), text);
        }
    }
}
