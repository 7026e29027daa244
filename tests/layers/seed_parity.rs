//! The layer of entrenar 0.7.13, from which this crate grew: its recorded outputs, and its
//! defects. The original would fail each test of the second kind.

use crate::common;
use crate::common::seed::{floats, seed};
use crate::common::tolerances::{MERGED, SEED_LAYER};
use ndarray::{Array2, ArrayView2};
use qlora_wgpu::internal::bench::uniform;
use qlora_wgpu::nn::{LoraAdapter, LoraConfig, LoraInit, LoraLinear, QLoraLinear, Scaling};
use qlora_wgpu::quant::{DenseData, DenseMatrix, QuantOptions, QuantizedMatrix};
use qlora_wgpu::{Device, Error, Tensor};
use serde_json::Value;

fn array(rows: usize, cols: usize, values: &[f32]) -> Array2<f32> {
    Array2::from_shape_vec((rows, cols), values.to_vec()).unwrap()
}

/// A recorded layer: W, A, B, x.
struct Recorded {
    case: Value,
    d_out: usize,
    d_in: usize,
    rank: usize,
    alpha: f32,
    w: Array2<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    x: Array2<f32>,
}

fn recorded() -> Vec<Recorded> {
    let cases = seed()["forward"].as_array().unwrap().clone();
    let load = |case: Value| {
        let number = |key: &str| case[key].as_u64().unwrap() as usize;
        let (d_out, d_in, rank) = (number("d_out"), number("d_in"), number("rank"));
        // "W seed 100 amp 0.5; A seed 101 amp 0.1; B seed 102 amp 0.1; x seed 103 amp 1.0"
        let formula = case["formula"].as_str().unwrap();
        let first: u64 = formula.split("W seed ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
        let (w, x) = (uniform(first, d_out * d_in, 0.5), floats(&case["x_hex"]));
        assert_eq!(x, uniform(first + 3, d_in, 1.0), "the inputs are those of the formula");
        Recorded {
            d_out,
            d_in,
            rank,
            alpha: case["alpha"].as_f64().unwrap() as f32,
            w: array(d_out, d_in, &w),
            a: uniform(first + 1, rank * d_in, 0.1),
            b: uniform(first + 2, d_out * rank, 0.1),
            x: array(1, d_in, &x),
            case,
        }
    };
    cases.into_iter().map(load).collect()
}

impl Recorded {
    fn adapter(&self, device: &Device) -> LoraAdapter {
        let a = Tensor::from_slice(device, &[self.rank, self.d_in], &self.a).unwrap();
        let b = Tensor::from_slice(device, &[self.d_out, self.rank], &self.b).unwrap();
        LoraAdapter::from_tensors(a, b, self.alpha, Scaling::Standard).unwrap()
    }

    fn lora_layer(&self, device: &Device) -> LoraLinear {
        LoraLinear::from_array(device, self.w.view()).unwrap().with_adapter("default", self.adapter(device)).unwrap()
    }
}

fn assert_relative(context: &str, got: ArrayView2<'_, f32>, wanted: &[f32], relative: f64) {
    let largest = wanted.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    for (i, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        let off = f64::from((got - wanted).abs());
        assert!(off <= relative * f64::from(largest), "{context}: [{i}] got {got}, wanted {wanted}");
    }
    assert_eq!(got.len(), wanted.len(), "{context}");
}

#[test]
fn forward_and_merge_are_the_recorded_ones_on_every_device() {
    for layer in recorded() {
        for (kind, options) in [("single", QuantOptions::int4()), ("double", QuantOptions::int4().double_quant())] {
            for device in common::devices() {
                let context = format!("{} {kind} on {}", layer.case["name"], common::name(&device));
                let qlora = QLoraLinear::from_lora(layer.lora_layer(&device), &options).unwrap();
                assert_eq!(qlora.is_double_quantized(), kind == "double");
                assert_eq!((qlora.rank(), qlora.d_in(), qlora.d_out()), (layer.rank, layer.d_in, layer.d_out));
                assert_eq!(f64::from(qlora.scale()), layer.case["scale"].as_f64().unwrap());
                // One row of X: no tier stages it as f16.
                let wanted = &layer.case[kind];
                let y = qlora.forward_array(layer.x.view()).unwrap();
                assert_relative(&context, y.view(), &floats(&wanted["y_hex"]), SEED_LAYER.on(&device));
                if !wanted["merged_hex"].is_null() {
                    let merged = qlora.merge_to_f32().unwrap();
                    assert_relative(&context, merged.view(), &floats(&wanted["merged_hex"]), MERGED.on(&device));
                }
            }
        }
    }
}

#[test]
fn memory_is_what_the_seed_reported_plus_what_it_forgot() {
    for layer in recorded() {
        for (kind, options) in [("single", QuantOptions::int4()), ("double", QuantOptions::int4().double_quant())] {
            let matrix =
                QuantizedMatrix::quantize(layer.w.as_slice().unwrap().into(), layer.d_out, layer.d_in, &options)
                    .unwrap();
            let stored = (matrix.bits_per_weight() * matrix.len() as f64 / 8.0).round() as u64;
            // The double-quantized form has an offset of four bytes, which the original's format
            // doesn't need.
            let offset = if kind == "double" { 4 } else { 0 };
            assert_eq!(Some(stored - offset), layer.case[kind]["base_quantized_bytes"].as_u64());
            let device = Device::cpu();
            let qlora = QLoraLinear::from_lora(layer.lora_layer(&device), &options).unwrap();
            let stats = qlora.memory_stats();
            assert_eq!(Some(stats.lora_bytes), layer.case[kind]["lora_bytes"].as_u64());
            assert_eq!(stats.base_unquantized_bytes, 4 * layer.w.len() as u64);
        }
    }
}

#[test]
fn the_seed_s_initial_values() {
    let config = LoraConfig { init: LoraInit::Sine, ..LoraConfig::new(2, 4.0) };
    let adapter = LoraAdapter::new(&Device::cpu(), 3, 5, &config).unwrap();
    let wanted: Vec<f32> = (0..10).map(|i| (i as f32 * 0.1).sin() * 0.01).collect();
    assert_eq!(adapter.a().to_vec().unwrap(), wanted);
    assert_eq!(adapter.b().to_vec().unwrap(), [0.0; 6]);
}

// Defects of the original, in the order of its list.

/// 1. It dequantizes the whole matrix into a new buffer on every call.
#[test]
fn forward_never_holds_the_dequantized_matrix() {
    let (d_out, d_in) = (2048, 2048);
    let weight = uniform(1, d_out * d_in, 0.05);
    let matrix = QuantizedMatrix::quantize(weight.as_slice().into(), d_out, d_in, &QuantOptions::nf4()).unwrap();
    for device in common::gpus_with(|_| {}).into_iter().chain([Device::cpu()]) {
        let layer = QLoraLinear::new(&device, matrix.clone()).unwrap();
        for m in [1, 16] {
            let x = Tensor::zeros(&device, &[m, d_in]).unwrap();
            let before = device.memory().live_bytes;
            device.reset_peak();
            layer.forward(&x).unwrap();
            device.wait().unwrap();
            let most = device.memory().peak_bytes - before;
            // y, and padding; for several rows, the CPU's panels take at most a quarter of the
            // matrix.
            let y = 4 * (m * d_out) as u64;
            let panels = if matches!(device, Device::Cpu(_)) && m > 1 { (d_out * d_in) as u64 } else { 0 };
            assert!(most <= y + panels + 256, "{} M={m}: {most} bytes for y of {y}", device.name());
        }
    }
}

/// 2. Its double-quantized layer keeps both copies and reports one.
#[test]
fn memory_stats_are_what_is_resident() {
    for device in common::gpus_with(|_| {}).into_iter().chain([Device::cpu()]) {
        // Memory that the device keeps for operands that a call doesn't use.
        let spare = QLoraLinear::quantize(&device, array(8, 8, &[0.5; 64]).view(), &QuantOptions::nf4()).unwrap();
        spare.forward(&Tensor::zeros(&device, &[1, 8]).unwrap()).unwrap();
        drop(spare);
        device.wait().unwrap();
        for options in [QuantOptions::nf4(), QuantOptions::nf4().double_quant(), QuantOptions::int4().double_quant()] {
            let before = device.memory().live_bytes;
            let weight = array(512, 1024, &uniform(2, 512 * 1024, 0.05));
            let base = LoraLinear::from_array(&device, weight.view()).unwrap();
            let adapter = LoraAdapter::new(&device, 512, 1024, &LoraConfig::new(8, 8.0)).unwrap();
            let base = base.with_adapter("default", adapter).unwrap().with_bias(&[0.1; 512]).unwrap();
            let layer = QLoraLinear::from_lora(base, &options).unwrap();
            let stats = layer.memory_stats();
            assert_eq!(stats.total_bytes, device.memory().live_bytes - before, "{} {options:?}", device.name());
            assert_eq!(stats.total_bytes, stats.base_quantized_bytes + stats.lora_bytes + stats.bias_bytes);
            assert_eq!(stats.device, device.name());
            // Tables and padding take a few KiB beside 4.13 to 4.5 bits per weight.
            let bits = 8.0 * stats.base_quantized_bytes as f64 / (512.0 * 1024.0);
            assert!(bits < 4.57, "{} {options:?}: {bits} bits per weight", device.name());
            assert!((stats.compression_ratio - 32.0 / bits).abs() < 1e-9);
        }
    }
}

/// 3. Its forward cuts the adapter off from training, and its trainer never sets alpha. Here A, B
///    and alpha all count.
#[test]
fn the_adapter_moves_the_output_by_exactly_its_share() {
    let (d_out, d_in, rank) = (24, 40, 3);
    let weight = array(d_out, d_in, &uniform(3, d_out * d_in, 0.5));
    let x = array(2, d_in, &uniform(4, 2 * d_in, 1.0));
    for device in common::devices() {
        let layer = QLoraLinear::quantize(&device, weight.view(), &QuantOptions::nf4()).unwrap();
        let adapter = LoraAdapter::new(&device, d_out, d_in, &LoraConfig::new(rank, 12.0)).unwrap();
        let mut layer = layer.with_adapter("default", adapter).unwrap();
        let before = layer.forward_array(x.view()).unwrap();
        layer.adapter_mut("default").unwrap().edit(|_, mut b| b[[5, 1]] = 0.25).unwrap();
        let after = layer.forward_array(x.view()).unwrap();
        let a = layer.active_adapter().unwrap().a().to_array2().unwrap();
        for row in 0..2 {
            let share = 12.0 / 3.0 * 0.25 * x.row(row).dot(&a.row(1));
            for column in 0..d_out {
                let moved = after[[row, column]] - before[[row, column]];
                let wanted = if column == 5 { share } else { 0.0 };
                assert!((moved - wanted).abs() < 1e-5, "{} [{row}, {column}]", common::name(&device));
            }
        }
        assert_eq!(layer.trainable_params().len(), 2);
    }
}

/// 4. It handles one vector at a time, without bias and dropout, and never sets `merged`.
#[test]
fn batches_are_rows_one_by_one_and_bias_counts() {
    let (d_out, d_in) = (30, 64);
    let weight = array(d_out, d_in, &uniform(5, d_out * d_in, 0.5));
    let x = array(20, d_in, &uniform(6, 20 * d_in, 1.0));
    let bias = uniform(7, d_out, 1.0);
    for device in common::devices() {
        let layer = QLoraLinear::quantize(&device, weight.view(), &QuantOptions::nf4()).unwrap();
        let without = layer.forward_array(x.view()).unwrap();
        let layer = layer.with_bias(&bias).unwrap();
        let batch = layer.forward_array(x.view()).unwrap();
        // Rounding of f16 operands, which are staged for many rows but not for one.
        let allowed = if common::is_f16(&device) { 2e-2 } else { 2e-5 };
        for row in 0..20 {
            let one = layer.forward_array(x.slice(ndarray::s![row..row + 1, ..])).unwrap();
            for column in 0..d_out {
                let context = format!("{} [{row}, {column}]", common::name(&device));
                assert!((one[[0, column]] - batch[[row, column]]).abs() < allowed, "{context}");
                assert!((batch[[row, column]] - without[[row, column]] - bias[column]).abs() < allowed, "{context}");
            }
        }
        assert_eq!(
            layer.with_bias(&[0.0; 31]).err().unwrap().to_string(),
            "linear layer: bias: expected [30], got [31]"
        );
    }
}

/// 5. One NaN silently wipes up to 16,384 weights.
#[test]
fn a_weight_that_is_not_finite_is_an_error_with_its_index() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for options in [QuantOptions::int4(), QuantOptions::int4().double_quant(), QuantOptions::nf4().double_quant()] {
            let mut weight = array(64, 300, &uniform(8, 64 * 300, 0.5));
            weight[[40, 7]] = bad;
            weight[[50, 0]] = bad;
            let error = QLoraLinear::quantize(&Device::cpu(), weight.view(), &options).err().unwrap();
            assert!(matches!(error, Error::NonFinite { index: 12_007, .. }), "{error:?}");
        }
    }
}

