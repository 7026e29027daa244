//! Models from the Hugging Face hub, fetched by id into the cache folder of Hugging Face's own
//! tools.

mod cache;
mod client;
mod download;
mod env;

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::formats::checkpoint;
use qlora_wgpu::internal::gguf::is_gguf_name;
use regex::Regex;

use super::output;
use cache::{Folder, is_inside};
use client::{Client, Fault, Info};
use download::Download;
use env::Settings;

/// Files beside the weights, fetched if the repository has them.
const OPTIONAL: [&str; 6] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
];

/// The folder with more chat templates; its files are fetched too.
const TEMPLATES: &str = "additional_chat_templates/";

/// Advice if nothing can be fetched.
const HINT: &str = "check the path or id, or download the model yourself and give its directory";

/// A model on the hub, `org/name` or `org/name@revision`, or one of its files, with `/FILE.gguf`
/// appended.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct HubId {
    repo: String,
    revision: String,
    file: Option<String>,
}

impl HubId {
    /// Parses a text that looks like an id.
    pub(super) fn parse(text: &str) -> Option<HubId> {
        let (name, revision, file) = match text.split_once('@') {
            Some((name, rest)) if is_gguf_name(rest) => {
                let (revision, file) = rest.split_once('/')?;
                (name, revision, Some(file))
            }
            Some((name, revision)) => (name, revision, None),
            None if is_gguf_name(text) => {
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
        // File names may have any letters, but must stay in the folder.
        let inside = file.is_none_or(is_inside);
        (whole && inside).then(|| HubId { repo: name.into(), revision: revision.into(), file: file.map(String::from) })
    }

    /// Returns the path of the file, or of the folder with the model's files. Fetches them if the
    /// cache lacks them.
    ///
    /// # Errors
    /// [`Error::Io`] if the hub can't be reached and the cache lacks the model, if the hub has no
    /// such model, or if the model's files aren't of a supported kind.
    pub(super) fn fetch(&self) -> Result<PathBuf> {
        let settings = Settings::from_env().map_err(|message| self.error(message))?;
        let folder = Folder::new(&settings.cache, &self.repo);
        if settings.offline {
            return self.cached(&folder).map_err(|message| {
                self.error(format!("no such path, and HF_HUB_OFFLINE is set, but {message}; {HINT}"))
            });
        }
        let client = Client::new(&settings).map_err(|message| self.error(message))?;
        match client.info(&self.repo, &self.revision) {
            Ok(info) => self.download(&client, &folder, &info).map_err(|message| self.error(message)),
            Err(Fault::Final(message)) => Err(self.error(format!("no such path, and {message}; {HINT}"))),
            Err(Fault::Away(message) | Fault::Passing(message)) => match self.cached(&folder) {
                Ok(path) => {
                    output::warning(format!("{self}: {message}; using the copy in {}", folder.cache().display()));
                    Ok(path)
                }
                Err(lacks) => Err(self.error(format!("no such path, {message}, and {lacks}; {HINT}"))),
            },
        }
    }

    fn download(&self, client: &Client, folder: &Folder, info: &Info) -> Result<PathBuf, String> {
        let cache = folder.cache().display();
        // One commit for all files, even if the branch moves meanwhile.
        let commit = info.commit();
        let download = Download::new(client, folder, &self.repo, commit);
        let mut told = false;
        let path = self.assemble(&info.files(), |name| {
            if !told && !folder.snapshot(commit).join(name).exists() {
                output::progress(format!("{self}: downloading to {cache}"));
                told = true;
            }
            download.file(name).map_err(|e| format!("{name} could not be downloaded to {cache} ({e})"))
        })?;
        // Recorded last, so that the revision names complete files.
        folder.set_commit(&self.revision, commit).map_err(|e| e.to_string())?;
        Ok(path)
    }

    /// The model in the cache. The error says what the cache lacks.
    fn cached(&self, folder: &Folder) -> Result<PathBuf, String> {
        let cache = folder.cache().display();
        let commit = folder.commit(&self.revision).map_err(|e| e.to_string())?;
        let snapshot = folder.snapshot(&commit);
        let entries = fs::read_dir(&snapshot).map_err(|_| format!("it is not in the cache {cache}"))?;
        let mut names: Vec<String> =
            entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.extend(self.file.iter().flat_map(|file| parts(file)).filter(|file| snapshot.join(file).exists()));
        self.assemble(&names, |name| {
            let path = snapshot.join(name);
            if path.exists() { Ok(path) } else { Err(format!("its copy in the cache lacks {name}")) }
        })
        .map_err(|message| format!("in the cache {cache}: {message}"))
    }

    /// Gets all of a model's files among `names`.
    fn assemble(
        &self,
        names: &[String],
        mut get: impl FnMut(&str) -> Result<PathBuf, String>,
    ) -> Result<PathBuf, String> {
        let has = |name: &str| names.iter().any(|other| other == name);
        let ggufs = || names.iter().filter(|name| is_gguf_name(name)).map(String::as_str).collect::<Vec<_>>();
        if let Some(file) = &self.file {
            let parts = parts(file);
            if let Some(missing) = parts.iter().find(|part| !has(part)) {
                let others = if ggufs().is_empty() { "no .gguf file".into() } else { ggufs().join(", ") };
                return Err(format!("there is no {missing}; there is {others}"));
            }
            // The first part is the one to open.
            let first = get(&parts[0])?;
            parts[1..].iter().try_for_each(|part| get(part).map(drop))?;
            return Ok(first);
        }
        let (single, index) = (checkpoint::SINGLE, checkpoint::INDEX);
        if !has("config.json") || !(has(single) || has(index)) {
            return Err(match ggufs().as_slice() {
                [] => format!("there is no config.json with {single} or {index}, so this isn't a supported model"),
                [first, ..] => {
                    let list = ggufs().join(", ");
                    format!("it has only GGUF files; name one, as in {}/{first}. Its files: {list}", self.name())
                }
            });
        }
        let config = get("config.json")?;
        let folder = config.parent().unwrap_or(Path::new("")).to_path_buf();
        let templates = names.iter().map(String::as_str).filter(|name| name.starts_with(TEMPLATES));
        for name in OPTIONAL.into_iter().filter(|name| has(name)).chain(templates) {
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

    /// The id without the file.
    fn name(&self) -> String {
        match self.revision.as_str() {
            "main" => self.repo.clone(),
            revision => format!("{}@{revision}", self.repo),
        }
    }

    /// The last part of the file's path or of the model's name.
    pub(super) fn last(&self) -> &str {
        let whole = self.file.as_ref().unwrap_or(&self.repo);
        whole.rsplit_once('/').map_or(whole, |(_, last)| last)
    }

    fn error(&self, message: impl fmt::Display) -> Error {
        Error::io(self.to_string(), io::Error::other(message.to_string()))
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())?;
        self.file.iter().try_for_each(|file| write!(f, "/{file}"))
    }
}

/// All parts of a split GGUF file, `NAME-00001-of-00003.gguf`, or the file itself if it isn't
/// split.
fn parts(file: &str) -> Vec<String> {
    static PART: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"(?i)^(.*-)\d{5}(-of-(\d{5})\.gguf)$").expect("an expression"));
    let Some(part) = PART.captures(file) else { return vec![file.into()] };
    let count: u32 = part[3].parse().expect("digits");
    let all: Vec<String> = (1..=count).map(|i| format!("{}{i:05}{}", &part[1], &part[2])).collect();
    if all.iter().any(|part| part == file) { all } else { vec![file.into()] }
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
            "a/b/..\\c.gguf",
            "a/b/C:c.gguf",
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

    #[test]
    fn a_split_file_has_parts() {
        assert_eq!(parts("a/b-00002-of-00003.gguf"), [1, 2, 3].map(|i| format!("a/b-0000{i}-of-00003.gguf")));
        for whole in
            ["a.gguf", "a-00001-of-00002.bin", "a-1-of-2.gguf", "a-00003-of-00002.gguf", "a-00001-of-00000.gguf"]
        {
            assert_eq!(parts(whole), [whole]);
        }
    }
}
