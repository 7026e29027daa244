//! Layers from a library user's view: several adapters, dropout, merging, bad input; on every
//! device and tier.

use crate::common;
use ndarray::Array2;
use qlora_wgpu::internal::bench::uniform;
use qlora_wgpu::nn::Dropout;
use qlora_wgpu::nn::{LoraAdapter, LoraConfig, LoraInit, LoraLinear, QLoraLinear, Scaling};
use qlora_wgpu::quant::{DenseData, DenseMatrix, QuantOptions};
use qlora_wgpu::{Device, Error, Tensor};

const D_OUT: usize = 48;
const D_IN: usize = 72;

fn weight() -> Array2<f32> {
    Array2::from_shape_vec((D_OUT, D_IN), uniform(1, D_OUT * D_IN, 0.3)).unwrap()
}

fn inputs(rows: usize) -> Array2<f32> {
    Array2::from_shape_vec((rows, D_IN), uniform(2, rows * D_IN, 1.0)).unwrap()
}

fn adapter(device: &Device, seed: u64, rank: usize) -> LoraAdapter {
    let a = Tensor::from_slice(device, &[rank, D_IN], &uniform(seed, rank * D_IN, 0.2)).unwrap();
    let b = Tensor::from_slice(device, &[D_OUT, rank], &uniform(seed + 1, D_OUT * rank, 0.2)).unwrap();
    LoraAdapter::from_tensors(a, b, 2.0 * rank as f32, Scaling::Standard).unwrap()
}

fn assert_same(context: &str, got: &Array2<f32>, wanted: &Array2<f32>, allowed: f32) {
    assert_eq!(got.dim(), wanted.dim(), "{context}");
    for (at, wanted) in wanted.indexed_iter() {
        assert!((got[at] - wanted).abs() <= allowed, "{context}: {at:?} got {}, wanted {wanted}", got[at]);
    }
}

/// Maximum error of one layer with f16 operands in these shapes.
fn allowed(device: &Device) -> f32 {
    if common::is_f16(device) { 4e-3 } else { 3e-6 }
}

#[test]
fn adapters_switch_at_run_time_and_share_the_base() {
    let x = inputs(11);
    for device in common::devices() {
        let context = common::name(&device);
        let mut layer = QLoraLinear::quantize(&device, weight().view(), &QuantOptions::nf4().double_quant()).unwrap();
        let alone = layer.forward_array(x.view()).unwrap();
        let base_bytes = layer.memory_stats().base_quantized_bytes;
        layer.add_adapter("small", adapter(&device, 10, 2)).unwrap();
        layer.add_adapter("large", adapter(&device, 20, 19)).unwrap();
        assert_eq!(layer.adapter_names().collect::<Vec<_>>(), ["large", "small"]);
        assert_eq!(layer.active(), None);
        assert_eq!(layer.forward_array(x.view()).unwrap(), alone, "{context}: none is active yet");
        for name in ["small", "large", "small"] {
            layer.activate(name).unwrap();
            let chosen = layer.adapter(name).unwrap();
            let (a, b) = (chosen.a().to_array2().unwrap(), chosen.b().to_array2().unwrap());
            let wanted = &alone + &(x.dot(&a.t()).dot(&b.t()) * chosen.scale());
            assert_same(
                &format!("{context} {name}"),
                &layer.forward_array(x.view()).unwrap(),
                &wanted,
                allowed(&device),
            );
        }
        assert_eq!(layer.memory_stats().base_quantized_bytes, base_bytes);
        layer.deactivate().unwrap();
        assert_eq!(layer.forward_array(x.view()).unwrap(), alone, "{context}");
        layer.activate("large").unwrap();
        layer.remove_adapter("large").unwrap();
        assert_eq!((layer.active(), layer.rank()), (None, 0));
        let error = layer.activate("large").unwrap_err();
        assert!(
            matches!(&error, Error::NoSuchAdapter { name, loaded } if name == "large" && loaded == "small"),
            "{error}"
        );
    }
}

