//! The backward pass of adapted layers, without a tape: compared with finite differences of the
//! formula in f64, on every device and tier.

use crate::common;
use crate::common::tolerances::LAYER;
use qlora_wgpu::internal::bench::uniform;
use qlora_wgpu::nn::Dropout;
use qlora_wgpu::nn::{AdaptedLinear, Linear, LinearGrads, LoraAdapter, LoraLinear, QLoraLinear, Scaling};
use qlora_wgpu::quant::HostMatrix;
use qlora_wgpu::quant::{DenseData, DenseMatrix, QuantOptions, QuantizedMatrix};
use qlora_wgpu::{Device, Tensor};

const M: usize = 11;
const D_OUT: usize = 20;
const D_IN: usize = 24;
const RANK: usize = 3;
const SCALE: f32 = 2.0;
const SEED: u64 = 77;

/// Inputs of the formula, in the order x, A, B, magnitude, bias.
const SIZES: [usize; 5] = [M * D_IN, RANK * D_IN, D_OUT * RANK, D_OUT, D_OUT];
const NAMES: [&str; 5] = ["dX", "dA", "dB", "dmagnitude", "dbias"];

fn weight() -> HostMatrix {
    let options = QuantOptions::nf4().double_quant();
    QuantizedMatrix::quantize(uniform(1, D_OUT * D_IN, 0.3).as_slice().into(), D_OUT, D_IN, &options).unwrap().into()
}

