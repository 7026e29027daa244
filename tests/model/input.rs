//! Model files as users have them: heads that are copies, parts of a split model, and files that
//! aren't what their name says.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use crate::common::model::{path, with_tokenizer};
use qlora_wgpu::export::{DirectoryOptions, Merged};
use qlora_wgpu::formats::checkpoint::{BaseFormat, Checkpoint};
use qlora_wgpu::formats::peft::PeftAdapter;
use qlora_wgpu::internal::gguf::{self, GgufFile, Metadata, OutTensor as GgufTensor, OutValue, TensorType as GgufType};
use qlora_wgpu::internal::safetensors::{OutData, OutTensor, SafetensorsFile, write};
use qlora_wgpu::nn::{ModelConfig, Tokens};
use qlora_wgpu::quant::Dtype;
use qlora_wgpu::{Device, ModelFiles};
use serde_json::{Value, json};
use tempfile::TempDir;

const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// The recorded llama with a config that says that the head is the embedding. `change` makes the
/// head from the embedding's values.
fn tied(change: Option<fn(&mut [f32])>) -> TempDir {
    let folder = with_tokenizer("llama");
    let config = folder.path().join("config.json");
    let mut json: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    json["tie_word_embeddings"] = json!(true);
    fs::write(&config, json.to_string()).unwrap();

    let weights = folder.path().join("model.safetensors");
    let file = SafetensorsFile::open(path("llama").join("model.safetensors")).unwrap();
    let mut tensors = Vec::new();
    for name in file.names().iter().filter(|name| *name != HEAD) {
        let tensor = file.tensor(name).unwrap();
        let data = OutData::Bytes(tensor.bytes.into());
        tensors.push(OutTensor { name: name.clone(), dtype: tensor.dtype, shape: tensor.shape.into(), data });
    }
    if let Some(change) = change {
        let embedding = file.tensor(EMBEDDING).unwrap();
        let mut values = embedding.f32s().unwrap().into_owned();
        change(&mut values);
        let data = OutData::Bytes(bytemuck::cast_slice(&values).to_vec().into());
        tensors.push(OutTensor { name: HEAD.into(), dtype: embedding.dtype, shape: embedding.shape.into(), data });
    }
    fs::remove_file(&weights).unwrap();
    write(&weights, tensors, BTreeMap::new()).unwrap();
    folder
}

fn logits(model: &Path) -> Vec<f32> {
    let model = ModelFiles::open(model).unwrap().load(&Device::cpu(), &BaseFormat::AsIs).unwrap();
    let batch = model.batch(&Tokens::new(vec![1, 2, 3, 4], 1).unwrap(), None).unwrap();
    model.logits(&batch).unwrap().to_vec().unwrap()
}

fn is_tied(model: &Path) -> bool {
    ModelFiles::open(model).unwrap().spec(&BaseFormat::AsIs).unwrap().config().tie_word_embeddings
}

#[test]
fn a_head_beside_a_tied_embedding_is_a_copy_or_used() {
    let (plain, copy, other) = (tied(None), tied(Some(|_| {})), tied(Some(|values| values[5] += 1.0)));
    let wanted = logits(plain.path());
    assert_eq!(logits(copy.path()), wanted);
    assert_ne!(logits(other.path()), wanted);
    assert_eq!([&plain, &copy, &other].map(|folder| is_tied(folder.path())), [true, true, false]);

    // Merging keeps the kind of head.
    let adapter = PeftAdapter::read(path("adapter-lora")).unwrap();
    for (folder, has_head) in [(&copy, false), (&other, true)] {
        let files = ModelFiles::open(folder.path()).unwrap();
        let merged = Merged::new(&files, &adapter).unwrap();
        let output = folder.path().join("merged");
        let watch = |_: qlora_wgpu::export::Progress<'_>| ControlFlow::Continue(());
        merged.write_directory(&output, &DirectoryOptions::new(Dtype::F32), &watch).unwrap();
        assert_eq!(ModelConfig::read(&output).unwrap().tie_word_embeddings, !has_head);
        assert_eq!(Checkpoint::open(&output).unwrap().names().any(|name| name == HEAD), has_head);
        assert_eq!(is_tied(&output), !has_head);
        logits(&output);
    }
}

/// Writes a GGUF file to `path` with these keys and a vector of each name.
fn part(path: &Path, keys: &[(&str, u32)], names: &[&str]) {
    let mut metadata = Metadata::default();
    keys.iter().for_each(|(key, value)| metadata.set(*key, OutValue::U32(*value)));
    let tensor = |name: &&str| {
        let bytes = bytemuck::cast_slice(&[name.len() as f32, 2.0]).to_vec();
        GgufTensor {
            name: name.to_string(),
            kind: GgufType::F32,
            shape: vec![2],
            data: Box::new(move || Ok(bytes.clone().into())),
        }
    };
    gguf::write(path, &metadata, &names.iter().map(tensor).collect::<Vec<_>>()).unwrap();
}

