//! The linear layer: its base, bias and named adapters.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::{Arc, OnceLock};

use ndarray::ArrayView2;

use super::dora::DoraFactor;
use crate::autograd::Parameter;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::expect_shape;
use crate::kernels::lora::dora_norm::dora_norm;
use crate::kernels::matrix::DeviceMatrix;
use crate::nn::adapter::LoraAdapter;
use crate::quant::HostMatrix;
use crate::quant::{DenseData, DenseMatrix, QuantOptions, QuantizedMatrix};
use crate::tensor::Tensor;

const OP: &str = "linear layer";

/// A dense frozen base.
#[derive(Clone, Copy, Debug)]
pub enum DenseBase {}

/// A 4-bit frozen base.
#[derive(Clone, Copy, Debug)]
pub enum QuantizedBase {}

/// A frozen base of either kind, used for the layers of models.
#[derive(Clone, Copy, Debug)]
pub enum AnyBase {}

/// A linear layer with a dense base.
pub type LoraLinear = AdaptedLinear<DenseBase>;

/// A linear layer with a 4-bit base. There is one packed copy of the base, on the layer's device.
pub type QLoraLinear = AdaptedLinear<QuantizedBase>;

/// A linear layer with a base of either kind.
pub type Linear = AdaptedLinear<AnyBase>;

/// A frozen base [d_out, d_in] with named LoRA adapters, at most one of them active. See
/// [`LoraLinear`], [`QLoraLinear`] and [`Linear`].
#[derive(Clone)]
pub struct AdaptedLinear<Base> {
    pub(super) base: DeviceMatrix,
    bias: Option<Parameter>,
    train_bias: bool,
    adapters: BTreeMap<String, LoraAdapter>,
    active: Option<String>,
    pub(super) merged: Option<Merged>,
    /// DoRA's factor; cleared when the active adapter may have changed.
    dora: OnceLock<DoraFactor>,
    kind: PhantomData<Base>,
}

/// The adapter that has been merged into the base, as it was then.
#[derive(Clone)]
pub(super) struct Merged {
    pub adapter: LoraAdapter,
    /// DoRA's factor for each row.
    pub factor: Option<Vec<f32>>,
}

/// Memory of a layer, in bytes. Counts the bytes resident on `device`, padding included.
#[derive(Clone, Debug, PartialEq)]
pub struct MemoryStats {
    /// Name of the layer's device.
    pub device: String,
    /// Size of the base as f32.
    pub base_unquantized_bytes: u64,
    /// Size of the base as it is stored.
    pub base_quantized_bytes: u64,
    /// Size of all adapters.
    pub lora_bytes: u64,
    /// Size of the bias.
    pub bias_bytes: u64,
    /// Sum of base, adapters and bias.
    pub total_bytes: u64,
    /// `base_unquantized_bytes / base_quantized_bytes`.
    pub compression_ratio: f64,
}

impl<Base> AdaptedLinear<Base> {
    /// A layer with this base and no adapter.
    pub(crate) fn with_base(base: DeviceMatrix) -> Self {
        AdaptedLinear {
            base,
            bias: None,
            train_bias: false,
            adapters: BTreeMap::new(),
            active: None,
            merged: None,
            dora: OnceLock::new(),
            kind: PhantomData,
        }
    }

    /// Adds a bias of `d_out` values.
    ///
    /// # Errors
    /// [`Error::Shape`], and errors of the device.
    pub fn with_bias(self, bias: &[f32]) -> Result<Self> {
        let bias = Tensor::from_slice(&self.device(), &[bias.len()], bias)?;
        self.with_bias_tensor(bias)
    }

    pub(crate) fn with_bias_tensor(mut self, bias: Tensor) -> Result<Self> {
        expect_shape(OP, "bias", &bias, &[self.d_out()])?;
        self.bias = Some(Parameter::new(bias));
        Ok(self)
    }

    /// Makes the bias trainable, if there is one.
    pub fn with_trained_bias(mut self) -> Self {
        self.train_bias = true;
        self
    }

    /// Adds this adapter and activates it.
    ///
    /// # Errors
    /// Same as [`AdaptedLinear::add_adapter`].
    pub fn with_adapter(mut self, name: &str, adapter: LoraAdapter) -> Result<Self> {
        self.add_adapter(name, adapter)?;
        self.activate(name)?;
        Ok(self)
    }

    /// Adds an adapter, or replaces the one of that name. Doesn't activate it. A DoRA adapter
    /// without a magnitude gets the row norms of W + s * B * A.
    ///
    /// # Errors
    /// [`Error::Shape`] if it is for a layer of another shape, [`Error::DeviceMismatch`];
    /// [`Error::Invalid`] if the magnitude would come from a base that another adapter is merged
    /// into.
    pub fn add_adapter(&mut self, name: &str, mut adapter: LoraAdapter) -> Result<()> {
        const OP: &str = "adding an adapter";
        if (adapter.d_out(), adapter.d_in()) != (self.d_out(), self.d_in()) {
            let expected = format!("[{}, {}]", self.d_out(), self.d_in());
            let got = format!("[{}, {}]", adapter.d_out(), adapter.d_in());
            return Err(Error::shape(OP, "layer [d_out, d_in]", expected, got));
        }
        self.device().same(&adapter.a().device(), OP)?;
        if adapter.is_dora() && adapter.magnitude().is_none() {
            self.check_unmerged("taking the base's magnitude")?;
            let magnitude = dora_norm(&self.base, Some(adapter.delta()))?;
            adapter = adapter.with_magnitude(magnitude)?;
        }
        self.dora = OnceLock::new();
        self.adapters.insert(name.to_owned(), adapter);
        Ok(())
    }