#[test]
fn dropout_is_the_same_on_every_device_and_off_in_eval() {
    let x = inputs(9);
    let dense = DenseMatrix::new(D_OUT, D_IN, DenseData::F32(weight().into_raw_vec_and_offset().0)).unwrap();
    for device in common::devices() {
        let context = common::name(&device);
        let adapter = adapter(&device, 30, 4).with_dropout(0.25).unwrap();
        let (a, b) = (adapter.a().to_array2().unwrap(), adapter.b().to_array2().unwrap());
        let layer = LoraLinear::new(&device, dense.clone()).unwrap().with_adapter("default", adapter).unwrap();
        let x_tensor = Tensor::from_array(&device, &x).unwrap();
        let train = |seed| layer.forward_train(&x_tensor, seed).unwrap().0.to_array2().unwrap();
        let dropout = Dropout { probability: 0.25, seed: 77 };
        let mut dropped = x.clone();
        dropped.iter_mut().enumerate().for_each(|(i, value)| *value *= dropout.factor(i as u32));
        let up = |x: &Array2<f32>| x.dot(&a.t()).dot(&b.t()) * 2.0;
        let base = x.dot(&weight().t());
        assert_same(&context, &train(77), &(&base + &up(&dropped)), allowed(&device));
        assert_eq!(train(77), train(77), "{context}: the same seed, the same bytes");
        assert_ne!(train(77), train(78), "{context}");
        assert_same(&context, &layer.forward_array(x.view()).unwrap(), &(&base + &up(&x)), allowed(&device));
    }
}

#[test]
fn merge_and_unmerge_of_a_dense_base() {
    let x = inputs(12);
    for device in common::devices() {
        let context = common::name(&device);
        let layer = LoraLinear::from_array(&device, weight().view()).unwrap();
        let mut layer = layer.with_adapter("default", adapter(&device, 40, 5)).unwrap();
        let before = layer.forward_array(x.view()).unwrap();
        let merged = layer.merge_to_f32().unwrap();
        assert_eq!(
            layer.unmerge().unwrap_err().to_string(),
            "merge: the layer is not merged; unmerge needs a merged layer"
        );
        layer.merge().unwrap();
        assert!(layer.is_merged());
        assert_eq!(
            layer.merge().unwrap_err().to_string(),
            "merge: the layer is merged already; merge needs an active adapter that isn't merged yet"
        );
        assert_same(&context, &layer.forward_array(x.view()).unwrap(), &before, 2.0 * allowed(&device));
        assert_eq!(layer.merge_to_f32().unwrap(), merged, "{context}: an export of a merged layer is the base");
        let quantized = QLoraLinear::from_lora(layer.clone(), &QuantOptions::nf4());
        assert_eq!(
            quantized.err().unwrap().to_string(),
            "merge: the layer is merged; unmerge it before its base is quantized"
        );
        let refused = [layer.activate("default"), layer.deactivate()];
        assert!(refused.iter().all(|result| result.as_ref().unwrap_err().to_string().contains("unmerge")), "{context}");
        let x_tensor = Tensor::from_array(&device, &x).unwrap();
        assert_eq!(
            layer.forward_train(&x_tensor, 1).err().unwrap().to_string(),
            "a training pass: the layer is merged; an adapter is merged into its base; unmerge it first"
        );
        // Unmerging removes the adapter as it was when merged, even if it has changed since.
        layer.adapter_mut("default").unwrap().edit(|_, mut b| b.fill(9.0)).unwrap();
        layer.unmerge().unwrap();
        assert!(!layer.is_merged());
        layer.deactivate().unwrap();
        assert_same(&context, &layer.merge_to_f32().unwrap(), &weight(), 1e-6);
    }
}

#[test]
fn a_quantized_layer_keeps_bias_adapters_and_the_choice() {
    let device = Device::cpu();
    let mut lora = LoraLinear::from_array(&device, weight().view()).unwrap().with_bias(&[0.5; D_OUT]).unwrap();
    lora.add_adapter("a", adapter(&device, 50, 3)).unwrap();
    lora.add_adapter("b", adapter(&device, 60, 4)).unwrap();
    lora.activate("b").unwrap();
    let layer = QLoraLinear::from_lora(lora, &QuantOptions::nf4().double_quant()).unwrap();
    assert_eq!((layer.active(), layer.adapter_names().count(), layer.rank()), (Some("b"), 2, 4));
    assert_eq!(layer.bias().unwrap().to_vec().unwrap(), [0.5; D_OUT]);
    assert!(layer.is_double_quantized() && !layer.is_merged());
}

