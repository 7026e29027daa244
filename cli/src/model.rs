//! Shared by commands that load a model.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use clap::{Args, ValueEnum, ValueHint};
use qlora_wgpu::ModelFiles;
use qlora_wgpu::device::Device;
use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::formats::checkpoint::BaseFormat;
use qlora_wgpu::formats::peft::{self, PeftAdapter, PeftConfig};
use qlora_wgpu::internal::gguf::is_gguf_name;
use qlora_wgpu::nn::Decoder;
use qlora_wgpu::quant::QuantOptions;
use regex::Regex;
use serde::Serialize;

use super::hub::HubId;
use super::output::{self, print_json};
use super::paths::exists;

/// Model and device options.
#[derive(Args, Debug)]
pub struct ModelArgs {
    /// A Hugging Face directory (config.json and safetensors), a .gguf file, or an id on the hub:
    /// org/name, org/name@revision, org/name/FILE.gguf.
    #[arg(long, value_name = "PATH|ID", value_hint = ValueHint::AnyPath)]
    model: PathBuf,
    /// cpu, gpu (any GPU driver), best, an index from `qlora devices`, or part of a name or
    /// backend.
    #[arg(long, default_value = "best")]
    device: String,
    /// How to store linear layers that aren't 4-bit in the file. Default: nf4 for training, as-is
    /// otherwise.
    #[arg(long, value_enum)]
    base_format: Option<Base>,
}

/// Model options, with optional adapters.
#[derive(Args, Debug)]
pub struct AdaptedArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// A PEFT adapter directory. Repeat as NAME=DIR to load several.
    #[arg(long, value_name = "[NAME=]DIR", value_hint = ValueHint::DirPath)]
    adapter: Vec<PathBuf>,
    /// The adapter to use if there are several; base: the model without one. May be repeated to
    /// use one after the other with the model loaded once.
    #[arg(long = "use", value_name = "NAME")]
    chosen: Vec<String>,
}

/// Name of an adapter given without one.
const UNNAMED: &str = "default";

/// Names in `--use` for the model without adapters, unless an adapter has that name.
const BASE: [&str; 2] = ["base", "none"];

#[derive(ValueEnum, Clone, Copy, Debug)]
pub(super) enum Base {
    /// Keep the format of the file.
    AsIs,
    /// NF4 with double-quantized scales.
    Nf4,
    /// NF4 with plain scales.
    Nf4Plain,
}

impl ModelArgs {
    /// Arguments for this model, with defaults for the rest.
    pub(super) fn of(model: PathBuf) -> ModelArgs {
        ModelArgs { model, device: "best".into(), base_format: None }
    }

    /// Opens the model; downloads it from the hub if needed.
    pub fn open(&self) -> Result<ModelFiles> {
        let id = self.model.to_str().and_then(HubId::parse);
        if let Some(id) = id.filter(|_| matches!(self.model.try_exists(), Ok(false))) {
            return ModelFiles::open(id.fetch()?);
        }
        exists(&self.model)?;
        if self.model.is_dir() {
            check_folder(&self.model)?;
        }
        ModelFiles::open(&self.model)
    }

    /// The model as given, a path or an id.
    pub fn name(&self) -> String {
        self.model.display().to_string()
    }

    /// Opens the selected device.
    pub fn device(&self) -> Result<Device> {
        Device::named(&self.device)
    }

    /// Storage of linear layers; `default` unless the user chose one.
    pub fn base(&self, default: Base) -> BaseFormat {
        match self.base_format.unwrap_or(default) {
            Base::AsIs => BaseFormat::AsIs,
            Base::Nf4 => BaseFormat::Quantize(QuantOptions::nf4().double_quant()),
            Base::Nf4Plain => BaseFormat::Quantize(QuantOptions::nf4()),
        }
    }

