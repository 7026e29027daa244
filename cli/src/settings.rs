//! Settings files: a command's flags in TOML, under the same names.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::{ArgAction, Command};
use qlora_wgpu::error::{Error, Result};
use qlora_wgpu::internal::is_hidden;
use qlora_wgpu::internal::read_small_text;
use toml::Value;

/// Maximum size of a settings file.
const MOST_BYTES: u64 = 1 << 20;

/// Mutually exclusive flags: one on the command line removes the others from the file.
const ALTERNATIVES: [&[&str]; 3] = [
    &["epochs", "max-steps"],
    &["eval-data", "eval-split"],
    &["init-adapter", "rank", "alpha", "dropout", "targets", "rslora", "dora"],
];

/// Inserts the flags of a settings file, if the arguments name one.
pub(super) fn insert(arguments: Vec<OsString>, command: impl FnOnce() -> clap::Command) -> Result<Vec<OsString>> {
    // Required flags may be in the file, so look only for its path and the command.
    let Some(path) = config_path(&arguments) else { return Ok(arguments) };
    let command = command();
    let named = |word: &OsString| command.find_subcommand(word.to_str()?);
    let found = arguments.iter().enumerate().skip(1).find_map(|(at, word)| Some((at, named(word)?)));
    let Some((at, command)) = found.filter(|(_, command)| ["finetune", "plan"].contains(&command.get_name())) else {
        return Ok(arguments);
    };
    let typed: Vec<String> = arguments.iter().filter_map(long_name).collect();
    let mut all = arguments;
    // Insert after the command's name.
    all.splice(at + 1..at + 1, read(&path, command, &typed)?);
    Ok(all)
}

/// Returns `name` for `--name` and `--name=value`.
fn long_name(argument: &OsString) -> Option<String> {
    let name = argument.to_str()?.strip_prefix("--")?;
    Some(name.split_once('=').map_or(name, |(name, _)| name).to_owned())
}

fn config_path(arguments: &[OsString]) -> Option<PathBuf> {
    arguments.iter().enumerate().find_map(|(at, argument)| match argument.to_str()? {
        "--config" => arguments.get(at + 1).map(PathBuf::from),
        other => other.strip_prefix("--config=").map(PathBuf::from),
    })
}

/// Reads the file at `path` as arguments for `command`, to be put before the typed ones, which
/// override them. `typed` has the names of the typed flags.
///
/// # Errors
/// [`Error::Io`]; [`Error::File`] for malformed TOML, a key that isn't a flag of the command, or a
/// value that no flag can have.
fn read(path: &Path, command: &Command, typed: &[String]) -> Result<Vec<OsString>> {
    let file_error = |message: String| Error::File { path: path.into(), message };
    let text = read_small_text(path, MOST_BYTES)?;
    let malformed = |error: toml::de::Error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        file_error(format!("line {}: {}", before.matches('\n').count() + 1, error.message()))
    };
    let table: BTreeMap<String, Value> = toml::from_str(&text).map_err(malformed)?;
    let mut arguments = Vec::new();
    for (key, value) in table {
        let name = key.replace('_', "-");
        let flag = command.get_arguments().find(|flag| flag.get_long() == Some(&name) && name != "config");
        let flag = flag.ok_or_else(|| file_error(format!("`{key}` isn't an option of {}", command.get_name())))?;
        let replaced = |group: &&&[&str]| {
            group.contains(&name.as_str())
                && typed.iter().any(|typed| *typed != name && group.contains(&typed.as_str()))
        };
        if typed.contains(&name) || ALTERNATIVES.iter().any(|group| replaced(&group)) {
            continue;
        }
        let text = |value: &Value| match value {
            // clap would print hidden characters unescaped.
            Value::String(text) if text.contains(is_hidden) => {
                Err(file_error(format!("`{key}` has invisible characters: {text}")))
            }
            Value::String(text) => Ok(text.clone()),
            Value::Integer(number) => Ok(number.to_string()),
            Value::Float(number) => Ok(number.to_string()),
            other => Err(file_error(format!("`{key}` can't have a value of type {}", other.type_str()))),
        };
        match (value, flag.get_action()) {
            (Value::Boolean(true), ArgAction::SetTrue) => arguments.push(format!("--{name}").into()),
            (Value::Boolean(false), ArgAction::SetTrue) => {}
            (_, ArgAction::SetTrue) => return Err(file_error(format!("`{key}` must be true or false"))),
            (Value::Array(values), _) => {
                let values = values.iter().map(text).collect::<Result<Vec<_>>>()?;
                arguments.push(format!("--{name}={}", values.join(",")).into());
            }
            (value, _) => arguments.push(format!("--{name}={}", text(&value)?).into()),
        }
    }
    Ok(arguments)
}

#[cfg(test)]
mod tests {
    use clap::{Args, Command};

    use super::*;
    use crate::commands::finetune::FinetuneArgs;

    fn of(text: &str, typed: &[&str]) -> Result<Vec<String>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.toml");
        std::fs::write(&path, text).unwrap();
        let command = FinetuneArgs::augment_args(Command::new("finetune"));
        let typed: Vec<String> = typed.iter().map(|&name| name.to_owned()).collect();
        Ok(read(&path, &command, &typed)?.into_iter().map(|a| a.into_string().unwrap()).collect())
    }

    #[test]
    fn values_become_flags_in_either_spelling() {
        let text = "lr = 1e-3\nmax_steps = 5\ntargets = [\"q_proj\", \"v_proj\"]\nno-packing = true\ndora = false\n";
        let wanted = ["--lr=0.001", "--max-steps=5", "--no-packing", "--targets=q_proj,v_proj"];
        assert_eq!(of(text, &[]).unwrap(), wanted);
    }

    #[test]
    fn what_was_typed_wins_over_the_file_and_its_alternatives() {
        let text = "epochs = 3\nrank = 8\nlr = 1\n";
        assert_eq!(of(text, &["max-steps", "lr"]).unwrap(), ["--rank=8"]);
        assert_eq!(of(text, &["init-adapter"]).unwrap(), ["--epochs=3", "--lr=1"]);
    }

    #[test]
    fn what_is_no_setting_is_named() {
        let error = |text| of(text, &[]).unwrap_err().to_string();
        assert!(error("learning = 1").contains("`learning` isn't an option of finetune"));
        assert!(error("dora = 1").contains("true or false"));
        assert!(error("lr = true").contains("`lr`"));
        let malformed = error("# a comment\nlr 1");
        assert!(malformed.contains("x.toml: line 2: ") && !malformed.contains(r"\n"), "{malformed}");
        assert!(error("config = \"y.toml\"").contains("`config`"));
        assert!(error(r#"lr = "\u001b[31m""#).contains(r"`lr` has invisible characters: \u{1b}[31m"));
    }
}
