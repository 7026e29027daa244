//! Where `qlora` writes: to devices, to pipes and through links, never over its inputs. Errors are
//! one line, without anything that a terminal would act on.
#![cfg(unix)]

use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::common::model::{path, with_tokenizer};
use serde_json::json;
use tempfile::TempDir;

fn qlora(line: &str) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin("qlora"));
    for variable in
        ["QLORA_DEVICE", "QLORA_TIER", "QLORA_TUNE", "QLORA_CHECK", "QLORA_LOG", "NO_COLOR", "CLICOLOR_FORCE"]
    {
        command.env_remove(variable);
    }
    command.args(shlex::split(line).unwrap()).stdin(Stdio::null());
    command
}

fn run(line: &str) -> Output {
    qlora(line).output().unwrap()
}

fn ok(line: &str) -> String {
    let output = run(line);
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The one line on stderr of a run that fails.
fn error(line: &str) -> String {
    let output = run(line);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{line}: {text}");
    let text: Vec<_> = text.lines().filter(|line| !line.contains("XDG_RUNTIME_DIR")).collect();
    assert!(text.len() == 1 && text[0].starts_with("error: "), "{line}: {text:?}");
    assert!(!text[0].contains(|c: char| c.is_control()), "{line}: {text:?}");
    text[0].to_owned()
}

/// A model with its tokenizer, and a text for it.
fn model() -> TempDir {
    let folder = with_tokenizer("llama");
    fs::write(folder.path().join("data.txt"), "w1 w2 w3 w4 w5 w6 w7").unwrap();
    folder
}

#[test]
fn devices_pipes_and_links_are_written_to_and_stay() {
    let folder = model();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let input = at("model.safetensors");
    let quantize = |output: &str, flags: &str| format!("quantize {input} {output} {flags}");
    ok(&quantize(&at("plain"), ""));
    let plain = fs::read(at("plain")).unwrap();

    ok(&quantize("/dev/null", ""));
    assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());

    symlink("target", at("link")).unwrap();
    ok(&quantize(&at("link"), ""));
    assert!(error(&quantize(&at("link"), "")).contains("--force"));
    ok(&quantize(&at("link"), "--force"));
    assert!(Path::new(&at("link")).is_symlink() && fs::read(at("target")).unwrap() == plain);

    assert!(Command::new("mkfifo").arg(at("pipe")).status().unwrap().success());
    let reader = std::thread::spawn({
        let pipe = at("pipe");
        move || fs::read(pipe).unwrap()
    });
    ok(&quantize(&at("pipe"), ""));
    assert!(reader.join().unwrap() == plain && fs::metadata(at("pipe")).unwrap().file_type().is_fifo());

    // Stdout gets the file alone, be it a pipe or a file with contents.
    let piped = run(&quantize("/dev/stdout", "--json"));
    assert!(piped.status.success() && piped.stdout == plain, "{}", String::from_utf8_lossy(&piped.stderr));
    assert!(String::from_utf8_lossy(&piped.stderr).contains("bits_per_weight"));
    fs::write(at("log"), "before\n").unwrap();
    let log = File::options().append(true).open(at("log")).unwrap();
    let status = qlora(&quantize("/dev/stdout", "-q")).stdout(log).status().unwrap();
    assert!(status.success());
    assert!(fs::read(at("log")).unwrap() == [b"before\n", &plain[..]].concat());

    let plot = format!("bench --device cpu --m 1 --n 32 --k 32 --output /dev/null --plot {}", at("p.svg"));
    symlink("plot.svg", at("p.svg")).unwrap();
    ok(&plot);
    assert!(Path::new(&at("p.svg")).is_symlink() && fs::metadata(at("plot.svg")).unwrap().is_file());
}