fn inputs() -> [Vec<f32>; 5] {
    let mut inputs: [Vec<f32>; 5] =
        std::array::from_fn(|i| uniform(10 + i as u64, SIZES[i], if i == 0 { 1.0 } else { 0.2 }));
    // A magnitude is near its row's length.
    inputs[3].iter_mut().for_each(|value| *value += 1.0);
    inputs
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

/// left [rows, inner] * right^T, with right [cols, inner].
fn times_transposed(left: &[f64], right: &[f64], inner: usize) -> Vec<f64> {
    let dot = |l: &[f64], r: &[f64]| l.iter().zip(r).map(|(l, r)| l * r).sum::<f64>();
    left.chunks(inner).flat_map(|l| right.chunks(inner).map(move |r| dot(l, r))).collect()
}

/// The layer in PEFT's form: base(x) + bias + (c - 1) * base(xd) + c * s * B(A(xd)), with c = m /
/// norm and a given norm.
fn forward(w: &[f64], [x, a, b, magnitude, bias]: [&[f64]; 5], norm: Option<&[f64]>, probability: f32) -> Vec<f64> {
    let dropout = Dropout { probability, seed: SEED };
    let xd: Vec<f64> = (0..).zip(x).map(|(i, x)| x * f64::from(dropout.factor(i))).collect();
    let (base, dropped) = (times_transposed(x, w, D_IN), times_transposed(&xd, w, D_IN));
    let up = times_transposed(&times_transposed(&xd, a, D_IN), b, RANK);
    let value = |i: usize| {
        let n = i % D_OUT;
        let c = norm.map_or(1.0, |norm| magnitude[n] / norm[n]);
        base[i] + bias[n] + (c - 1.0) * dropped[i] + c * f64::from(SCALE) * up[i]
    };
    (0..M * D_OUT).map(value).collect()
}

/// Row norms of W + s * B * A.
fn norms(w: &[f64], a: &[f64], b: &[f64]) -> Vec<f64> {
    let merged = |i: usize| {
        let (n, k) = (i / D_IN, i % D_IN);
        w[i] + f64::from(SCALE) * (0..RANK).map(|j| b[n * RANK + j] * a[j * D_IN + k]).sum::<f64>()
    };
    (0..D_OUT).map(|n| (n * D_IN..(n + 1) * D_IN).map(|i| merged(i).powi(2)).sum::<f64>().sqrt()).collect()
}

/// Returns y, and the gradients of <dY, y> by central differences. The norm is fixed at its value
/// for the inputs.
fn wanted(inputs: &[Vec<f32>; 5], dy: &[f32], dora: bool, probability: f32) -> (Vec<f64>, [Vec<f64>; 5]) {
    let mut dense = vec![0.0; D_OUT * D_IN];
    weight().dequantize_rows(0..D_OUT, &mut dense);
    let (w, dy) = (wide(&dense), wide(dy));
    let at: Vec<Vec<f64>> = inputs.iter().map(|values| wide(values)).collect();
    let norm = dora.then(|| norms(&w, &at[1], &at[2]));
    let y = |at: &[Vec<f64>]| forward(&w, std::array::from_fn(|i| at[i].as_slice()), norm.as_deref(), probability);
    let objective = |at: &[Vec<f64>]| y(at).iter().zip(&dy).map(|(y, dy)| y * dy).sum::<f64>();
    let gradients = std::array::from_fn(|which| {
        let slope = |i: usize| {
            let moved = |by: f64| {
                let mut at = at.clone();
                at[which][i] += by;
                objective(&at)
            };
            (moved(1e-3) - moved(-1e-3)) / 2e-3
        };
        (0..SIZES[which]).map(slope).collect()
    });
    (y(&at), gradients)
}

fn layer(device: &Device, inputs: &[Vec<f32>; 5], dora: bool, probability: f32) -> Linear {
    let tensor = |shape: &[usize], which: usize| Tensor::from_slice(device, shape, &inputs[which]).unwrap();
    let (a, b) = (tensor(&[RANK, D_IN], 1), tensor(&[D_OUT, RANK], 2));
    let mut adapter = LoraAdapter::from_tensors(a, b, SCALE * RANK as f32, Scaling::Standard).unwrap();
    adapter = adapter.with_dropout(probability).unwrap();
    if dora {
        adapter = adapter.with_magnitude(tensor(&[D_OUT], 3)).unwrap();
    }
    let layer = Linear::new(device, weight()).unwrap().with_bias(&inputs[4]).unwrap();
    layer.with_trained_bias().with_adapter("default", adapter).unwrap()
}

fn by_name(grads: &LinearGrads) -> [Option<&Tensor>; 5] {
    [&grads.dx, &grads.da, &grads.db, &grads.dmagnitude, &grads.dbias].map(Option::as_ref)
}

fn assert_near(context: &str, got: &[f32], wanted: &[f64], relative: f64) {
    assert_eq!(got.len(), wanted.len(), "{context}");
    let largest = wanted.iter().fold(0.0f64, |most, value| most.max(value.abs()));
    for (i, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        assert!((f64::from(*got) - wanted).abs() <= relative * largest, "{context}: [{i}] got {got}, wanted {wanted}");
    }
}

fn check(dora: bool, probability: f32) {
    let inputs = inputs();
    let dy = uniform(20, M * D_OUT, 1.0);
    let (y_wanted, gradients) = wanted(&inputs, &dy, dora, probability);
    for device in common::devices() {
        let context = format!("{} dora {dora} dropout {probability}", common::name(&device));
        let layer = layer(&device, &inputs, dora, probability);
        let x = Tensor::from_slice(&device, &[M, D_IN], &inputs[0]).unwrap();
        let (y, saved) = layer.forward_train(&x, SEED).unwrap();
        assert_near(&format!("{context} y"), &y.to_vec().unwrap(), &y_wanted, LAYER.on(&device));
        // Gradients as small as those of a long mean, and as large as those of a scaled loss.
        for size in [1.0, 1e-8, 1e4] {
            let scaled: Vec<f32> = dy.iter().map(|dy| dy * size).collect();
            let dy = Tensor::from_slice(&device, &[M, D_OUT], &scaled).unwrap();
            let grads = layer.backward(&dy, &saved, true).unwrap();
            for ((name, got), wanted) in NAMES.into_iter().zip(by_name(&grads)).zip(&gradients) {
                let context = format!("{context} dY {size} {name}");
                if name == "dmagnitude" && !dora {
                    assert!(got.is_none(), "{context}");
                    continue;
                }
                let wanted: Vec<f64> = wanted.iter().map(|wanted| wanted * f64::from(size)).collect();
                assert_near(&context, &got.unwrap().to_vec().unwrap(), &wanted, LAYER.on(&device));
            }
            assert!(layer.backward(&dy, &saved, false).unwrap().dx.is_none());
        }
    }
}

#[test]
fn lora() {
    check(false, 0.0);
}

#[test]
fn lora_with_dropout() {
    check(false, 0.3);
}

#[test]
fn dora() {
    check(true, 0.0);
}

#[test]
fn dora_with_dropout() {
    check(true, 0.3);
}

#[test]
fn a_frozen_layer_gives_the_input_s_gradient_alone() {
    for device in common::devices() {
        let layer = Linear::new(&device, weight()).unwrap().with_bias(&[0.5; D_OUT]).unwrap();
        let x = Tensor::from_slice(&device, &[M, D_IN], &inputs()[0]).unwrap();
        let dy = Tensor::from_slice(&device, &[M, D_OUT], &uniform(20, M * D_OUT, 1.0)).unwrap();
        let (_, saved) = layer.forward_train(&x, 0).unwrap();
        let grads = layer.backward(&dy, &saved, true).unwrap();
        assert_eq!(by_name(&grads).map(|tensor| tensor.is_some()), [true, false, false, false, false]);
        let mut dense = vec![0.0; D_OUT * D_IN];
        weight().dequantize_rows(0..D_OUT, &mut dense);
        let columns: Vec<f64> = (0..D_OUT * D_IN).map(|i| f64::from(dense[i % D_OUT * D_IN + i / D_OUT])).collect();
        let wanted = times_transposed(&wide(&uniform(20, M * D_OUT, 1.0)), &columns, D_OUT);
        assert_near(&common::name(&device), &grads.dx.unwrap().to_vec().unwrap(), &wanted, LAYER.on(&device));
        assert!(layer.parameters().next().is_none());
        let wrong = Tensor::zeros(&device, &[M + 1, D_OUT]).unwrap();
        assert_eq!(
            layer.backward(&wrong, &saved, true).unwrap_err().to_string(),
            "linear layer's backward: dY: expected [11, 20], got [12, 20]"
        );
    }
}

#[test]
fn no_tokens_have_zero_gradients() {
    for device in common::devices() {
        let layer = layer(&device, &inputs(), true, 0.2);
        let (y, saved) = layer.forward_train(&Tensor::zeros(&device, &[0, D_IN]).unwrap(), 1).unwrap();
        assert_eq!(y.shape(), [0, D_OUT]);
        let grads = layer.backward(&y, &saved, true).unwrap();
        for (tensor, size) in by_name(&grads).into_iter().zip([0, SIZES[1], SIZES[2], SIZES[3], SIZES[4]]) {
            assert_eq!(tensor.unwrap().to_vec().unwrap(), vec![0.0; size], "{}", common::name(&device));
        }
    }
}

/// A step of plain gradient descent through `parameters_mut` lowers <y, y>, and a new DoRA adapter
/// changes nothing.
#[test]
fn parameters_are_updated_by_name_and_dora_starts_as_the_base() {
    for device in common::devices() {
        let context = common::name(&device);
        let inputs = inputs();
        let x = Tensor::from_slice(&device, &[M, D_IN], &inputs[0]).unwrap();
        let tensor = |shape: &[usize], which: usize| Tensor::from_slice(&device, shape, &inputs[which]).unwrap();
        let (a, b) = (tensor(&[RANK, D_IN], 1), tensor(&[D_OUT, RANK], 2));
        let lora = LoraAdapter::from_tensors(a, b, SCALE * RANK as f32, Scaling::Standard).unwrap();
        let new = |adapter| Linear::new(&device, weight()).unwrap().with_adapter("default", adapter).unwrap();
        let (plain, mut layer) = (new(lora.clone()), new(lora.with_dora()));
        let wanted = wide(&plain.forward(&x).unwrap().to_vec().unwrap());
        assert_near(&context, &layer.forward(&x).unwrap().to_vec().unwrap(), &wanted, LAYER.on(&device));
        let names = |layer: &Linear| layer.parameters().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names(&layer), ["lora_A", "lora_B", "lora_magnitude_vector"]);
        assert_eq!(layer.trainable_params().len(), 3);
        assert_eq!(layer.active_adapter().unwrap().parameter_count(), SIZES[1..4].iter().sum::<usize>());

        let norm =
            |layer: &Linear| layer.forward(&x).unwrap().to_vec().unwrap().iter().map(|y| f64::from(y * y)).sum::<f64>();
        let before = norm(&layer);
        let (y, saved) = layer.forward_train(&x, 0).unwrap();
        let grads = layer.backward(&y, &saved, false).unwrap();
        let by_parameter = [grads.da, grads.db, grads.dmagnitude];
        for ((_, parameter), gradient) in layer.parameters_mut().zip(by_parameter) {
            let (values, gradient) = (parameter.to_vec().unwrap(), gradient.unwrap().to_vec().unwrap());
            let moved: Vec<f32> = values.iter().zip(gradient).map(|(value, slope)| value - 1e-3 * slope).collect();
            **parameter = Tensor::from_slice(&device, parameter.shape(), &moved).unwrap();
        }
        let after = norm(&layer);
        assert!(after < 0.99 * before, "{context}: {before} to {after}");
    }
}

