//! Linear layers with LoRA adapters on a frozen base: y = x * W^T + bias + s * dropout(x) * A^T * B^T.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::Arc;

use ndarray::{Array2, ArrayView2};

use super::adapter::LoraAdapter;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::dequantize::{Delta, dequantize};
use crate::kernels::lora_down::{Dropout, lora_down};
use crate::kernels::matrix::{DeviceMatrix, HostMatrix};
use crate::kernels::qmatmul::qmatmul;
use crate::kernels::{LoraUp, expect_shape};
use crate::quant::{DenseData, DenseMatrix, QuantOptions, QuantizedMatrix};
use crate::tensor::Tensor;

const OP: &str = "linear layer";

/// A dense frozen base.
#[derive(Clone, Copy, Debug)]
pub enum DenseBase {}

/// A 4-bit frozen base.
#[derive(Clone, Copy, Debug)]
pub enum QuantizedBase {}

/// A linear layer with a dense base.
pub type LoraLinear = AdaptedLinear<DenseBase>;

/// A linear layer with a 4-bit base: there is one packed copy of it, on the layer's device.
pub type QLoraLinear = AdaptedLinear<QuantizedBase>;

/// A frozen base [d_out, d_in] with named LoRA adapters, of which at most one is active. See [`LoraLinear`] and
/// [`QLoraLinear`].
#[derive(Clone)]
pub struct AdaptedLinear<Base> {
    base: DeviceMatrix,
    bias: Option<Tensor>,
    adapters: BTreeMap<String, LoraAdapter>,
    active: Option<String>,
    /// The adapter as it was when it was merged into the base.
    merged: Option<LoraAdapter>,
    kind: PhantomData<Base>,
}

/// What a layer takes in memory, in bytes. What is counted is what is resident on `device`, padding included.
#[derive(Clone, Debug, PartialEq)]
pub struct MemoryStats {
    /// Where.
    pub device: String,
    /// The base as f32.
    pub base_unquantized_bytes: u64,
    /// The base as it is.
    pub base_quantized_bytes: u64,
    /// All adapters.
    pub lora_bytes: u64,
    /// The bias.
    pub bias_bytes: u64,
    /// Everything.
    pub total_bytes: u64,
    /// `base_unquantized_bytes / base_quantized_bytes`.
    pub compression_ratio: f64,
}

impl<Base> AdaptedLinear<Base> {
    fn with_base(device: &Device, base: impl Into<Arc<HostMatrix>>) -> Result<Self> {
        let base = DeviceMatrix::new(device, base)?;
        Ok(AdaptedLinear { base, bias: None, adapters: BTreeMap::new(), active: None, merged: None, kind: PhantomData })
    }

    /// The same layer with a bias of `d_out` values.
    ///
    /// # Errors
    /// [`Error::Shape`], and the device's own.
    pub fn with_bias(mut self, bias: &[f32]) -> Result<Self> {
        let bias = Tensor::from_slice(&self.device(), &[bias.len()], bias)?;
        expect_shape(OP, "bias", &bias, &[self.d_out()])?;
        self.bias = Some(bias);
        Ok(self)
    }

    /// The same layer with this adapter added and active.
    ///
    /// # Errors
    /// As [`AdaptedLinear::add_adapter`].
    pub fn with_adapter(mut self, name: &str, adapter: LoraAdapter) -> Result<Self> {
        self.add_adapter(name, adapter)?;
        self.activate(name)?;
        Ok(self)
    }

    /// Adds an adapter, or replaces the one of that name. Does not activate it.
    ///
    /// # Errors
    /// [`Error::Shape`] if it is for a layer of another shape, [`Error::DeviceMismatch`].
    pub fn add_adapter(&mut self, name: &str, adapter: LoraAdapter) -> Result<()> {
        if (adapter.d_out(), adapter.d_in()) != (self.d_out(), self.d_in()) {
            return Err(Error::Shape {
                op: "adding an adapter",
                what: "layer [d_out, d_in]",
                expected: format!("[{}, {}]", self.d_out(), self.d_in()),
                got: format!("[{}, {}]", adapter.d_out(), adapter.d_in()),
            });
        }
        self.device().same(&adapter.a().device(), "adding an adapter")?;
        self.adapters.insert(name.to_owned(), adapter);
        Ok(())
    }

