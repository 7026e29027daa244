//! Serialized 4-bit weights of bitsandbytes (`Linear4bit.state_dict()`), as saved by transformers.
//! A quantized weight `W`, such as `model.layers.0.mlp.up_proj.weight`, consists of several
//! tensors:
//!
//! | key | type | shape |
//! |---|---|---|
//! | `W` | U8, or another type with the same bytes | `[ceil(n / 2), 1]` |
//! | `W.absmax` | F32, or U8 if double-quantized | `[blocks]` |
//! | `W.quant_map` | F32 | `[16]` |
//! | `W.nested_absmax` | F32, if double-quantized | `[ceil(blocks / nested_blocksize)]` |
//! | `W.nested_quant_map` | F32, if double-quantized | `[256]` |
//! | `W.quant_state.bitsandbytes__nf4` or `__fp4` | U8 | JSON text |
//!
//! bitsandbytes has no INT4. This crate writes it with the same keys and
//! `W.quant_state.qlora__int4`; only this crate reads it.

use std::borrow::Cow;
use std::collections::BTreeSet;

use serde::Deserialize;

use super::safetensors::{OutData, OutTensor, TensorType, Tensors};
use crate::error::{Error, Result};
use crate::quant::{Codebook, DoubleQuant, DoubleScales, Dtype, Format, Parts, QuantOptions, QuantizedMatrix, Scales};
use crate::quant::{MatrixKind, MatrixSpec, ScaleKind};

const STATE: &str = "quant_state.";
const SIDE_TENSORS: [&str; 4] = ["absmax", "quant_map", "nested_absmax", "nested_quant_map"];

/// Returns the names of the 4-bit weights among `tensors`: those with a `quant_state`.
pub fn quantized_weights(tensors: &impl Tensors) -> BTreeSet<&str> {
    tensors.names().filter_map(|key| Some(key.split_once(".quant_state.")?.0)).collect()
}

/// Returns the weight that a side tensor belongs to, by its name alone: `a.weight` for
/// `a.weight.absmax`.
pub fn weight_of(key: &str) -> Option<&str> {
    if let Some((weight, _)) = key.split_once(".quant_state.") {
        return Some(weight);
    }
    let (weight, side) = key.rsplit_once('.')?;
    SIDE_TENSORS.contains(&side).then_some(weight)
}

/// Reads the 4-bit weight named `weight` (the key of its codes, as in [`quantized_weights`]).
///
/// # Errors
/// [`Error::Tensor`] with the key at fault: a missing tensor, a wrong type or length, more than
/// one `quant_state`, or a `quant_state` whose JSON lacks a key, has an unknown one, or
/// contradicts the tensors.
pub fn read(tensors: &impl Tensors, weight: &str) -> Result<QuantizedMatrix> {
    let Header { format, rows, cols, block, nested, dtype } = read_header(tensors, weight)?;
    let absmax_key = format!("{weight}.absmax");
    let absmax = tensors.tensor(&absmax_key)?;
    let scales = match nested {
        None => Scales::Plain(floats(tensors, &absmax_key)?.into_owned()),
        Some(_) if absmax.dtype != TensorType::U8 => {
            let message = format!("is {}, but its quant_state says nested, which needs U8", absmax.dtype);
            return Err(tensors.tensor_error(&absmax_key, message));
        }
        Some(Nested { super_block, offset }) => Scales::Double(DoubleScales {
            codes: absmax.bytes.to_vec(),
            table: Box::new(table(tensors, &format!("{weight}.nested_quant_map"))?),
            supers: floats(tensors, &format!("{weight}.nested_absmax"))?.into_owned(),
            super_block,
            offset,
        }),
    };
    let codebook = Codebook(table(tensors, &format!("{weight}.quant_map"))?);
    let codes = tensors.tensor(weight)?.bytes.to_vec();
    QuantizedMatrix::from_parts(Parts { format, rows, cols, codes, codebook, block, scales, mins: None, dtype })
        .map_err(|e| tensors.tensor_error(weight, e))
}

