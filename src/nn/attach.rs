//! Adapters for a whole model: which layers get one, and reading and writing PEFT directories.

use std::collections::BTreeSet;

use ndarray::Array2;

use super::adapter::{LoraAdapter, LoraConfig, LoraInit, Scaling};
use super::decoder::Decoder;
use super::spec::ModelSpec;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::formats::peft::{PeftAdapter, PeftConfig, PeftModule, TargetModules};
use crate::seed::mix;
use crate::tensor::Tensor;

const OP: &str = "adapters of a model";

fn scaling(config: &PeftConfig) -> Scaling {
    if config.use_rslora { Scaling::RankStabilized } else { Scaling::Standard }
}

impl Decoder {
    /// Adds a new adapter of this name to every layer that the configuration targets, and
    /// activates it like [`Decoder::activate`]. A is random by PEFT's rule (the same for the same
    /// seed), B is zero. Returns the number of layers.
    ///
    /// # Errors
    /// [`Error::Invalid`] if no layer matches, the configuration asks for something unsupported,
    /// or the name is taken.
    pub fn attach(&mut self, name: &str, config: &PeftConfig, seed: u64) -> Result<usize> {
        self.check_new(name)?;
        check_supported(config)?;
        let targeted = targeted(config, self.linears().map(|(path, _)| path))?;
        let device = self.device.clone();
        let mut count = 0;
        for (path, linear) in self.linears_mut() {
            if !targeted.contains(&path) {
                continue;
            }
            let lora = LoraConfig {
                rank: config.rank(&path),
                alpha: config.alpha(&path),
                scaling: scaling(config),
                dropout: config.lora_dropout,
                dora: config.use_dora,
                init: LoraInit::KaimingUniform { seed: mix(seed, count) },
            };
            let adapter = LoraAdapter::new(&device, linear.d_out(), linear.d_in(), &lora)?;
            linear.add_adapter(name, adapter)?;
            count += 1;
        }
        self.activate(name)?;
        Ok(count as usize)
    }

    /// Adds the adapters of a PEFT directory under this name, and activates them like
    /// [`Decoder::activate`].
    ///
    /// # Errors
    /// [`Error::Invalid`] if the model lacks a module, the configuration asks for something
    /// unsupported, or the name is taken; [`Error::Shape`] for tensors of another shape. On an
    /// error the model is unchanged.
    pub fn attach_peft(&mut self, name: &str, adapter: &PeftAdapter) -> Result<usize> {
        self.check_new(name)?;
        check_modules(adapter, self.linears().map(|(path, _)| path))?;
        let device = self.device.clone();
        let mut made = Vec::new();
        for (path, linear) in self.linears_mut() {
            if adapter.modules.contains_key(&path) {
                made.push(LoraAdapter::from_peft(&device, adapter, &path, (linear.d_out(), linear.d_in()))?);
            }
        }
        let mut made = made.into_iter();
        for (path, linear) in self.linears_mut() {
            if adapter.modules.contains_key(&path)
                && let Some(lora) = made.next()
            {
                linear.add_adapter(name, lora)?;
            }
        }
        self.activate(name)?;
        Ok(adapter.modules.len())
    }

    /// Exports the adapter of this name for PEFT, with this configuration. Ranks and alphas match
    /// the tensors only if the adapter was made with the same configuration.
    ///
    /// # Errors
    /// [`Error::NoSuchAdapter`], and errors of the device.
    pub fn to_peft(&self, name: &str, config: &PeftConfig) -> Result<PeftAdapter> {
        let mut adapter = PeftAdapter { config: config.clone(), modules: Default::default() };
        for (path, linear) in self.linears() {
            let Ok(lora) = linear.adapter(name) else { continue };
            let array = |tensor: &Tensor| -> Result<Array2<f32>> { tensor.to_array2() };
            let module = PeftModule {
                a: array(lora.a())?,
                b: array(lora.b())?,
                magnitude: lora.magnitude().map(Tensor::to_vec).transpose()?,
                bias: None,
            };
            adapter.modules.insert(path, module);
        }
        if adapter.modules.is_empty() {
            let loaded = self.adapters_for_message();
            return Err(Error::NoSuchAdapter { name: name.to_owned(), loaded });
        }
        Ok(adapter)
    }

    /// Uses the adapter of this name from now on, in the layers that have it; other layers use
    /// their base alone. Nothing is loaded again.
    ///
    /// # Errors
    /// [`Error::NoSuchAdapter`] if no layer has it; the model is then unchanged.
    pub fn activate(&mut self, name: &str) -> Result<()> {
        if self.linears().all(|(_, linear)| linear.adapter(name).is_err()) {
            return Err(Error::NoSuchAdapter { name: name.to_owned(), loaded: self.adapters_for_message() });
        }
        self.linears_mut().try_for_each(|(_, linear)| match linear.adapter(name) {
            Ok(_) => linear.activate(name),
            Err(_) => linear.deactivate(),
        })?;
        tracing::debug!("active adapter: {name}");
        Ok(())
    }