    /// Removes an adapter. If it was active, no adapter is active afterwards.
    ///
    /// # Errors
    /// [`Error::NoSuchAdapter`].
    pub fn remove_adapter(&mut self, name: &str) -> Result<LoraAdapter> {
        let adapter = self.adapters.remove(name).ok_or_else(|| self.no_such(name))?;
        self.dora = OnceLock::new();
        self.active.take_if(|active| active == name);
        Ok(adapter)
    }

    /// Uses this adapter from now on. Costs nothing: the base stays unchanged.
    ///
    /// # Errors
    /// [`Error::NoSuchAdapter`]; [`Error::Invalid`] while an adapter is merged into the base.
    pub fn activate(&mut self, name: &str) -> Result<()> {
        self.adapter(name)?;
        self.check_unmerged("activating an adapter")?;
        self.active = Some(name.to_owned());
        self.dora = OnceLock::new();
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

    pub(super) fn check_unmerged(&self, op: &'static str) -> Result<()> {
        if !self.is_merged() {
            return Ok(());
        }
        Err(Error::invalid(op, "the layer", "merged", "an adapter is merged into its base; unmerge it first"))
    }

    /// Name of the active adapter.
    pub fn active(&self) -> Option<&str> {
        self.active.as_deref()
    }

    /// The active adapter.
    pub fn active_adapter(&self) -> Option<&LoraAdapter> {
        self.active.as_ref().and_then(|name| self.adapters.get(name))
    }

    /// Names of all adapters, sorted.
    pub fn adapter_names(&self) -> impl Iterator<Item = &str> {
        self.adapters.keys().map(String::as_str)
    }

    /// Returns an adapter.
    ///
    /// # Errors
    /// [`Error::NoSuchAdapter`].
    pub fn adapter(&self, name: &str) -> Result<&LoraAdapter> {
        self.adapters.get(name).ok_or_else(|| self.no_such(name))
    }

    /// Returns an adapter for changing it.
    ///
    /// # Errors
    /// [`Error::NoSuchAdapter`].
    pub fn adapter_mut(&mut self, name: &str) -> Result<&mut LoraAdapter> {
        let error = self.no_such(name);
        self.dora = OnceLock::new();
        self.adapters.get_mut(name).ok_or(error)
    }

    fn no_such(&self, name: &str) -> Error {
        let loaded: Vec<_> = self.adapter_names().collect();
        let loaded = if loaded.is_empty() { "none".to_owned() } else { loaded.join(", ") };
        Error::NoSuchAdapter { name: name.to_owned(), loaded }
    }

    /// Device of the layer.
    pub fn device(&self) -> Device {
        self.base.device()
    }

    /// Columns of the base: length of an input row.
    pub fn d_in(&self) -> usize {
        self.base.cols()
    }

    /// Rows of the base: length of an output row.
    pub fn d_out(&self) -> usize {
        self.base.rows()
    }

    /// The bias, `d_out` values.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_deref()
    }

    /// The base on its device.
    pub(crate) fn base(&self) -> &DeviceMatrix {
        &self.base
    }

    /// Rank of the active adapter; 0 without one.
    pub fn rank(&self) -> usize {
        self.active_adapter().map_or(0, LoraAdapter::rank)
    }

    /// Scale of the active adapter; 0 without one.
    pub fn scale(&self) -> f32 {
        self.active_adapter().map_or(0.0, LoraAdapter::scale)
    }

    /// The bias, if it is trained.
    pub(crate) fn trained_bias(&self) -> Option<&Parameter> {
        self.bias.as_ref().filter(|_| self.train_bias)
    }

    /// Trained tensors by name: [`LoraAdapter::parameters`] of the active adapter, and "bias" if
    /// it is trained.
    pub fn parameters(&self) -> impl Iterator<Item = (&'static str, &Parameter)> {
        let bias = self.trained_bias().map(|bias| ("bias", bias));
        self.active_adapter().into_iter().flat_map(LoraAdapter::parameters).chain(bias)
    }