/// 5, continued: with bitsandbytes' scheme, a block of small weights beside large ones does not
/// become zeros.
#[test]
fn small_blocks_survive_double_quantization() {
    let mut weight = uniform(9, 64 * 64, 1.0);
    weight[640..704].iter_mut().for_each(|value| *value *= 1e-3);
    let quantize = |options| QuantizedMatrix::quantize(weight.as_slice().into(), 64, 64, &options).unwrap();
    let zeros = |options: QuantOptions| quantize(options).dequantize()[640..704].iter().filter(|&&w| w == 0.0).count();
    assert_eq!(zeros(QuantOptions::int4().double_quant()), 64, "the seed's format does this");
    assert!(zeros(QuantOptions::nf4().double_quant()) < 16);
}

/// 6. It loses rsLoRA's scale, and merging skips what it cannot read.
#[test]
fn rank_stabilized_scale_is_kept_everywhere() {
    let (d_out, d_in) = (16, 32);
    let weight = array(d_out, d_in, &uniform(10, d_out * d_in, 0.5));
    for device in common::devices() {
        let config = LoraConfig { scaling: Scaling::RankStabilized, ..LoraConfig::new(4, 6.0) };
        let mut adapter = LoraAdapter::new(&device, d_out, d_in, &config).unwrap();
        adapter.edit(|_, mut b| b.fill(0.125)).unwrap();
        assert_eq!(adapter.to_device(&Device::cpu()).unwrap().scale(), 3.0);
        let lora = LoraLinear::from_array(&device, weight.view()).unwrap().with_adapter("default", adapter).unwrap();
        let merged = lora.merge_to_f32().unwrap();
        let a = lora.active_adapter().unwrap().a().to_array2().unwrap();
        for ((i, j), value) in merged.indexed_iter() {
            let wanted = weight[[i, j]] + 3.0 * 0.125 * a.column(j).sum();
            assert!((value - wanted).abs() < 1e-5, "{} [{i}, {j}]", common::name(&device));
        }
        let qlora = QLoraLinear::from_lora(lora, &QuantOptions::nf4()).unwrap();
        assert_eq!(qlora.scale(), 3.0);
    }
}