    /// Removes an adapter; if it was active, none is.
    ///
    /// # Errors
    /// [`Error::NoSuchAdapter`].
    pub fn remove_adapter(&mut self, name: &str) -> Result<LoraAdapter> {
        let adapter = self.adapters.remove(name).ok_or_else(|| self.no_such(name))?;
        self.active.take_if(|active| active == name);
        Ok(adapter)
    }

    /// Uses this adapter from now on. Costs nothing: the base stays as it is.
    ///
    /// # Errors
    /// [`Error::NoSuchAdapter`]; [`Error::Invalid`] while an adapter is merged into the base.
    pub fn activate(&mut self, name: &str) -> Result<()> {
        self.adapter(name)?;
        self.check_unmerged("activating an adapter")?;
        self.active = Some(name.to_owned());
        Ok(())
    }

    /// Uses the base alone from now on.
    ///
    /// # Errors
    /// [`Error::Invalid`] while an adapter is merged into the base.
    pub fn deactivate(&mut self) -> Result<()> {
        self.check_unmerged("deactivating the adapter")?;
        self.active = None;
        Ok(())
    }

    fn check_unmerged(&self, op: &'static str) -> Result<()> {
        if !self.is_merged() {
            return Ok(());
        }
        let expected = "unmerge it first: its base contains an adapter".into();
        Err(Error::Invalid { op, what: "the layer", got: "merged".into(), expected })
    }

    /// The active adapter's name.
    pub fn active(&self) -> Option<&str> {
        self.active.as_deref()
    }

    /// The active adapter.
    pub fn active_adapter(&self) -> Option<&LoraAdapter> {
        self.active.as_ref().and_then(|name| self.adapters.get(name))
    }

    /// Names of all adapters, in order.
    pub fn adapter_names(&self) -> impl Iterator<Item = &str> {
        self.adapters.keys().map(String::as_str)
    }

    /// An adapter.
    ///
    /// # Errors
    /// [`Error::NoSuchAdapter`].
    pub fn adapter(&self, name: &str) -> Result<&LoraAdapter> {
        self.adapters.get(name).ok_or_else(|| self.no_such(name))
    }

    /// An adapter, to change it.
    ///
    /// # Errors
    /// [`Error::NoSuchAdapter`].
    pub fn adapter_mut(&mut self, name: &str) -> Result<&mut LoraAdapter> {
        let error = self.no_such(name);
        self.adapters.get_mut(name).ok_or(error)
    }

    fn no_such(&self, name: &str) -> Error {
        let loaded: Vec<_> = self.adapter_names().collect();
        let loaded = if loaded.is_empty() { "none".to_owned() } else { loaded.join(", ") };
        Error::NoSuchAdapter { name: name.to_owned(), loaded }
    }

    /// Where the layer is.
    pub fn device(&self) -> Device {
        self.base.device()
    }

    /// Columns of the base: values of an input row.
    pub fn d_in(&self) -> usize {
        self.base.cols()
    }

    /// Rows of the base: values of an output row.
    pub fn d_out(&self) -> usize {
        self.base.rows()
    }

    /// The bias, `d_out` values.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The base on its device.
    pub fn base(&self) -> &DeviceMatrix {
        &self.base
    }

    /// The rank of the active adapter; 0 without one.
    pub fn rank(&self) -> usize {
        self.active_adapter().map_or(0, LoraAdapter::rank)
    }

    /// The scale of the active adapter; 0 without one.
    pub fn scale(&self) -> f32 {
        self.active_adapter().map_or(0.0, LoraAdapter::scale)
    }

    /// What an optimizer trains: A and B of the active adapter.
    pub fn trainable_params(&self) -> Vec<&Tensor> {
        self.active_adapter().map_or_else(Vec::new, |adapter| vec![adapter.a(), adapter.b()])
    }