    /// Uses the base alone from now on.
    pub fn deactivate(&mut self) -> Result<()> {
        self.linears_mut().try_for_each(|(_, linear)| linear.deactivate())
    }

    fn check_new(&self, name: &str) -> Result<()> {
        if self.linears().all(|(_, linear)| linear.adapter(name).is_err()) {
            return Ok(());
        }
        Err(Error::invalid(OP, "the adapter's name", name, "the model already has an adapter of this name"))
    }

    fn adapters_for_message(&self) -> String {
        let names: BTreeSet<&str> =
            self.linears().flat_map(|(_, linear)| linear.adapter_names().collect::<Vec<_>>()).collect();
        if names.is_empty() { "none".into() } else { names.into_iter().collect::<Vec<_>>().join(", ") }
    }
}

impl LoraAdapter {
    /// Builds the adapter for the module at `path`, a layer [d_out, d_in], from a PEFT adapter.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the PEFT adapter lacks the module, [`Error::Shape`] if it is for a
    /// layer of another shape.
    pub(crate) fn from_peft(
        device: &Device,
        adapter: &PeftAdapter,
        path: &str,
        (d_out, d_in): (usize, usize),
    ) -> Result<LoraAdapter> {
        let Some(module) = adapter.modules.get(path) else {
            return Err(Error::invalid(OP, "a module", path, "the adapter has no such module"));
        };
        let config = &adapter.config;
        let a = Tensor::from_array(device, &module.a)?;
        let b = Tensor::from_array(device, &module.b)?;
        let mut lora =
            LoraAdapter::from_tensors(a, b, config.alpha(path), scaling(config))?.with_dropout(config.lora_dropout)?;
        if let Some(magnitude) = &module.magnitude {
            lora = lora.with_magnitude(Tensor::from_slice(device, &[magnitude.len()], magnitude)?)?;
        }
        if (lora.d_out(), lora.d_in()) != (d_out, d_in) {
            return Err(Error::shape(
                OP,
                "adapter's layer [d_out, d_in]",
                format!("[{d_out}, {d_in}] for {path}"),
                format!("[{}, {}]", lora.d_out(), lora.d_in()),
            ));
        }
        Ok(lora)
    }
}

/// Checks that an adapter fits this model.
///
/// # Errors
/// Same as [`Decoder::attach_peft`].
pub(crate) fn check_fits(adapter: &PeftAdapter, model: &ModelSpec) -> Result<()> {
    check_modules(adapter, model.linears().map(|(path, _)| path))?;
    let cpu = Device::cpu();
    let mut adapted = model.linears().filter(|(path, _)| adapter.modules.contains_key(path));
    adapted.try_for_each(|(path, matrix)| {
        LoraAdapter::from_peft(&cpu, adapter, &path, (matrix.rows, matrix.cols)).map(drop)
    })
}

/// Checks that an adapter fits a model with these linear layers.
///
/// # Errors
/// [`Error::Invalid`] for an unsupported setting, or for the first module that the model lacks.
fn check_modules(adapter: &PeftAdapter, linears: impl Iterator<Item = String>) -> Result<()> {
    check_supported(&adapter.config)?;
    let known: Vec<String> = linears.collect();
    match adapter.modules.keys().find(|path| !known.contains(*path)) {
        None => Ok(()),
        Some(unknown) => Err(Error::invalid(
            OP,
            "a module of the adapter",
            unknown,
            format!("the model's linear layers are {}", span(&known)),
        )),
    }
}

fn check_supported(config: &PeftConfig) -> Result<()> {
    if !config.lora_bias {
        return Ok(());
    }
    Err(Error::invalid(OP, "lora_bias", "true", "biases of lora_B aren't supported"))
}

/// Selects the linear layers of a model that the configuration targets.
///
/// # Errors
/// [`Error::Invalid`] if there are none, or if it targets a module that can't have an adapter.
fn targeted(config: &PeftConfig, paths: impl Iterator<Item = String>) -> Result<BTreeSet<String>> {
    let error = |expected: String| {
        let got = match config.targets.modules() {
            TargetModules::AllLinear => "all-linear".to_owned(),
            TargetModules::Names(names) => names.join(", "),
            TargetModules::Regex(expression) => expression.as_str().into(),
        };
        Error::invalid(OP, "target_modules", got, expected)
    };
    // PEFT would adapt these too; silently leaving them out would train something else.
    if let Some(path) = ["lm_head", "model.embed_tokens"].into_iter().find(|path| config.targets.matches(path, true)) {
        return Err(error(format!("it matches {path}, but only linear layers inside the decoder can have adapters")));
    }
    let paths: Vec<String> = paths.collect();
    let known = span(&paths);
    let found: BTreeSet<String> = paths.into_iter().filter(|path| config.targets.matches(path, false)).collect();
    if found.is_empty() {
        return Err(error(format!("no linear layer of the model matches; it has {known}")));
    }
    Ok(found)
}

/// First and last of some paths, for messages.
fn span(paths: &[String]) -> String {
    let end = |path: Option<&String>| path.cloned().unwrap_or_default();
    format!("{} to {}", end(paths.first()), end(paths.last()))
}