#[test]
fn dora_merges_into_its_rows_and_out_again() {
    let inputs = inputs();
    for device in common::devices() {
        let context = common::name(&device);
        let x = Tensor::from_slice(&device, &[M, D_IN], &inputs[0]).unwrap();
        let of = |layer: &Linear| wide(&layer.forward(&x).unwrap().to_vec().unwrap());
        let adapted = layer(&device, &inputs, true, 0.0);
        let merged = adapted.merge_to_f32().unwrap();
        // Its rows' lengths equal the magnitude.
        let lengths: Vec<f32> = merged.rows().into_iter().map(|row| row.dot(&row).sqrt()).collect();
        assert_near(&context, &lengths, &wide(&inputs[3]), 1e-5);

        let dense = |values: Vec<f32>| DenseMatrix::new(D_OUT, D_IN, DenseData::F32(values)).unwrap();
        let plain = dense(merged.into_raw_vec_and_offset().0);
        let alone = Linear::new(&device, HostMatrix::from(plain)).unwrap().with_bias(&inputs[4]).unwrap();
        let got = alone.forward(&x).unwrap().to_vec().unwrap();
        assert_near(&context, &got, &of(&adapted), 2.0 * LAYER.on(&device));

        let mut values = vec![0.0; D_OUT * D_IN];
        weight().dequantize_rows(0..D_OUT, &mut values);
        let adapter = adapted.active_adapter().unwrap().clone();
        let mut lora = LoraLinear::new(&device, dense(values.clone())).unwrap().with_adapter("a", adapter).unwrap();
        let before = lora.forward(&x).unwrap().to_vec().unwrap();
        lora.merge().unwrap();
        let after = lora.forward(&x).unwrap().to_vec().unwrap();
        assert_near(&context, &after, &wide(&before), 2.0 * LAYER.on(&device));
        lora.unmerge().unwrap();
        lora.deactivate().unwrap();
        let back: Vec<f32> = lora.merge_to_f32().unwrap().into_raw_vec_and_offset().0;
        assert_near(&context, &back, &wide(&values), 1e-6);

        let zero = Tensor::zeros(&device, &[D_OUT]).unwrap();
        let adapter = lora.remove_adapter("a").unwrap().with_magnitude(zero).unwrap();
        let mut lost = lora.with_adapter("a", adapter).unwrap();
        assert_eq!(
            lost.merge().unwrap_err().to_string(),
            "merge: DoRA's factor is zero or not finite in a row; the merge couldn't be undone"
        );
    }
}