#[test]
fn no_output_is_an_input() {
    let folder = model();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let (model, input, data) = (folder.path().display(), at("model.safetensors"), at("data.txt"));
    let adapter = path("adapter-lora").display().to_string();
    let elsewhere = tempfile::tempdir().unwrap();
    let out = |name: &str| elsewhere.path().join(name).display().to_string();
    symlink(&input, out("link")).unwrap();
    fs::hard_link(&input, out("hard.gguf")).unwrap();
    fs::hard_link(&data, out("hard")).unwrap();
    fs::create_dir(out("merged")).unwrap();
    symlink(&input, out("merged/model.safetensors")).unwrap();
    fs::create_dir(out("run")).unwrap();
    symlink(&data, out("run/loss.svg")).unwrap();
    let before = [&input, &data, &at("config.json")].map(|file| fs::read(file).unwrap());

    let eval = format!("eval --model {model} --device cpu --data {data} --dump-logits");
    let merge = format!("merge --model {model} --adapter {adapter} --force --output");
    let finetune = format!("finetune --model {model} --device cpu --data {data} --output");
    for (line, what) in [
        (format!("{eval} {data}"), "is the data too"),
        (format!("{eval} {}", out("hard")), "is the data too"),
        (format!("{eval} {input}"), "is a file of the model too"),
        (format!("{eval} {}", out("link")), "is a file of the model too"),
        (format!("{eval} {adapter}/adapter_config.json --adapter {adapter}"), "is a file of an adapter too"),
        (format!("quantize {input} {} --force", out("link")), "is the input too"),
        (format!("quantize {input} {} --force", out("hard.gguf")), "is the input too"),
        (format!("dequantize {input} {input}"), "is the input too"),
        (format!("{merge} {model}"), "is the model too"),
        (format!("{merge} {adapter}"), "is the adapter too"),
        (format!("{merge} {}", out("hard.gguf")), "is a file of the model too"),
        (format!("{merge} {}", out("merged")), "merged/model.safetensors: is a file of the model too"),
        (
            format!("export --model {model} --adapter {adapter} --force --output {}", out("hard.gguf")),
            "is a file of the model too",
        ),
        (format!("{finetune} {model}"), "is the model too"),
        (format!("{finetune} {}", out("run")), "run/loss.svg: is the data too"),
        (
            format!("bench --device cpu --m 1 --n 32 --k 32 --output {0} --plot {0}", out("new.svg")),
            "new.svg: is --output too",
        ),
    ] {
        let text = error(&line);
        assert!(text.contains(what) && text.contains("choose another output"), "{line}: {text}");
    }
    assert!(before == [&input, &data, &at("config.json")].map(|file| fs::read(file).unwrap()));
    assert!(!elsewhere.path().join("new.svg").exists());
}

#[test]
fn what_files_say_reaches_no_terminal_as_it_is() {
    const BAD: &str = "x\x1b[2J\r\n\u{9b}31m\u{202e}";
    let shown = r"x\u{1b}[2J\r\n\u{9b}31m\u{202e}";
    let folder = model();
    let model = folder.path().display();
    let clean = |text: &str| !text.contains(|c: char| c.is_control() && c != '\n' || c == '\u{202e}');

    let name = |bad: &str| {
        let config = folder.path().join("config.json");
        let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
        json["_name_or_path"] = bad.into();
        fs::write(&config, json.to_string()).unwrap();
    };
    name(BAD);
    let text = ok(&format!("inspect {model}"));
    assert!(text.lines().any(|line| line == format!("name          {shown}")) && clean(&text), "{text}");
    // JSON has the same value, in harmless characters.
    let text = ok(&format!("inspect {model} --json"));
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(value["name"] == BAD && clean(&text), "{text}");
    name("plain");

    // Tensor names, in tables and errors.
    let header = json!({BAD: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).to_string();
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 4]].concat();
    let file = folder.path().join("bad.safetensors");
    fs::write(&file, bytes).unwrap();
    let text = ok(&format!("inspect {}", file.display()));
    assert!(text.contains(shown) && clean(&text), "{text}");

    // Warnings: the base's name in an adapter's config, also with -v.
    let adapter = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(path("adapter-lora")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), adapter.path().join(entry.file_name())).unwrap();
    }
    let config = adapter.path().join("adapter_config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    json["base_model_name_or_path"] = BAD.into();
    fs::write(&config, json.to_string()).unwrap();
    let line =
        format!("eval --model {model} --device cpu --data {model}/data.txt --adapter {} -v", adapter.path().display());
    let output = run(&line);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && text.contains(&format!("was trained on {shown}, ")) && clean(&text), "{text}");

    // A template's own error.
    let template = "{{ raise_exception(\"no\x1b[31m\nway\") }}";
    fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    let text = error(&format!("generate --model {model} --device cpu --chat --prompt w1"));
    assert!(text.contains(r"no\u{1b}[31m\nway"), "{text}");
}

#[test]
fn wrong_words_are_answered_with_right_ones() {
    let folder = model();
    let model = folder.path().display();
    let text = error("bench --device gpuu");
    assert!(text.contains("Did you mean gpu?") && text.contains("0 cpu") && text.contains("qlora devices"), "{text}");
    for (variable, value, wanted) in [
        ("QLORA_TUNE", "maybe", "QLORA_TUNE is maybe; it must be 0"),
        ("QLORA_CHECK", "no", "QLORA_CHECK is no; it must be 0"),
        ("QLORA_TIER", "fast", "QLORA_TIER is fast; it must be one of software, plain"),
        ("QLORA_LOG", "qlora_wgpu=loud", "QLORA_LOG is qlora_wgpu=loud"),
        ("QLORA_DEVICE", "gpuu", "QLORA_DEVICE=\"gpuu\""),
    ] {
        let output = qlora("bench --m 1 --n 32 --k 32").env(variable, value).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && text.contains(wanted), "{variable}: {text}");
    }
    for command in ["quantize", "dequantize"] {
        let text = error(&format!("{command} {model} {model}/out"));
        assert!(text.contains("is a directory; give the file in it") && text.contains("model.safetensors"), "{text}");
    }
    // A text may begin with a dash.
    for prompt in ["-5", "-w1 w2", "--", "--w1"] {
        ok(&format!("generate --model {model} --device cpu --max-tokens 1 --prompt '{prompt}' --stop -x"));
    }
}