    /// The flag with which other commands get the same quantized base.
    pub fn base_flag(&self) -> &'static str {
        match self.base_format {
            Some(Base::Nf4Plain) => " --base-format nf4-plain",
            _ => " --base-format nf4",
        }
    }
}

impl AdaptedArgs {
    /// Names and directories of the adapters.
    pub fn adapters(&self) -> Vec<(&str, &Path)> {
        self.adapter.iter().map(|given| split_name(given)).collect()
    }

    /// Loads the model with its adapters, none of them active. Also returns which adapters to use,
    /// one after the other.
    pub fn load(&self, files: &ModelFiles) -> Result<(Decoder, Vec<Option<&str>>)> {
        // Checked first, because it is quick.
        let named = self.adapters();
        let chosen = choose(&named, &self.chosen)?;
        let read = |(name, path): (_, _)| Ok((name, path, read_adapter(path)?));
        let adapters = named.into_iter().map(read).collect::<Result<Vec<_>>>()?;
        let mut model = files.load(&self.model.device()?, &self.model.base(Base::AsIs))?;
        for (name, path, adapter) in &adapters {
            model.attach_peft(name, adapter).map_err(|error| misfit(path, adapter, error))?;
            warn_other_base(path, &adapter.config, &self.model.name());
        }
        model.deactivate()?;
        Ok((model, chosen))
    }
}

/// Activates an adapter of the model, or none.
pub(super) fn switch(model: &mut Decoder, adapter: Option<&str>) -> Result<()> {
    match adapter {
        Some(name) => model.activate(name),
        None => model.deactivate(),
    }
}

/// A result, with the name of the adapter if one was used.
#[derive(Serialize)]
pub(super) struct With<'a, T> {
    pub adapter: Option<&'a str>,
    #[serde(flatten)]
    pub result: T,
}

impl<'a, T> With<'a, T> {
    pub(super) fn new(adapter: Option<&'a str>, result: T) -> Self {
        With { adapter, result }
    }
}

/// Prints results as JSON: one alone, several as an array.
pub(super) fn print_all(results: &[With<'_, impl Serialize>]) -> Result<()> {
    match results {
        [one] => print_json(one),
        all => print_json(&all),
    }
}

/// Label for a result with this adapter, or without one.
pub(super) fn label(adapter: Option<&str>) -> &str {
    adapter.unwrap_or(BASE[0])
}

/// Splits `NAME=DIR` into name and directory, unless the whole is an existing directory.
fn split_name(given: &Path) -> (&str, &Path) {
    let split = given.to_str().and_then(|text| text.split_once('=')).filter(|(name, _)| !name.is_empty());
    match split {
        Some((name, path)) if !given.exists() => (name, Path::new(path)),
        _ => (UNNAMED, given),
    }
}

/// Resolves `--use` to names of loaded adapters; `None` is the base alone.
fn choose<'a>(given: &[(&'a str, &Path)], chosen: &'a [String]) -> Result<Vec<Option<&'a str>>> {
    const OP: &str = "adapters";
    let names: Vec<&str> = given.iter().map(|(name, _)| *name).collect();
    let twice = names.iter().enumerate().find(|(at, name)| names[..*at].contains(name));
    if let Some((_, name)) = twice {
        let expected = "give each a name of its own, as in --adapter NAME=DIR";
        return Err(Error::invalid(OP, "the name of two adapters", name, expected));
    }
    let one = |name: &'a String| match name.as_str() {
        name if names.contains(&name) => Ok(Some(name)),
        name if BASE.contains(&name) => Ok(None),
        name => {
            let loaded = if names.is_empty() { "none".into() } else { names.join(", ") };
            Err(Error::NoSuchAdapter { name: name.into(), loaded })
        }
    };
    match (chosen, names.as_slice()) {
        ([], []) => Ok(vec![None]),
        ([], [only]) => Ok(vec![Some(only)]),
        ([], _) => Err(Error::invalid(
            OP,
            "--use",
            "not given",
            format!("choose one of {}, or base for the model without one", names.join(", ")),
        )),
        (chosen, _) => chosen.iter().map(one).collect(),
    }
}