#[test]
fn merging_in_place_refuses_what_it_could_not_undo() {
    let device = Device::cpu();
    let halves = DenseMatrix::new(2, 2, DenseData::F16(vec![half::f16::ONE; 4])).unwrap();
    let adapter = LoraAdapter::new(&device, 2, 2, &LoraConfig::new(1, 1.0)).unwrap();
    let mut layer = LoraLinear::new(&device, halves).unwrap().with_adapter("default", adapter).unwrap();
    assert_eq!(
        layer.merge().unwrap_err().to_string(),
        "merge: the base is not f32; only an f32 base can be merged in place and unmerged"
    );
    assert!(!layer.is_merged());
}

/// 7. Its tests allow errors of 0.2 to 0.5. Here the bound is the format's, for every weight: half
///    of the widest gap of the codebook, times the scale.
#[test]
fn the_error_of_every_weight_is_within_the_format() {
    for (format, widest) in
        [(QuantOptions::nf4(), 0.303_8f32), (QuantOptions::int4(), 1.0), (QuantOptions::fp4(), 0.333_4)]
    {
        for amplitude in [1e-4, 0.02, 1.0, 100.0] {
            let weight = uniform(11, 40 * 100, amplitude);
            let matrix = QuantizedMatrix::quantize(weight.as_slice().into(), 40, 100, &format).unwrap();
            for (i, (wanted, got)) in weight.iter().zip(matrix.dequantize()).enumerate() {
                let bound = widest / 2.0 * matrix.scales().get(i / 64) * 1.0001;
                assert!((wanted - got).abs() <= bound, "{format:?} [{i}] {wanted} {got} +- {bound}");
            }
        }
    }
}