#[test]
fn the_packed_base_comes_back_from_every_device() {
    for device in common::devices() {
        for options in [QuantOptions::nf4().double_quant(), QuantOptions::fp4(), QuantOptions::int4().double_quant()] {
            let layer = QLoraLinear::quantize(&device, weight().view(), &options).unwrap();
            let cpu = QLoraLinear::quantize(&Device::cpu(), weight().view(), &options).unwrap();
            let (got, wanted) = (layer.base_weight_quantized().unwrap(), cpu.base_weight_quantized().unwrap());
            assert!(got == wanted, "{} {options:?}", common::name(&device));
        }
    }
}

#[test]
fn arrays_of_any_layout_quantize_row_major() {
    let transposed = weight();
    let columns = transposed.t().as_standard_layout().into_owned();
    let one = QLoraLinear::quantize(&Device::cpu(), columns.t(), &QuantOptions::nf4()).unwrap();
    let other = QLoraLinear::quantize(&Device::cpu(), transposed.view(), &QuantOptions::nf4()).unwrap();
    assert!(one.base_weight_quantized().unwrap() == other.base_weight_quantized().unwrap());
}

#[test]
fn bad_input_is_named() {
    let device = Device::cpu();
    let layer = QLoraLinear::quantize(&device, weight().view(), &QuantOptions::nf4()).unwrap();
    let error = layer.forward(&Tensor::zeros(&device, &[2, D_IN + 1]).unwrap()).unwrap_err().to_string();
    assert_eq!(error, "qmatmul: columns of x: expected 72 for a matrix 48 x 72, got 73");
    let wrong = LoraAdapter::new(&device, D_OUT + 1, D_IN, &LoraConfig::new(2, 1.0)).unwrap();
    let error = layer.clone().with_adapter("wrong", wrong).err().unwrap().to_string();
    assert_eq!(error, "adding an adapter: layer [d_out, d_in]: expected [48, 72], got [49, 72]");
    let error = LoraAdapter::new(&device, 2, 2, &LoraConfig::new(0, 1.0)).unwrap_err().to_string();
    assert_eq!(error, "LoRA adapter: the rank is 0; it must be at least 1");
    for block in [0, 16, 48, 8192] {
        let options = QuantOptions { block, ..QuantOptions::nf4() };
        let error = QLoraLinear::quantize(&device, weight().view(), &options).err().unwrap().to_string();
        assert!(error.contains("block") && error.contains(&block.to_string()), "{error}");
    }
    let empty = Array2::<f32>::zeros((0, 4));
    let error = QLoraLinear::quantize(&device, empty.view(), &QuantOptions::nf4()).err().unwrap().to_string();
    assert_eq!(error, "device matrix: the shape is 0 x 4; a matrix has at least one row and one column");
}

#[test]
fn no_rows_are_no_trouble() {
    for device in common::devices() {
        let layer = QLoraLinear::quantize(&device, weight().view(), &QuantOptions::nf4()).unwrap();
        let layer = layer.with_adapter("default", adapter(&device, 70, 2)).unwrap();
        let y = layer.forward(&Tensor::zeros(&device, &[0, D_IN]).unwrap()).unwrap();
        assert_eq!((y.shape(), y.to_vec().unwrap().len()), ([0, D_OUT].as_slice(), 0), "{}", common::name(&device));
    }
}

#[test]
fn seeds_make_adapters_apart_and_again() {
    let new = |seed| {
        let config = LoraConfig { init: LoraInit::KaimingUniform { seed }, ..LoraConfig::new(2, 1.0) };
        LoraAdapter::new(&Device::cpu(), 3, 4, &config).unwrap().a().to_vec().unwrap()
    };
    assert_eq!(new(5), new(5));
    assert_ne!(new(5), new(6));
}