/// Checks that a folder can be a model's, before it is opened.
fn check_folder(path: &Path) -> Result<()> {
    if path.join("config.json").exists() {
        Ok(())
    } else if path.join(peft::CONFIG).exists() {
        let message = "is an adapter; pass it as --adapter, and its base as --model".into();
        Err(Error::File { path: path.into(), message })
    } else {
        Err(no_model(path, "it has no config.json"))
    }
}

pub(super) fn read_adapter(path: &Path) -> Result<PeftAdapter> {
    exists(path)?;
    if !path.join(peft::CONFIG).exists() {
        let message = format!("not a PEFT adapter directory: {} is missing", peft::CONFIG);
        return Err(Error::File { path: path.into(), message });
    }
    PeftAdapter::read(path)
}

/// Explains that an adapter doesn't fit the model, with its path and its base.
pub(super) fn misfit(path: &Path, adapter: &PeftAdapter, error: Error) -> Error {
    if !matches!(error, Error::Shape { .. } | Error::Invalid { .. }) {
        return error;
    }
    let base = match &adapter.config.base_model_name_or_path {
        Some(base) => format!("; its base is {base}; pass that as --model"),
        None => String::new(),
    };
    Error::File { path: path.into(), message: format!("does not fit the model ({error}){base}") }
}

/// Warns if the adapter's config names another base than `model`, a path or id as typed. Call it
/// only once the adapter fits, because [`misfit`] names the base too.
pub(super) fn warn_other_base(path: &Path, config: &PeftConfig, model: &str) {
    if let Some(base) = config.base_model_name_or_path.as_deref().filter(|base| !is_same_base(base, model)) {
        output::warning(format!("{}: was trained on {base}, not on {model}, judging by the names", path.display()));
    }
}

/// Whether two paths or ids may mean the same weights: the same path, or the same name, whoever
/// packed it and in whatever format.
fn is_same_base(one: &str, other: &str) -> bool {
    let canonical = |text: &str| Path::new(text).canonicalize().ok();
    one == other
        || canonical(one).is_some_and(|path| Some(path) == canonical(other))
        || base_name(one) == base_name(other)
}

/// The last part of a path or id, in lower case, without suffixes for formats.
fn base_name(text: &str) -> String {
    // Suffixes that packers append after a point, dash or underscore: llama.cpp's types,
    // bitsandbytes' bits, plain types.
    static FORMAT: LazyLock<Regex> = LazyLock::new(|| {
        let types = r"[it]?q\d\w*|(mx|n|b)?fp?(4|16|32)\w*|int[48]|[48]-?bit";
        let expression = format!(r"([-._](gguf|safetensors|bnb|unsloth|ud|{types}))+$");
        Regex::new(&expression).unwrap_or_else(|error| unreachable!("{error}"))
    });
    let name = match HubId::parse(text) {
        Some(id) => id.last().to_owned(),
        None => {
            let path = Path::new(text);
            // For `.` and the like, use the folder's real name.
            let path =
                if path.file_name().is_some() { path.into() } else { path.canonicalize().unwrap_or(path.into()) };
            path.file_name().unwrap_or_default().to_string_lossy().into_owned()
        }
    };
    FORMAT.replace(&name.to_lowercase(), "").into_owned()
}