/// Storage of a 4-bit weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Storage {
    /// NF4, FP4 or INT4.
    pub format: Format,
    /// [rows, cols] of the matrix.
    pub shape: [usize; 2],
    /// Weights per scale.
    pub block: usize,
    /// Scales per super-scale, if the scales are quantized.
    pub super_block: Option<usize>,
    /// Size of all its tensors in bytes, including tables and `quant_state`.
    pub bytes: usize,
}

/// Returns the storage of the 4-bit weight named `weight`, from its `quant_state`. Reads no
/// values.
///
/// # Errors
/// [`Error::Tensor`] with the key at fault: a `quant_state` that [`read`] would refuse, or codes
/// whose length doesn't match its shape.
pub fn storage(tensors: &impl Tensors, weight: &str) -> Result<Storage> {
    let Header { format, rows, cols, block, nested, .. } = read_header(tensors, weight)?;
    let codes = tensors.tensor(weight)?.bytes.len();
    if rows.checked_mul(cols).map(|values| values.div_ceil(2)) != Some(codes) {
        return Err(
            tensors.tensor_error(weight, format!("has {codes} bytes of codes, which doesn't match [{rows}, {cols}]"))
        );
    }
    let sides = SIDE_TENSORS.iter().map(|side| format!("{weight}.{side}"));
    let state = state_name(format).map(|name| format!("{weight}.{STATE}{name}"));
    let keys = [weight.to_owned()].into_iter().chain(sides).chain(state);
    let bytes = keys.filter_map(|key| tensors.get(&key)).map(|tensor| tensor.bytes.len()).sum();
    let super_block = nested.map(|nested| nested.super_block);
    Ok(Storage { format, shape: [rows, cols], block, super_block, bytes })
}

/// Contents of a `quant_state`, checked.
struct Header {
    format: Format,
    rows: usize,
    cols: usize,
    block: usize,
    nested: Option<Nested>,
    dtype: Dtype,
}

fn read_header(tensors: &impl Tensors, weight: &str) -> Result<Header> {
    let (state_key, format) = find_state(tensors, weight)?;
    let state = tensors.tensor(&state_key)?;
    let state: QuantState = serde_json::from_slice(state.bytes)
        .map_err(|e| tensors.tensor_error(&state_key, format!("is not a known quant_state: {e}")))?;
    let contradiction = |message: String| tensors.tensor_error(&state_key, message);
    if state.quant_type != format.to_string() {
        return Err(contradiction(format!("quant_type {:?} is not {format}", state.quant_type)));
    }
    let [rows, cols] = state.shape[..] else {
        return Err(contradiction(format!("shape {:?} is not a matrix shape", state.shape)));
    };
    let nested = state.nested().map_err(|e| contradiction(e.into()))?;
    let dtype = state.dtype.parse().map_err(|e: Error| contradiction(e.to_string()))?;
    Ok(Header { format, rows, cols, block: state.blocksize, nested, dtype })
}

/// Returns the format of the 4-bit weight named `weight`, from its `quant_state` alone.
///
/// # Errors
/// Same as [`read`], for faults in the `quant_state`.
pub(crate) fn spec(tensors: &impl Tensors, weight: &str) -> Result<MatrixSpec> {
    let Header { rows, cols, block, nested, .. } = read_header(tensors, weight)?;
    let double = |Nested { super_block, .. }| ScaleKind::Double { super_block };
    let scales = nested.map_or(ScaleKind::Plain, double);
    Ok(MatrixSpec { rows, cols, kind: MatrixKind::Quantized { block, scales, mins: None } })
}