    /// Like [`AdaptedLinear::parameters`], for updates. Keep the shapes: a changed shape makes the
    /// next pass fail.
    pub fn parameters_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut Parameter)> {
        self.dora = OnceLock::new();
        let adapter = self.active.as_ref().and_then(|name| self.adapters.get_mut(name));
        let bias = self.bias.as_mut().filter(|_| self.train_bias).map(|bias| ("bias", bias));
        adapter.into_iter().flat_map(LoraAdapter::parameters_mut).chain(bias)
    }

    /// Trained tensors, without names.
    pub fn trainable_params(&self) -> Vec<&Tensor> {
        self.parameters().map(|(_, parameter)| &**parameter).collect()
    }

    /// DoRA's factor for each output column, if the active adapter is DoRA. Cached until the
    /// adapter may have changed.
    pub(super) fn dora_factor(&self) -> Result<Option<&DoraFactor>> {
        let Some(adapter) = self.active_adapter().filter(|adapter| adapter.is_dora()) else { return Ok(None) };
        if let Some(factor) = self.dora.get() {
            return Ok(Some(factor));
        }
        let factor = DoraFactor::new(&self.base, adapter)?;
        Ok(Some(self.dora.get_or_init(|| factor)))
    }

    /// Whether an adapter has been merged into the base.
    pub fn is_merged(&self) -> bool {
        self.merged.is_some()
    }

    /// Memory of the layer.
    pub fn memory_stats(&self) -> MemoryStats {
        let base = self.base.resident_bytes();
        let lora = self.adapters.values().map(LoraAdapter::resident_bytes).sum();
        let bias = self.bias().map_or(0, Tensor::resident_bytes);
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

impl Linear {
    /// Creates a layer with this base and no adapter.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn new(device: &Device, base: impl Into<Arc<HostMatrix>>) -> Result<Linear> {
        Ok(Linear::with_base(DeviceMatrix::new(device, base)?))
    }
}

impl LoraLinear {
    /// Creates a layer with this dense base and no adapter.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn new(device: &Device, base: DenseMatrix) -> Result<LoraLinear> {
        Ok(LoraLinear::with_base(DeviceMatrix::new(device, HostMatrix::from(base))?))
    }

    /// Like [`LoraLinear::new`], from an f32 array [d_out, d_in].
    pub fn from_array(device: &Device, weight: ArrayView2<'_, f32>) -> Result<LoraLinear> {
        let (rows, cols) = weight.dim();
        LoraLinear::new(device, DenseMatrix::new(rows, cols, DenseData::F32(weight.iter().copied().collect()))?)
    }
}

impl QLoraLinear {
    /// Creates a layer with this 4-bit base and no adapter.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn new(device: &Device, base: QuantizedMatrix) -> Result<QLoraLinear> {
        Ok(QLoraLinear::with_base(DeviceMatrix::new(device, HostMatrix::from(base))?))
    }

    /// Quantizes an f32 array [d_out, d_in] to a base.
    ///
    /// # Errors
    /// [`Error::NonFinite`] with the first bad index, [`Error::Invalid`] for the options, and
    /// errors of the device.
    pub fn quantize(device: &Device, weight: ArrayView2<'_, f32>, options: &QuantOptions) -> Result<QLoraLinear> {
        let (rows, cols) = weight.dim();
        let standard = weight.as_standard_layout();
        let values = standard.as_slice().unwrap_or_default();
        QLoraLinear::new(device, QuantizedMatrix::quantize(values.into(), rows, cols, options)?)
    }

    /// Quantizes the base of a LoRA layer; keeps its bias and adapters.
    ///
    /// # Errors
    /// [`Error::Invalid`] if an adapter is merged into the base (it would count twice); otherwise
    /// the same as [`QLoraLinear::quantize`].
    pub fn from_lora(layer: LoraLinear, options: &QuantOptions) -> Result<QLoraLinear> {
        if layer.is_merged() {
            return Err(Error::invalid("merge", "the layer", "merged", "unmerge it before its base is quantized"));
        }
        let host = layer.base.to_host()?;
        let HostMatrix::Dense(dense) = &*host else {
            return Err(Error::invalid("merge", "the base", "4-bit", "a LoRA layer has a dense base"));
        };
        let (rows, cols) = (dense.rows(), dense.cols());
        let quantized = match dense.data() {
            DenseData::F32(values) => QuantizedMatrix::quantize(values.as_slice().into(), rows, cols, options),
            DenseData::F16(values) => QuantizedMatrix::quantize(values.as_slice().into(), rows, cols, options),
            DenseData::Bf16(values) => QuantizedMatrix::quantize(values.as_slice().into(), rows, cols, options),
            DenseData::Q8_0 { .. } => QuantizedMatrix::quantize(dense.to_f32().as_slice().into(), rows, cols, options),
        }?;
        let base = DeviceMatrix::new(&layer.device(), HostMatrix::from(quantized))?;
        let AdaptedLinear { bias, train_bias, adapters, active, .. } = layer;
        let dora = OnceLock::new();
        Ok(AdaptedLinear { base, bias, train_bias, adapters, active, merged: None, dora, kind: PhantomData })
    }

    /// Returns the packed base on the host. From a GPU it is read back, bit for bit.
    pub fn base_weight_quantized(&self) -> Result<Arc<HostMatrix>> {
        self.base.to_host()
    }

    /// Whether the base's scales are quantized too.
    pub fn is_double_quantized(&self) -> bool {
        self.base.is_double_quantized()
    }
}