/// Error for a directory without a model. Suggests a GGUF file in it, which may be what was meant.
pub(super) fn no_model(folder: &Path, why: &str) -> Error {
    let entries = folder.read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
    let hint = match entries.filter(|path| is_gguf_name(path)).min() {
        Some(path) => format!("; name a GGUF file in it, such as {}", path.display()),
        None => String::new(),
    };
    Error::File { path: folder.into(), message: format!("not a model directory: {why}{hint}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_has_the_name_before_the_first_equals_sign() {
        let folder = tempfile::tempdir().unwrap();
        let there = folder.path().join("x=y");
        std::fs::create_dir(&there).unwrap();
        let there = there.to_str().unwrap();
        for (given, wanted) in [
            ("some/dir", (UNNAMED, "some/dir")),
            ("a=some/dir", ("a", "some/dir")),
            ("a=b=c", ("a", "b=c")),
            ("=dir", (UNNAMED, "=dir")),
            (there, (UNNAMED, there)),
            (&format!("a={there}"), ("a", there)),
        ] {
            assert_eq!(split_name(Path::new(given)), (wanted.0, Path::new(wanted.1)), "{given}");
        }
    }

    #[test]
    fn the_adapter_to_use_is_the_only_one_or_named() {
        let given = |names: &[&'static str]| names.iter().map(|&name| (name, Path::new("dir"))).collect::<Vec<_>>();
        let chosen = |names: &[&'static str], chosen: &[&str]| {
            let chosen: Vec<String> = chosen.iter().map(|name| name.to_string()).collect();
            let found = choose(&given(names), &chosen).map_err(|error| error.to_string())?;
            Ok::<_, String>(found.into_iter().map(|name| name.map(str::to_owned)).collect::<Vec<_>>())
        };
        let name = |name: &str| Some(name.to_owned());
        assert_eq!(chosen(&[], &[]), Ok(vec![None]));
        assert_eq!(chosen(&["a"], &[]), Ok(vec![name("a")]));
        assert_eq!(chosen(&["a", "b"], &["b"]), Ok(vec![name("b")]));
        assert_eq!(chosen(&["a", "b"], &["b", "base", "a"]), Ok(vec![name("b"), None, name("a")]));
        assert_eq!(chosen(&["a"], &["none"]), Ok(vec![None]));
        assert_eq!(chosen(&["a", "base"], &["base"]), Ok(vec![name("base")]), "one that has the name");
        assert!(chosen(&["a", "b"], &[]).unwrap_err().contains("choose one of a, b, or base"));
        assert!(chosen(&["a", "b"], &["a", "c"]).unwrap_err().contains("loaded: a, b"));
        assert!(chosen(&[], &["c"]).unwrap_err().contains("loaded: none"));
        assert!(chosen(&["a", "b", "a"], &["b"]).unwrap_err().contains("the name of two adapters is a"));
    }

    #[test]
    fn bases_are_the_same_by_path_or_by_name_without_the_format() {
        let folder = tempfile::tempdir().unwrap();
        let (inside, folder) = (folder.path().join("x/.."), folder.path().display().to_string());
        std::fs::create_dir(format!("{folder}/x")).unwrap();
        for (one, other) in [
            ("llama", "llama"),
            (&folder, inside.to_str().unwrap()),
            ("org/SmolLM2-135M-Instruct", "/models/SmolLM2-135M-Instruct.Q4_1.gguf"),
            ("unsloth/qwen2.5-0.5b-instruct-unsloth-bnb-4bit", "Qwen/Qwen2.5-0.5B-Instruct"),
            ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B@v1.0"),
            ("Qwen/Qwen2.5-0.5B", "packer/Qwen2.5-0.5B-GGUF/qwen2.5-0.5b-iq4_xs.gguf"),
            ("a/b/tiny-llama/", "tiny-llama-bnb-nf4_dq"),
            ("x-BF16", "x.fp16.safetensors"),
        ] {
            assert!(is_same_base(one, other) && is_same_base(other, one), "{one} and {other}");
        }
        for (one, other) in [
            ("llama", "tiny-llama"),
            ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct"),
            ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B"),
            ("q4_0.gguf", "model.gguf"),
            (".", "/"),
        ] {
            assert!(!is_same_base(one, other) && !is_same_base(other, one), "{one} and {other}");
        }
    }
}