/// Tensors that store `matrix` under the name `weight`. Codes and scales are borrowed.
///
/// # Errors
/// [`Error::Invalid`] for a matrix with minima or in a GGUF format, which bitsandbytes can't
/// represent.
pub fn tensors<'a>(weight: &str, matrix: &'a QuantizedMatrix) -> Result<Vec<OutTensor<'a>>> {
    let unfit = |got: String, expected| Error::invalid("write as bitsandbytes", "matrix", got, expected);
    if matrix.mins().is_some() {
        return Err(unfit(format!("{weight}, with minima"), "expected scales only"));
    }
    let format = matrix.format();
    let state_name =
        state_name(format).ok_or_else(|| unfit(format!("{weight}, in {format}"), "expected nf4, fp4 or int4"))?;
    let side = |name: &str, dtype: TensorType, bytes: &'a [u8]| {
        let shape = vec![bytes.len() * 8 / dtype.bitsize()];
        OutTensor { name: format!("{weight}.{name}"), dtype, shape, data: OutData::Bytes(Cow::Borrowed(bytes)) }
    };
    let codes = matrix.codes();
    let state = state_json(matrix).into_bytes();
    let mut tensors = vec![
        OutTensor {
            name: weight.into(),
            dtype: TensorType::U8,
            shape: vec![codes.len(), 1],
            data: OutData::Bytes(Cow::Borrowed(codes)),
        },
        side("quant_map", TensorType::F32, bytemuck::cast_slice(&matrix.codebook().0)),
        OutTensor {
            name: format!("{weight}.{STATE}{state_name}"),
            dtype: TensorType::U8,
            shape: vec![state.len()],
            data: OutData::Bytes(Cow::Owned(state)),
        },
    ];
    match matrix.scales() {
        Scales::Plain(scales) => tensors.push(side("absmax", TensorType::F32, bytemuck::cast_slice(scales))),
        Scales::Double(double) => tensors.extend([
            side("absmax", TensorType::U8, &double.codes),
            side("nested_absmax", TensorType::F32, bytemuck::cast_slice(&double.supers)),
            side("nested_quant_map", TensorType::F32, bytemuck::cast_slice(&double.table[..])),
        ]),
    }
    Ok(tensors)
}

/// The `quantization_config` in `config.json` that transformers needs for such weights; `dtype` is
/// the type it computes in.
pub(crate) fn quantization_config(options: &QuantOptions, dtype: Dtype) -> serde_json::Value {
    serde_json::json!({
        "quant_method": "bitsandbytes",
        "load_in_4bit": true,
        "load_in_8bit": false,
        "bnb_4bit_quant_type": options.format.to_string(),
        "bnb_4bit_use_double_quant": (options.double != DoubleQuant::None),
        "bnb_4bit_compute_dtype": dtype.to_string(),
        "bnb_4bit_quant_storage": "uint8",
    })
}

/// JSON of a `quant_state`, without its tensors.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct QuantState {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f64>,
}

/// Storage of the scales of a double-quantized weight.
struct Nested {
    super_block: usize,
    offset: f32,
}

impl QuantState {
    fn nested(&self) -> Result<Option<Nested>, &'static str> {
        let dtype = self.nested_dtype.as_deref();
        if (self.nested_blocksize, dtype, self.nested_offset) == (None, None, None) {
            return Ok(None);
        }
        let super_block =
            self.nested_blocksize.ok_or("nested_blocksize is missing, but there are other nested keys")?;
        let dtype = dtype.ok_or("nested_dtype is missing, but there are other nested keys")?;
        let offset = self.nested_offset.ok_or("nested_offset is missing, but there are other nested keys")?;
        if dtype != "float32" {
            return Err("nested_dtype is not \"float32\"");
        }
        Ok(Some(Nested { super_block, offset: offset as f32 }))
    }
}

/// Finds the only `quant_state` key of `weight`, and the format that its last part names.
fn find_state(tensors: &impl Tensors, weight: &str) -> Result<(String, Format)> {
    let prefix = format!("{weight}.{STATE}");
    let states: Vec<_> = tensors.names().filter_map(|key| key.strip_prefix(&prefix)).collect();
    let &[state] = &states[..] else {
        let message = format!("has {} quant_state tensors, expected one", states.len());
        return Err(tensors.tensor_error(weight, message));
    };
    let key = prefix + state;
    match Format::QUANTIZERS.into_iter().find(|&format| state_name(format) == Some(state)) {
        Some(format) => Ok((key, format)),
        None => Err(tensors.tensor_error(&key, "names no known 4-bit format")),
    }
}

/// Last part of the `quant_state` key, for formats that can be written.
fn state_name(format: Format) -> Option<&'static str> {
    match format {
        Format::Nf4 => Some("bitsandbytes__nf4"),
        Format::Fp4 => Some("bitsandbytes__fp4"),
        Format::Int4 => Some("qlora__int4"),
        _ => None,
    }
}

