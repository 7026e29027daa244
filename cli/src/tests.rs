//! The examples of the help and of the documents parse, and docs/cli.md is what the help says.

use std::path::{Path, PathBuf};

use super::*;

/// The repository.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Parses a line of a shell as the program does: flags from the settings file (here
/// `settings`) come before typed ones.
fn parse(line: &str, settings: &str) {
    let words = shlex::split(line).unwrap_or_else(|| panic!("quotes in: {line}"));
    let words = words.into_iter().take_while(|word| ![">", "|"].contains(&word.as_str()));
    let words = words.map(|word| if word == "run.toml" { settings.into() } else { word.into() }).collect();
    let arguments = settings::insert(words, Cli::command).unwrap_or_else(|error| panic!("{line}: {error}"));
    Cli::try_parse_from(arguments).unwrap_or_else(|error| panic!("{line}: {error}"));
}

#[test]
fn every_command_has_examples_and_they_parse_as_those_of_the_documents_do() {
    Cli::command().debug_assert();
    let folder = tempfile::tempdir().unwrap();
    let settings = folder.path().join("run.toml").display().to_string();
    std::fs::write(&settings, "model = 'model.gguf'\ndata = 'train.jsonl'\noutput = 'run'\n").unwrap();
    let mut cli = Cli::command();
    let all: Vec<clap::Command> = cli.get_subcommands().cloned().chain([cli.clone()]).collect();
    for mut command in all {
        let name = command.get_name().to_owned();
        assert!(command.render_long_help().to_string().contains("Examples:\n"), "{name}");
        let text = command.get_after_help().unwrap_or_else(|| panic!("{name}: no examples")).to_string();
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| line.starts_with("qlora ")).collect();
        assert!((1..=3).contains(&lines.len()), "{name}: {lines:?}");
        assert!(name == "qlora" || lines.iter().all(|line| line.split(' ').nth(1) == Some(&name)), "{lines:?}");
        lines.iter().for_each(|line| parse(line, &settings));
    }
    let root = root();
    let docs = std::fs::read_dir(root.join("docs")).unwrap().map(|file| file.unwrap().path());
    let pages = docs.chain(["README.md", "CONTRIBUTING.md"].map(|name| root.join(name)));
    let pages = pages.filter(|path| path.extension().is_some_and(|ending| ending == "md"));
    let text: String = pages.map(|path| std::fs::read_to_string(path).unwrap()).collect();
    let mut named = std::collections::BTreeSet::new();
    for line in text.lines().filter(|line| line.starts_with("qlora ")) {
        parse(line, &settings);
        named.extend(line.split(' ').nth(1));
    }
    for command in cli.get_subcommands_mut() {
        assert!(named.contains(command.get_name()), "the documents show no {}", command.get_name());
    }
}

/// Makes code blocks of the indented lines below "Examples:" and "Environment:", which Markdown
/// would run together.
fn fence(page: &str) -> String {
    let mut fenced = String::new();
    let mut lines = page.lines().peekable();
    while let Some(line) = lines.next() {
        fenced += &format!("{line}\n");
        if !["Examples:", "Environment:"].contains(&line) {
            continue;
        }
        fenced += if line == "Examples:" { "\n```sh\n" } else { "\n```text\n" };
        while let Some(code) = lines.next_if(|line| line.starts_with("  ")) {
            fenced += &format!("{}\n", code.trim_start());
        }
        fenced += "```\n";
    }
    fenced.trim_end().to_owned() + "\n"
}

/// `QLORA_UPDATE_DOCS=1 cargo test --bin qlora docs_cli` writes the page.
#[test]
fn docs_cli_is_what_the_help_says() {
    let path = root().join("docs/cli.md");
    let options = clap_markdown::MarkdownOptions::new().title("The command".into()).show_footer(false);
    let page = fence(&clap_markdown::help_markdown_command_custom(&command(), &options));
    if std::env::var_os("QLORA_UPDATE_DOCS").is_some_and(|value| value == "1") {
        std::fs::write(&path, &page).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    let line = |text: &str, at: usize| text.lines().nth(at).map(str::to_owned);
    let first = (0..page.lines().count().max(kept.lines().count())).find(|&at| line(&page, at) != line(&kept, at));
    if let Some(at) = first {
        let (got, wanted) = (line(&kept, at), line(&page, at));
        panic!("line {} of docs/cli.md is {got:?}, the help says {wanted:?}; QLORA_UPDATE_DOCS=1 writes it", at + 1);
    }
}