    /// Y [M, d_out] of X [M, d_in], without dropout.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DeviceMismatch`], and the device's own.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, None)
    }

    /// As [`AdaptedLinear::forward`], with the active adapter's dropout. The same seed drops the same values, on every
    /// device.
    ///
    /// # Errors
    /// As [`AdaptedLinear::forward`]; [`Error::Invalid`] while an adapter is merged into the base.
    pub fn forward_train(&self, x: &Tensor, seed: u64) -> Result<Tensor> {
        self.check_unmerged("a training pass")?;
        self.run(x, Some(seed))
    }

    /// As [`AdaptedLinear::forward`], from host memory and back.
    pub fn forward_array(&self, x: ArrayView2<'_, f32>) -> Result<Array2<f32>> {
        self.forward(&Tensor::from_array(&self.device(), &x)?)?.to_array2()
    }

    fn run(&self, x: &Tensor, seed: Option<u64>) -> Result<Tensor> {
        let adapter = self.active_adapter().filter(|_| self.merged.is_none());
        let Some(adapter) = adapter else { return qmatmul(x, &self.base, self.bias.as_ref(), None) };
        let dropout = seed.map(|seed| Dropout { probability: adapter.dropout(), seed });
        let h = lora_down(x, adapter.a(), dropout)?;
        let lora = LoraUp { h: &h, b: adapter.b(), scale: adapter.scale() };
        qmatmul(x, &self.base, self.bias.as_ref(), Some(lora))
    }

    /// W + s * B * A of the active adapter as f32, [d_out, d_in], computed on the layer's device: what an export
    /// writes.
    pub fn merge_to_f32(&self) -> Result<Array2<f32>> {
        let adapter = self.active_adapter().filter(|_| self.merged.is_none());
        dequantize(&self.base, adapter.map(|adapter| delta(adapter, 1.0)))
    }

    /// Whether an adapter has been merged into the base.
    pub fn is_merged(&self) -> bool {
        self.merged.is_some()
    }

    /// What the layer takes in memory.
    pub fn memory_stats(&self) -> MemoryStats {
        let base = self.base.resident_bytes();
        let lora = self.adapters.values().map(LoraAdapter::resident_bytes).sum();
        let bias = self.bias.as_ref().map_or(0, Tensor::resident_bytes);
        let unquantized = 4 * (self.d_in() * self.d_out()) as u64;
        MemoryStats {
            device: self.device().name().to_owned(),
            base_unquantized_bytes: unquantized,
            base_quantized_bytes: base,
            lora_bytes: lora,
            bias_bytes: bias,
            total_bytes: base + lora + bias,
            compression_ratio: unquantized as f64 / base as f64,
        }
    }
}

fn delta(adapter: &LoraAdapter, sign: f32) -> Delta<'_> {
    Delta { a: adapter.a(), b: adapter.b(), scale: sign * adapter.scale() }
}

impl LoraLinear {
    /// A layer with this dense base and no adapter yet.
    ///
    /// # Errors
    /// The device's own.
    pub fn new(device: &Device, base: DenseMatrix) -> Result<LoraLinear> {
        LoraLinear::with_base(device, HostMatrix::from(base))
    }

    /// As [`LoraLinear::new`], from an f32 array [d_out, d_in].
    pub fn from_array(device: &Device, weight: ArrayView2<'_, f32>) -> Result<LoraLinear> {
        let (rows, cols) = weight.dim();
        LoraLinear::new(device, DenseMatrix::new(rows, cols, DenseData::F32(weight.iter().copied().collect()))?)
    }

    /// Adds s * B * A of the active adapter to the base; the layer then computes with the base alone.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no active adapter, one is merged already, or the base is not f32 (rounding would
    /// make it impossible to undo: see [`AdaptedLinear::merge_to_f32`]).
    pub fn merge(&mut self) -> Result<()> {
        let adapter = self.active_adapter().cloned();
        let Some(adapter) = adapter.filter(|_| self.merged.is_none()) else {
            let got = if self.is_merged() { "merged already" } else { "without an active adapter" };
            return Err(merge_error("the layer", got, "merge takes an active adapter that is not merged yet"));
        };
        self.shift_base(&adapter, 1.0)?;
        self.merged = Some(adapter);
        Ok(())
    }