/// Returns the f32 values of tensor `key`.
fn floats<'a>(tensors: &'a impl Tensors, key: &str) -> Result<Cow<'a, [f32]>> {
    let tensor = tensors.tensor(key)?;
    tensor.f32s().ok_or_else(|| tensors.tensor_error(key, format!("is {}, expected F32", tensor.dtype)))
}

/// Returns the `N` f32 values of tensor `key`.
fn table<const N: usize>(tensors: &impl Tensors, key: &str) -> Result<[f32; N]> {
    let values = floats(tensors, key)?;
    (*values).try_into().map_err(|_| tensors.tensor_error(key, format!("has {} values, expected {N}", values.len())))
}

/// Formats the `quant_state` of `matrix` exactly like Python's `json.dumps`.
fn state_json(matrix: &QuantizedMatrix) -> String {
    let nested = match matrix.scales() {
        Scales::Plain(_) => String::new(),
        Scales::Double(double) => format!(
            r#", "nested_blocksize": {}, "nested_dtype": "float32", "nested_offset": {}"#,
            double.super_block,
            python_float(f64::from(double.offset)),
        ),
    };
    format!(
        r#"{{"quant_type": "{}", "blocksize": {}, "dtype": "{}", "shape": [{}, {}]{nested}}}"#,
        matrix.format(),
        matrix.block(),
        matrix.dtype(),
        matrix.rows(),
        matrix.cols(),
    )
}