#[test]
fn the_saved_pass_keeps_its_values_through_an_update() {
    let device = Device::cpu();
    let (inputs, dy) = (inputs(), uniform(20, M * D_OUT, 1.0));
    let mut layer = layer(&device, &inputs, true, 0.0);
    let x = Tensor::from_slice(&device, &[M, D_IN], &inputs[0]).unwrap();
    let dy = Tensor::from_slice(&device, &[M, D_OUT], &dy).unwrap();
    let (_, saved) = layer.forward_train(&x, SEED).unwrap();
    let gradients = |layer: &AdaptedLinear<_>| {
        let grads = layer.backward(&dy, &saved, true).unwrap();
        by_name(&grads).map(|tensor| tensor.unwrap().to_vec().unwrap())
    };
    let before = gradients(&layer);
    layer.adapter_mut("default").unwrap().edit(|mut a, _| a.fill(9.0)).unwrap();
    assert_eq!(gradients(&layer), before);
}

#[test]
fn dora_s_first_magnitude_is_that_of_the_base() {
    let device = Device::cpu();
    let quantized = QLoraLinear::quantize(&device, ndarray::Array2::ones((4, 32)).view(), &QuantOptions::nf4());
    let adapter = LoraAdapter::from_tensors(
        Tensor::zeros(&device, &[1, 32]).unwrap(),
        Tensor::zeros(&device, &[4, 1]).unwrap(),
        1.0,
        Scaling::Standard,
    );
    let adapted = quantized.unwrap().with_adapter("default", adapter.unwrap().with_dora()).unwrap();
    let magnitude = adapted.active_adapter().unwrap().magnitude().unwrap().to_vec().unwrap();
    // A base of ones is exact in 4 bits.
    assert_eq!(magnitude, [32.0f32.sqrt(); 4]);
}