#[test]
fn help_says_what_must_be_given() {
    for (command, flags) in [
        ("finetune", &["--model", "--data", "--output"][..]),
        ("plan", &["--model"]),
        ("eval", &["--model", "--data"]),
        ("generate", &["--model", "--prompt"]),
        ("merge", &["--model", "--adapter", "--output"]),
    ] {
        for help in ["--help", "-h"] {
            let text = ok(&format!("{command} {help}"));
            assert_eq!(text.matches("[required").count(), flags.len(), "{command}: {text}");
            for flag in flags {
                let (_, after) = text.split_once(&format!("  {flag} <")).unwrap_or_else(|| panic!("{flag}: {text}"));
                let end = after.find("\n      --").unwrap_or(after.len());
                assert!(after[..end].contains("[required"), "{command} {flag}: {text}");
            }
        }
    }
}

#[test]
fn a_command_that_is_shown_can_be_typed() {
    let folder = model();
    let spaced = folder.path().join("a model's folder");
    fs::create_dir(&spaced).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(folder.path().join(name), spaced.join(name)).unwrap();
    }
    let (model, output) = (spaced.display().to_string(), folder.path().join("my run").display().to_string());
    let quote = |text: &str| shlex::try_quote(text).unwrap().into_owned();
    let flags = "--device cpu --max-steps 1 --rank 2 --batch-size 1";
    let data = folder.path().join("data.txt").display().to_string();
    let line = format!("finetune --model {} --data {data} --output {} {flags}", quote(&model), quote(&output));
    let text = ok(&line);
    let next = text.lines().find_map(|line| line.strip_prefix("next: qlora ")).unwrap_or_else(|| panic!("{text}"));
    ok(&next.replace("TEXT", "w1"));
}

#[test]
fn what_a_model_has_beside_its_weights_comes_along_or_is_named() {
    let folder = tempfile::tempdir().unwrap();
    // A snapshot of links to blobs, as in the hub's cache.
    let repository = folder.path().join("models--org--name");
    let (blobs, snapshot) = (repository.join("blobs"), repository.join("snapshots/abc"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(snapshot.join("additional_chat_templates")).unwrap();
    let source = model();
    let put = |name: &str, text: &[u8]| {
        let blob = blobs.join(name.replace('/', "-"));
        fs::write(&blob, text).unwrap();
        symlink(&blob, snapshot.join(name)).unwrap();
    };
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        put(name, &fs::read(source.path().join(name)).unwrap());
    }
    let texts = [
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "generation_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "preprocessor_config.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "qwen.tiktoken",
        "LICENSE",
    ];
    texts.iter().for_each(|name| put(name, b"{}"));
    put("README.md", b"# A model");
    let adapter = path("adapter-lora");
    let merge = |output: &str| {
        let output = folder.path().join(output);
        let run = run(&format!(
            "merge --model {} --adapter {} --output {}",
            snapshot.display(),
            adapter.display(),
            output.display()
        ));
        let text = String::from_utf8(run.stderr).unwrap();
        assert!(run.status.success(), "{text}");
        for name in texts {
            assert_eq!(fs::read(output.join(name)).unwrap(), b"{}", "{name}");
            assert!(!output.join(name).is_symlink());
        }
        assert!(!output.join("README.md").exists() && text.contains("not copied: README.md"), "{text}");
        text
    };
    let text = merge("one");
    assert!(!text.contains("leads out of"), "{text}");

    let secret = folder.path().join("secret");
    fs::write(&secret, "s").unwrap();
    symlink(&secret, snapshot.join("notes.txt")).unwrap();
    symlink("/dev/zero", snapshot.join("zero.json")).unwrap();
    let text = merge("two");
    assert!(text.contains("warning: notes.txt leads out of the model's folder") && text.contains("secret"), "{text}");
    assert!(text.contains("not copied: README.md, zero.json"), "{text}");
    assert_eq!(fs::read(folder.path().join("two/notes.txt")).unwrap(), b"s");
}

#[test]
fn a_model_that_is_broken_has_no_loss() {
    let folder = model();
    let file = folder.path().join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    // All values are NaN, whatever the type: all bits set is a NaN in f32, f16 and bf16.
    bytes[8 + header..].fill(0xff);
    fs::write(&file, bytes).unwrap();
    let model = folder.path().display();
    for json in ["", " --json"] {
        let text = error(&format!("eval --model {model} --device cpu --data {model}/data.txt{json}"));
        assert!(text.contains("the loss is NaN") && text.contains("weights") && !text.contains("data.txt"), "{text}");
    }
}
