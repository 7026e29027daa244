//! Files with bytes changed, cut off or inserted: readers return an error or the changed contents,
//! and never panic. `make fuzz` looks for more.

#[path = "common/readers.rs"]
mod readers;

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use qlora_wgpu::Result;

type Read = fn(&[u8]) -> Result<()>;

/// Seed files for fuzzing.
fn seeds(kind: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(kind);
    let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(!paths.is_empty(), "fuzz/seeds/{kind} has files");
    paths.sort();
    paths.into_iter().map(|path| fs::read(path).unwrap()).collect()
}

/// One damage, at a place given as a fraction of the file's length.
#[derive(Clone, Debug)]
enum Damage {
    Flip { at: f64, bits: u8 },
    Fill { at: f64, len: usize, byte: u8 },
    Cut { at: f64 },
    Insert { at: f64, bytes: Vec<u8> },
    Remove { at: f64, len: usize },
}

impl Damage {
    fn apply(&self, bytes: &mut Vec<u8>) {
        let place = |at: &f64| (at * bytes.len() as f64) as usize;
        let to = |start: usize, len: &usize| bytes.len().min(start + len);
        match self {
            Damage::Flip { at, bits } => {
                let at = place(at);
                bytes[at..].iter_mut().take(1).for_each(|byte| *byte ^= bits);
            }
            Damage::Fill { at, len, byte } => {
                let (start, end) = (place(at), to(place(at), len));
                bytes[start..end].fill(*byte);
            }
            Damage::Cut { at } => bytes.truncate(place(at)),
            Damage::Insert { at, bytes: more } => {
                let at = place(at);
                drop(bytes.splice(at..at, more.iter().copied()));
            }
            Damage::Remove { at, len } => {
                let (start, end) = (place(at), to(place(at), len));
                drop(bytes.drain(start..end));
            }
        }
    }
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = 0.0..1.0_f64;
    prop_oneof![
        6 => (at.clone(), 1_u8..).prop_map(|(at, bits)| Damage::Flip { at, bits }),
        3 => (at.clone(), 1_usize..9, prop_oneof![Just(0), Just(0x7f), Just(0x80), Just(0xff)])
            .prop_map(|(at, len, byte)| Damage::Fill { at, len, byte }),
        1 => at.clone().prop_map(|at| Damage::Cut { at }),
        1 => (at.clone(), prop::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, bytes)| Damage::Insert { at, bytes }),
        1 => (at, 1_usize..9).prop_map(|(at, len)| Damage::Remove { at, len }),
    ]
}

/// Damages every seed and reads it. A reader that panics fails the test.
fn check(kind: &str, read: Read, damages: &[Damage]) {
    for mut bytes in seeds(kind) {
        damages.iter().for_each(|damage| damage.apply(&mut bytes));
        drop(read(&bytes));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn damaged_gguf_files_are_errors_or_other_files(damages in prop::collection::vec(damage(), 1..4)) {
        check("gguf", readers::gguf, &damages);
    }

    #[test]
    fn damaged_safetensors_files_are_errors_or_other_files(damages in prop::collection::vec(damage(), 1..4)) {
        check("safetensors", readers::safetensors, &damages);
    }

    #[test]
    fn damaged_tokenizers_are_errors_or_other_tokenizers(damages in prop::collection::vec(damage(), 1..4)) {
        check("tokenizer", readers::tokenizer, &damages);
    }

    #[test]
    fn damaged_training_data_are_errors_or_other_data(damages in prop::collection::vec(damage(), 1..4)) {
        check("jsonl", readers::jsonl, &damages);
    }

    #[test]
    fn damaged_adapter_configs_are_errors_or_other_adapters(damages in prop::collection::vec(damage(), 1..4)) {
        check("adapter_config", readers::adapter_config, &damages);
    }
}

#[test]
fn whole_files_are_read() {
    let kinds: [(&str, Read); 5] = [
        ("gguf", readers::gguf),
        ("safetensors", readers::safetensors),
        ("tokenizer", readers::tokenizer),
        ("jsonl", readers::jsonl),
        ("adapter_config", readers::adapter_config),
    ];
    for (kind, read) in kinds {
        seeds(kind).iter().for_each(|bytes| read(bytes).unwrap());
    }
}

#[test]
fn files_cut_short_are_errors() {
    for (kind, read) in [("gguf", readers::gguf as Read), ("safetensors", readers::safetensors)] {
        for bytes in seeds(kind) {
            // A file without tensors may lack the up to 31 bytes of padding at its end.
            for cut in (0..bytes.len() - 31).step_by(7) {
                assert!(read(&bytes[..cut]).is_err(), "{kind} cut at {cut} of {}", bytes.len());
            }
        }
    }
}