#[test]
fn a_split_gguf_file_is_read_from_its_first_part() {
    let folder = tempfile::tempdir().unwrap();
    let name = |number: usize| folder.path().join(format!("m-{number:05}-of-00003.gguf"));
    let keys = |number: u32| [("split.no", number), ("split.count", 3), ("split.tensors.count", 4), ("n", 7 + number)];
    part(&name(1), &keys(0), &["a", "bb"]);
    part(&name(2), &keys(1), &["cc"]);
    let error = |path: PathBuf| GgufFile::open(path).unwrap_err().to_string();
    let missing = error(name(1));
    assert!(missing.contains("m-00003-of-00003.gguf") && missing.contains("part 3 of 3"), "{missing}");
    part(&name(3), &keys(2), &["dddd"]);

    let file = GgufFile::open(name(1)).unwrap();
    assert_eq!((file.names_in_order(), file.path()), (vec!["a", "bb", "cc", "dddd"], &*name(1)));
    let values = |name| file.vector(name, 2, gguf::RowOrder::Plain).unwrap();
    assert_eq!((values("cc"), values("dddd")), (vec![2.0, 2.0], vec![4.0, 2.0]));
    assert_eq!(file.require::<u32>("n").unwrap(), 7, "metadata are the first's");
    let wrong = file.matrix("cc", 1, 2, gguf::RowOrder::Plain, &BaseFormat::AsIs).unwrap_err().to_string();
    let sentence = "m-00002-of-00003.gguf: tensor \"cc\": has shape [2], expected [1, 2]";
    assert!(wrong.ends_with(sentence), "{wrong}");

    let second = error(name(2));
    assert!(
        second.contains("is part 2 of 3") && second.contains("give the first, ") && second.contains("m-00001-of"),
        "{second}"
    );
    fs::rename(name(1), folder.path().join("renamed.gguf")).unwrap();
    let renamed = error(folder.path().join("renamed.gguf"));
    assert!(renamed.contains("must end in -00001-of-00003.gguf"), "{renamed}");
    part(&name(1), &keys(0), &["a", "cc"]);
    assert!(error(name(1)).contains("\"cc\": is in"));
    part(&name(1), &keys(0), &["a"]);
    assert!(error(name(1)).contains("`split.tensors.count`: is 4, but the model's files have 3"));
    part(&name(2), &keys(0), &["bb", "cc"]);
    assert!(error(name(1)).contains("m-00002-of-00003.gguf: is not part 2 of 3"));
}

/// Opens the file as both kinds of model and returns the errors.
fn open_errors(path: &Path) -> [String; 2] {
    [SafetensorsFile::open(path).unwrap_err().to_string(), GgufFile::open(path).unwrap_err().to_string()]
}

#[test]
fn pointers_of_git_lfs_are_named() {
    let folder = with_tokenizer("llama");
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 14693368\n";
    for name in ["model.safetensors", "tokenizer.json", "config.json"] {
        let path = folder.path().join(name);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, pointer).unwrap();
        let loaded =
            ModelFiles::open(folder.path()).and_then(|files| files.load(&Device::cpu(), &BaseFormat::AsIs)).map(drop);
        let read = qlora_wgpu::text::Tokenizer::from_dir(folder.path()).map(drop);
        let error = loaded.and(read).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("git lfs pull"), "{error}");
        fs::write(&path, whole).unwrap();
    }
    let path = folder.path().join("x.gguf");
    fs::write(&path, pointer).unwrap();
    assert!(open_errors(&path).iter().all(|error| error.contains("git lfs pull")));
}

#[cfg(unix)]
#[test]
fn what_is_no_regular_file_is_not_opened() {
    let folder = tempfile::tempdir().unwrap();
    let zero = folder.path().join("model.safetensors");
    std::os::unix::fs::symlink("/dev/zero", &zero).unwrap();
    assert!(open_errors(&zero).iter().all(|error| error.contains("not a regular file")));
    assert!(
        Checkpoint::open(folder.path()).unwrap_err().to_string().contains("model.safetensors: is not a regular file")
    );
    let fifo = folder.path().join("x.gguf");
    if std::process::Command::new("mkfifo").arg(&fifo).status().is_ok_and(|status| status.success()) {
        assert!(open_errors(&fifo).iter().all(|error| error.contains("not a regular file")));
    }
    assert!(open_errors(folder.path()).iter().all(|error| error.contains("is a directory")));
}

#[test]
fn a_file_that_is_cut_short_while_it_is_open_is_an_error() {
    let cut = |path: &Path| OpenOptions::new().write(true).open(path).unwrap().set_len(100).unwrap();
    let folder = with_tokenizer("llama");
    let weights = folder.path().join("model.safetensors");
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    checkpoint.vector("model.norm.weight", 64).unwrap();
    cut(&weights);
    let error = checkpoint.vector("model.norm.weight", 64).unwrap_err().to_string();
    assert!(error.contains("model.safetensors: was truncated while in use"), "{error}");

    let path = folder.path().join("x.gguf");
    part(&path, &[("n", 7)], &["a"]);
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.require::<u32>("n").unwrap(), 7);
    cut(&path);
    for error in [file.require::<u32>("n").unwrap_err(), file.tensor("a").unwrap_err()] {
        assert!(error.to_string().contains("was truncated"), "{error}");
    }
}

#[test]
fn a_header_of_many_tensors_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let entry = |i: usize| format!(r#""{i}":{{"dtype":"U8","shape":[],"data_offsets":[{i},{}]}}"#, i + 1);
    let count = 50_000;
    let header = format!("{{{}}}", (0..count).map(entry).collect::<Vec<_>>().join(","));
    let data = vec![7; count];
    fs::write(&path, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()).unwrap();
    let file = SafetensorsFile::open(&path).unwrap();
    assert_eq!((file.names().len(), file.tensor("49999").unwrap().bytes), (count, &[7][..]));
}