/// Formats a finite number like Python: with the shortest digits that restore it, and an exponent
/// of at least two digits below 1e-4 and from 1e16 on.
fn python_float(value: f64) -> String {
    if value == 0.0 || (1e-4..1e16).contains(&value.abs()) {
        return if value.fract() == 0.0 { format!("{value:.1}") } else { value.to_string() };
    }
    let scientific = format!("{value:e}");
    match scientific.split_once('e') {
        Some((digits, exponent)) => match exponent.strip_prefix('-') {
            Some(exponent) => format!("{digits}e-{exponent:0>2}"),
            None => format!("{digits}e+{exponent:0>2}"),
        },
        None => scientific,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;
    use crate::formats::safetensors::{SafetensorsFile, write};
    use crate::quant::{DoubleQuant, QuantOptions};

    fn matrix(rows: usize, cols: usize, options: &QuantOptions) -> QuantizedMatrix {
        let values: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 0.71).sin() * (1.0 + i as f32)).collect();
        QuantizedMatrix::quantize(values[..].into(), rows, cols, options).unwrap()
    }

    /// Writes `tensors` and reads the weight `a.weight` back.
    fn reread(tensors: Vec<OutTensor<'_>>) -> Result<QuantizedMatrix> {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("x.safetensors");
        write(&path, tensors, BTreeMap::new()).unwrap();
        read(&SafetensorsFile::open(&path).unwrap(), "a.weight")
    }

    /// Error from reading a double-quantized matrix after `change`.
    fn error(change: impl FnOnce(&mut Vec<OutTensor<'_>>)) -> String {
        let matrix = matrix(3, 50, &QuantOptions::nf4().double_quant());
        let mut tensors = tensors("a.weight", &matrix).unwrap();
        change(&mut tensors);
        let error = reread(tensors).unwrap_err();
        assert!(matches!(error, Error::Tensor { .. }), "{error}");
        error.to_string()
    }

    fn find<'t, 'a>(tensors: &'t mut [OutTensor<'a>], suffix: &str) -> &'t mut OutTensor<'a> {
        tensors.iter_mut().find(|tensor| tensor.name.ends_with(suffix)).unwrap()
    }

    /// Error from reading after a change to the quant_state's JSON.
    fn json_error(from: &str, to: &str) -> String {
        let message = error(|tensors| {
            let state = find(tensors, "__nf4");
            let OutData::Bytes(bytes) = &state.data else { panic!("lazy") };
            let text = std::str::from_utf8(bytes).unwrap();
            assert!(text.contains(from), "{text}");
            let text = text.replace(from, to).into_bytes();
            state.shape = vec![text.len()];
            state.data = OutData::Bytes(text.into());
        });
        assert!(message.contains("x.safetensors: tensor \"a.weight"), "{message}");
        message
    }

    #[test]
    fn floats_are_printed_as_python_does() {
        let cases = [
            (0.0, "0.0"),
            (-3.0, "-3.0"),
            (0.1, "0.1"),
            (355.215_759_277_343_75, "355.21575927734375"),
            (1e-4, "0.0001"),
            (9.5e-5, "9.5e-05"),
            (-1e-5, "-1e-05"),
            (1.25e-30, "1.25e-30"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (3.402_823_466_385_288_6e38, "3.4028234663852886e+38"),
        ];
        for (value, expected) in cases {
            assert_eq!(python_float(value), expected);
        }
    }

    #[test]
    fn keys_are_found_by_their_state() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("x.safetensors");
        let [nf4, int4] = [QuantOptions::nf4(), QuantOptions::int4().double_quant()].map(|o| matrix(2, 3, &o));
        let mut out = tensors("weight", &nf4).unwrap();
        out.extend(tensors("b.weight", &int4).unwrap());
        write(&path, out, BTreeMap::new()).unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        assert_eq!(quantized_weights(&file), BTreeSet::from(["weight", "b.weight"]));
        assert!(file.get("b.weight.quant_state.qlora__int4").is_some());
        let sides: BTreeSet<_> = file.names().iter().filter_map(|key| weight_of(key)).collect();
        assert_eq!(sides, quantized_weights(&file));
        assert_eq!(weight_of("b.weight"), None);
    }

    #[test]
    fn codes_may_be_flat_or_of_any_type() {
        let matrix = matrix(8, 64, &QuantOptions::nf4());
        for (dtype, shape) in
            [(TensorType::U8, vec![1, 256]), (TensorType::BF16, vec![128, 1]), (TensorType::F32, vec![64, 1])]
        {
            let mut tensors = tensors("a.weight", &matrix).unwrap();
            (tensors[0].dtype, tensors[0].shape) = (dtype, shape);
            assert_eq!(reread(tensors).unwrap(), matrix);
        }
    }

    #[test]
    fn damaged_tensors_are_errors() {
        let shorten = |suffix: &'static str| {
            error(move |tensors| {
                let tensor = find(tensors, suffix);
                let OutData::Bytes(bytes) = &tensor.data else { panic!("lazy") };
                let kept = bytes.len() - tensor.dtype.bitsize() / 8;
                tensor.data = OutData::Bytes(bytes[..kept].to_vec().into());
                tensor.shape[0] -= 1;
            })
        };
        assert!(shorten("weight").contains("bytes of codes: expected 75, got 74"));
        assert!(shorten(".absmax").contains("scales: expected 3, got 2"));
        assert!(shorten(".nested_absmax").contains("super-scales: expected 1, got 0"));
        assert!(shorten(".quant_map").contains("has 15 values, expected 16"));
        assert!(shorten(".nested_quant_map").contains("has 255 values, expected 256"));
        for suffix in SIDE_TENSORS {
            let key = format!("a.weight.{suffix}");
            let message = error(|tensors| tensors.retain(|tensor| tensor.name != key));
            assert!(message.contains(&format!("{key:?}: is missing")), "{message}");
        }
        assert!(error(|tensors| find(tensors, ".nested_absmax").dtype = TensorType::I32).contains("expected F32"));
        assert!(error(|tensors| tensors.retain(|t| !t.name.contains("quant_state"))).contains("has 0 quant_state"));
        let second = error(|tensors| {
            tensors.push(OutTensor {
                name: "a.weight.quant_state.bitsandbytes__fp4".into(),
                dtype: TensorType::U8,
                shape: vec![0],
                data: OutData::Bytes(Cow::Borrowed(&[])),
            });
        });
        assert!(second.contains("has 2 quant_state"), "{second}");
        let other = error(|tensors| find(tensors, "__nf4").name = "a.weight.quant_state.bitsandbytes__nf3".into());
        assert!(other.contains("names no known"), "{other}");
    }

    #[test]
    fn contradictory_states_are_errors() {
        assert!(json_error("}", "").contains("not a known quant_state"));
        assert!(json_error("}", r#", "zero_point": 1}"#).contains("unknown field `zero_point`"));
        assert!(json_error(r#""blocksize": 64, "#, "").contains("missing field `blocksize`"));
        assert!(json_error(r#""shape": [3, 50], "#, "").contains("missing field `shape`"));
        assert!(json_error(r#""quant_type": "nf4""#, r#""quant_type": "fp4""#).contains("is not nf4"));
        assert!(
            json_error(r#""dtype": "float32", "shape""#, r#""dtype": "int8", "shape""#)
                .contains("dtype: name is \"int8\"; expected float32, float16 or bfloat16")
        );
        assert!(json_error("[3, 50]", "[150]").contains("not a matrix shape"));
        assert!(json_error("[3, 50]", "[-3, 50]").contains("not a known quant_state"));
        assert!(json_error("[3, 50]", "[4, 50]").contains("expected 100, got 75"));
        assert!(
            json_error("[3, 50]", "[4294967296, 4294967296]")
                .contains("shape is 4294967296 x 4294967296; the number of weights")
        );
        assert!(json_error(r#""blocksize": 64"#, r#""blocksize": 65"#).contains("block is 65"));
        assert!(json_error(r#""nested_blocksize": 256, "#, "").contains("nested_blocksize is missing"));
        assert!(json_error(r#""nested_dtype": "float32", "#, "").contains("nested_dtype is missing"));
        assert!(
            json_error(r#""nested_dtype": "float32""#, r#""nested_dtype": "float16""#)
                .contains("nested_dtype is not \"float32\"")
        );
        assert!(json_error(r#""nested_blocksize": 256"#, r#""nested_blocksize": 0"#).contains("super_block is 0"));
        // A plain state with double-quantized scales, and the reverse.
        assert!(
            error(|tensors| {
                let plain = matrix(3, 50, &QuantOptions::nf4());
                let state = state_json(&plain).into_bytes();
                let tensor = find(tensors, "__nf4");
                tensor.shape = vec![state.len()];
                tensor.data = OutData::Bytes(state.into());
            })
            .contains("is U8, expected F32")
        );
        assert!(
            error(|tensors| {
                let absmax = find(tensors, ".absmax");
                absmax.dtype = TensorType::F32;
                absmax.data = OutData::Bytes(vec![0; 12].into());
            })
            .contains("which needs U8")
        );
    }

    #[test]
    fn minima_have_no_place() {
        let parts = matrix(1, 64, &QuantOptions::nf4()).into_parts();
        let mins = Some(Scales::Plain(vec![0.0]));
        let matrix = QuantizedMatrix::from_parts(Parts { mins, ..parts }).unwrap();
        assert!(matches!(tensors("weight", &matrix), Err(Error::Invalid { .. })));
    }

    proptest! {
        #[test]
        fn every_matrix_reads_back(
            rows in 1..=9_usize,
            cols in 1..=257_usize,
            log in 5..=12_u32,
            format in prop_oneof![Just(Format::Nf4), Just(Format::Fp4), Just(Format::Int4)],
            double in prop_oneof![Just(DoubleQuant::None), Just(DoubleQuant::Dynamic), Just(DoubleQuant::Linear)],
        ) {
            let matrix = matrix(rows, cols, &QuantOptions { format, block: 1 << log, double });
            let folder = TempDir::new().unwrap();
            let path = folder.path().join("x.safetensors");
            write(&path, tensors("a.weight", &matrix).unwrap(), BTreeMap::new()).unwrap();
            let file = SafetensorsFile::open(&path).unwrap();
            let found = storage(&file, "a.weight").unwrap();
            prop_assert_eq!((found.format, found.shape, found.block), (format, [rows, cols], 1 << log));
            prop_assert_eq!(found.super_block.is_some(), double != DoubleQuant::None);
            let bytes: usize = file.names().iter().map(|name| file.tensor(name).unwrap().bytes.len()).sum();
            prop_assert_eq!(found.bytes, bytes);
            prop_assert_eq!(read(&file, "a.weight").unwrap(), matrix);
        }
    }
}
