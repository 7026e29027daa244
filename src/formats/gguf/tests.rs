use std::fs;

use tempfile::TempDir;

use super::writer::{Writer, array, text};
use super::*;

fn open(folder: &TempDir, bytes: &[u8]) -> Result<GgufFile> {
    let path = folder.path().join("x.gguf");
    fs::write(&path, bytes).unwrap();
    GgufFile::open(path)
}

fn sample() -> Writer {
    let words: Vec<_> = ["a", "", "é"].map(text).into();
    let nested = array(9, &[array(4, &[7_u32.to_le_bytes().into()]), array(8, &[text("deep")])]);
    Writer::default()
        .string("general.architecture", "llama")
        .u32("n", 7)
        .f32("eps", 1e-5)
        .entry("flag", 7, [1])
        .entry("small", 1, [0xff])
        .entry("wide", 12, 0.1_f64.to_le_bytes())
        .entry("words", 9, array(8, &words))
        .entry("ints", 9, array(5, &[(-1_i32).to_le_bytes().into(), 5_i32.to_le_bytes().into()]))
        .entry("floats", 9, array(6, &[0.5_f32.to_le_bytes().into()]))
        .entry("nested", 9, nested)
        .tensor("w", &[2, 32], TensorType::Q4_0, &[1; 36])
        .tensor("v", &[3], TensorType::F32, &[2; 12])
}

#[test]
fn metadata_and_tensors_are_read() {
    let folder = TempDir::new().unwrap();
    let file = sample().open(&folder).unwrap();
    assert_eq!(file.require::<&str>("general.architecture").unwrap(), "llama");
    assert_eq!((file.require::<u32>("n").unwrap(), file.get::<usize>("n").unwrap()), (7, Some(7)));
    assert_eq!((file.require::<f32>("eps").unwrap(), file.require::<f32>("wide").unwrap()), (1e-5, 0.1));
    assert!(file.require::<bool>("flag").unwrap());
    assert_eq!(file.require::<i32>("small").unwrap(), -1);
    assert_eq!(file.require::<Vec<&str>>("words").unwrap(), ["a", "", "é"]);
    assert_eq!(file.require::<Vec<i32>>("ints").unwrap(), [-1, 5]);
    assert_eq!(file.require::<Vec<f32>>("floats").unwrap(), [0.5]);
    let Some(Value::Array(nested)) = file.metadata("nested") else { panic!("no array") };
    let Some(Value::Array(inner)) = nested.iter().nth(1) else { panic!("no inner array") };
    assert_eq!(inner.iter().collect::<Vec<_>>(), [Value::String("deep")]);
    assert_eq!(file.get::<u32>("none").unwrap(), None);
    assert_eq!(file.keys().count(), 10);

    assert_eq!(file.names().collect::<Vec<_>>(), ["v", "w"]);
    let w = file.tensor("w").unwrap();
    assert_eq!((w.kind, w.shape, w.bytes), (TensorType::Q4_0, &[2, 32][..], &[1; 36][..]));
    assert_eq!(file.tensor("v").unwrap().bytes, [2; 12]);
    assert!(matches!(file.tensor("x").unwrap_err(), Error::Tensor { key, .. } if key == "x"));
}

#[test]
fn values_of_another_type_are_errors_that_name_file_and_key() {
    let folder = TempDir::new().unwrap();
    let file = sample().open(&folder).unwrap();
    let ends = |error: Error, end: &str| assert!(error.to_string().ends_with(end), "{error}");
    ends(file.require::<u32>("none").unwrap_err(), "x.gguf: `none`: is missing");
    ends(file.require::<u32>("eps").unwrap_err(), "expected an unsigned 32-bit integer");
    ends(file.require::<u32>("small").unwrap_err(), "`small`: is -1, expected an unsigned 32-bit integer");
    ends(file.require::<&str>("n").unwrap_err(), "`n`: is 7, expected text");
    ends(file.require::<f32>("n").unwrap_err(), "expected a float");
    ends(file.require::<bool>("words").unwrap_err(), "is an array of 3, expected true or false");
    assert!(file.require::<Vec<&str>>("ints").is_err() && file.require::<Vec<u32>>("ints").is_err());
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let folder = TempDir::new().unwrap();
    let mut writer = sample();
    let bytes = writer.bytes();
    for cut in writer.seams.into_iter().filter(|&cut| cut < bytes.len()) {
        let error = open(&folder, &bytes[..cut]).unwrap_err();
        assert!(matches!(error, Error::File { .. } | Error::Tensor { .. }), "{cut}: {error}");
    }
    for cut in 0..bytes.len() {
        assert!(Header::read(&bytes[..cut]).is_err(), "{cut}");
    }
}

#[test]
fn no_changed_byte_of_the_header_panics_or_reaches_outside() {
    let mut writer = sample();
    let bytes = writer.bytes();
    let header = *writer.seams.last().unwrap();
    let check = |change: &dyn Fn(&mut [u8])| {
        let mut bytes = bytes.clone();
        change(&mut bytes);
        if let Ok(header) = Header::read(&bytes) {
            assert!(header.tensors.values().all(|place| place.bytes.end <= bytes.len()));
        }
    };
    for at in 0..header {
        for flip in [0xff, 0x80, 0x20, 0x01] {
            check(&|bytes| bytes[at] ^= flip);
        }
        // Impossible lengths and counts.
        for fill in [0xff, 0x7f] {
            check(&|bytes| bytes[at..header.min(at + 8)].fill(fill));
        }
    }
}

fn error(mut writer: Writer) -> String {
    let folder = TempDir::new().unwrap();
    writer.open(&folder).unwrap_err().to_string()
}