    /// Takes the merged adapter out of the base again, to within f32 rounding.
    ///
    /// # Errors
    /// [`Error::Invalid`] if none is merged.
    pub fn unmerge(&mut self) -> Result<()> {
        let Some(adapter) = self.merged.clone() else {
            return Err(merge_error("the layer", "not merged", "unmerge takes a merged one"));
        };
        self.shift_base(&adapter, -1.0)?;
        self.merged = None;
        Ok(())
    }

    fn shift_base(&mut self, adapter: &LoraAdapter, sign: f32) -> Result<()> {
        if !self.base.is_f32() {
            return Err(merge_error("the base", "not f32", "only f32 can be merged in place and unmerged"));
        }
        let (rows, cols) = (self.d_out(), self.d_in());
        let values = dequantize(&self.base, Some(delta(adapter, sign)))?.into_raw_vec_and_offset().0;
        let base = DenseMatrix::new(rows, cols, DenseData::F32(values))?;
        self.base = DeviceMatrix::new(&self.device(), HostMatrix::from(base))?;
        Ok(())
    }
}

fn merge_error(what: &'static str, got: &str, expected: &str) -> Error {
    Error::Invalid { op: "merge", what, got: got.to_owned(), expected: expected.to_owned() }
}

impl QLoraLinear {
    /// A layer with this 4-bit base and no adapter yet.
    ///
    /// # Errors
    /// The device's own.
    pub fn new(device: &Device, base: QuantizedMatrix) -> Result<QLoraLinear> {
        QLoraLinear::with_base(device, HostMatrix::from(base))
    }

    /// Quantizes an f32 array [d_out, d_in] and makes it the base.
    ///
    /// # Errors
    /// [`Error::NonFinite`] with the first bad index, [`Error::Invalid`] for the options, and the device's own.
    pub fn quantize(device: &Device, weight: ArrayView2<'_, f32>, options: &QuantOptions) -> Result<QLoraLinear> {
        let (rows, cols) = weight.dim();
        let standard = weight.as_standard_layout();
        let values = standard.as_slice().unwrap_or_default();
        QLoraLinear::new(device, QuantizedMatrix::quantize(values.into(), rows, cols, options)?)
    }

    /// Quantizes the base of a LoRA layer; its bias and adapters come along.
    ///
    /// # Errors
    /// [`Error::Invalid`] if an adapter is merged into the base (it would count twice); as
    /// [`QLoraLinear::quantize`].
    pub fn from_lora(layer: LoraLinear, options: &QuantOptions) -> Result<QLoraLinear> {
        if layer.is_merged() {
            return Err(merge_error("the layer", "merged", "unmerge it before its base is quantized"));
        }
        let host = layer.base.to_host()?;
        let HostMatrix::Dense(dense) = &*host else {
            return Err(merge_error("the base", "4-bit", "a LoRA layer has a dense one"));
        };
        let (rows, cols) = (dense.rows(), dense.cols());
        let quantized = match dense.data() {
            DenseData::F32(values) => QuantizedMatrix::quantize(values.as_slice().into(), rows, cols, options),
            DenseData::F16(values) => QuantizedMatrix::quantize(values.as_slice().into(), rows, cols, options),
            DenseData::Bf16(values) => QuantizedMatrix::quantize(values.as_slice().into(), rows, cols, options),
            DenseData::Q8_0 { .. } => QuantizedMatrix::quantize(dense.to_f32().as_slice().into(), rows, cols, options),
        }?;
        let base = DeviceMatrix::new(&layer.device(), HostMatrix::from(quantized))?;
        let AdaptedLinear { bias, adapters, active, .. } = layer;
        Ok(AdaptedLinear { base, bias, adapters, active, merged: None, kind: PhantomData })
    }

    /// The packed base as it is on the host; from a GPU it is read back, to the bit.
    pub fn base_weight_quantized(&self) -> Result<Arc<HostMatrix>> {
        self.base.to_host()
    }

    /// Whether the base's scales are quantized too.
    pub fn is_double_quantized(&self) -> bool {
        self.base.is_double_quantized()
    }
}