#[test]
fn malformed_files_are_errors() {
    let folder = TempDir::new().unwrap();
    let with_version = |version: u32| {
        let mut bytes = sample().bytes();
        bytes[4..8].copy_from_slice(&version.to_le_bytes());
        open(&folder, &bytes)
    };
    assert!(with_version(2).is_ok());
    assert!(with_version(1).unwrap_err().to_string().contains("version 1; supported"));
    assert!(with_version(3 << 24).unwrap_err().to_string().contains("big-endian"));
    assert!(open(&folder, b"GGML\x03\0\0\0").unwrap_err().to_string().contains("not a GGUF file"));
    assert!(matches!(GgufFile::open("/no/such/file").unwrap_err(), Error::Io { .. }));

    let empty = Writer::default;
    assert!(error(empty().u32("a", 1).u32("a", 2)).contains("`a`: is given twice"));
    assert!(error(empty().entry("a", 13, [])).contains("`a`: has a value of unknown type 13"));
    assert!(error(empty().entry("a", 7, [2])).contains("flag of 2"));
    assert!(error(empty().entry("a", 8, b"\x01\0\0\0\0\0\0\0\xff")).contains("not UTF-8"));
    assert!(error(empty().u32(ALIGNMENT, 24)).contains("is 24, expected a power of two"));
    assert!(error(empty().string(ALIGNMENT, "x")).contains("expected a power of two"));
    let deep = (0..5).fold(array(4, &[]), |inner, _| array(9, &[inner]));
    assert!(error(empty().entry("a", 9, deep)).contains("nested deeper"));
}

#[test]
fn tensors_that_cannot_be_are_errors_that_name_them() {
    let with = |shape: &[usize], kind: u32, offset: u64| {
        let writer = Writer::default().tensor("v", &[16], TensorType::F32, &[0; 64]).placed("w", shape, kind, offset);
        let message = error(writer);
        assert!(message.contains("tensor \"w\""), "{message}");
        message
    };
    let f32s = TensorType::F32.id();
    assert!(with(&[4], f32s, 32).contains("overlaps tensor \"v\""));
    assert!(with(&[17], f32s, 0).contains("ends at byte 68 of 64"));
    assert!(with(&[1], f32s, 64).contains("ends at byte 68 of 64"));
    assert!(with(&[1], f32s, 4).contains("isn't a multiple of 32"));
    assert!(with(&[16], f32s, u64::MAX - 31).contains("too large"));
    assert!(with(&[usize::MAX, usize::MAX], f32s, 0).contains("too large"));
    assert!(with(&[2, 33], TensorType::Q4_0.id(), 0).contains("whole blocks of 32"));
    assert!(with(&[1; 5], f32s, 0).contains("5 dimensions"));
    assert!(with(&[], f32s, 0).contains("0 dimensions"));
    assert!(with(&[1], 99, 0).contains("unknown type 99"));
    let twice = Writer::default().placed("w", &[0], f32s, 0).placed("w", &[0], f32s, 0);
    assert!(error(twice).contains("given twice"));
}

#[test]
fn matrices_and_vectors_are_checked_and_put_in_order() {
    let folder = TempDir::new().unwrap();
    // Rows 0, 1, 2, ... of two heads of four rows; pairs are adjacent.
    let values: Vec<f32> = (0..8).flat_map(|row| [row as f32, 0.5]).collect();
    let column: Vec<f32> = (0..8).map(|row| row as f32).collect();
    let file = Writer::default()
        .tensor("w", &[8, 2], TensorType::F32, bytemuck::cast_slice(&values))
        .tensor("v", &[8], TensorType::F32, bytemuck::cast_slice(&column))
        .tensor("q", &[32], TensorType::Q8_0, &[0; 34])
        .tensor("i", &[2, 256], TensorType::Iq1S, &[0; 100])
        .tensor("n", &[1, 32], TensorType::Q4_0, &[0xff; 18])
        .open(&folder)
        .unwrap();
    let order = RowOrder::Interleaved { head_dim: 4 };
    let restored = [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0];
    assert_eq!(file.vector("v", 8, RowOrder::Plain).unwrap(), column);
    assert_eq!(file.vector("v", 8, order).unwrap(), restored);
    let matrix = file.matrix("w", 8, 2, order, &BaseFormat::AsIs).unwrap();
    let mut got = [0.0; 16];
    matrix.dequantize_rows(0..8, &mut got);
    assert_eq!(got.to_vec(), restored.iter().flat_map(|&row| [row, 0.5]).collect::<Vec<f32>>());

    let error = |name: &str, rows, cols, order| {
        let error = file.matrix(name, rows, cols, order, &BaseFormat::AsIs).unwrap_err();
        assert!(matches!(&error, Error::Tensor { key, .. } if key == name), "{error}");
        error.to_string()
    };
    assert!(error("none", 8, 2, RowOrder::Plain).contains("is missing"));
    assert!(error("w", 2, 8, RowOrder::Plain).contains("has shape [8, 2], expected [2, 8]"));
    for head_dim in [0, 3, 6, 16] {
        assert!(error("w", 8, 2, RowOrder::Interleaved { head_dim }).contains("into heads"), "{head_dim}");
    }
    assert!(error("i", 2, 256, RowOrder::Plain).contains("is IQ1_S, which is not supported"));
    assert!(error("n", 1, 32, RowOrder::Plain).contains("only finite values"));
    assert!(file.vector("q", 32, order).is_err(), "a block that would have to be taken apart");
    assert_eq!(file.vector("q", 32, RowOrder::Plain).unwrap(), [0.0; 32]);
}
