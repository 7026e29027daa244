//! Writes a LoRA adapter as a GGUF file for llama.cpp.
//!
//! A and B of each module are F32 tensors, named like the module's weight with `.lora_a` and
//! `.lora_b` appended. Rows of B are in the order in which GGUF files of the architecture store
//! the rows of W. The scale is `adapter.lora.alpha` / r, with r taken from each pair of tensors.

use std::borrow::Cow;
use std::path::Path;

use ndarray::Array2;

use crate::error::{Error, Result};
use crate::formats::gguf::{self, Metadata, OutTensor, OutValue, TensorType};
use crate::formats::peft::{PeftAdapter, PeftModule};
use crate::nn::ModelSpec;
use crate::nn::attach::check_fits;
use crate::nn::gguf::{gguf_architecture, gguf_name, row_order};

/// Writes an adapter for `model` to a GGUF file at `path`, which appears complete or not at all.
/// The file has a single alpha. rsLoRA and patterns of rank and alpha are expressed by it if
/// possible, otherwise by scaling B.
///
/// # Errors
/// [`Error::Invalid`] if the adapter is for another model, or uses DoRA, which such files can't
/// represent; [`Error::Shape`] if a module's shape differs from the model's; [`Error::Tensor`] for
/// a value that isn't finite; [`Error::Io`] if writing fails.
pub fn write_gguf_adapter(adapter: &PeftAdapter, model: &ModelSpec, path: &Path) -> Result<()> {
    if adapter.config.use_dora {
        return Err(Error::invalid(
            "export",
            "use_dora",
            "true",
            "a GGUF adapter can't represent DoRA; use `qlora merge` to write the merged model",
        ));
    }
    check_fits(adapter, model)?;
    let config = model.config();
    // The alpha with which alpha / r is this module's scale.
    let implied = |module: &str| adapter.config.scaling(module) * adapter.config.rank(module) as f32;
    let modules: Vec<(String, &PeftModule)> = model
        .linears()
        .filter_map(|(module, _)| adapter.modules.get_key_value(&module))
        .map(|(k, v)| (k.clone(), v))
        .collect();
    let alphas: Vec<f32> = modules.iter().map(|(module, _)| implied(module)).collect();
    // The alpha that most modules share. For other modules, B is scaled by the rest.
    let alpha = alphas.iter().copied().max_by_key(|alpha| alphas.iter().filter(|other| *other == alpha).count());
    let alpha = alpha.filter(|alpha| *alpha != 0.0).unwrap_or(adapter.config.lora_alpha);

    let mut metadata = Metadata::default();
    metadata.set("general.architecture", OutValue::String(gguf_architecture(config.architecture).into()));
    metadata.set("general.type", OutValue::String("adapter".into()));
    metadata.set("adapter.type", OutValue::String("lora".into()));
    metadata.set("adapter.lora.alpha", OutValue::F32(alpha));

    let mut tensors = Vec::new();
    for ((module, values), implied) in modules.iter().zip(alphas) {
        let weight = format!("{module}.weight");
        let error = |message: &str| Error::Tensor { path: path.into(), key: weight.clone(), message: message.into() };
        let name = gguf_name(&weight).ok_or_else(|| error("has no counterpart in a GGUF file"))?;
        let sources = row_order(config, &weight).sources(values.b.nrows());
        let sources = sources.ok_or_else(|| error("has a number of rows that doesn't divide into heads"))?;
        let factor = if implied == alpha { 1.0 } else { implied / alpha };
        if !factor.is_finite() {
            return Err(error("has a scale that is not finite beside the other modules'"));
        }
        let mut b = Array2::zeros(values.b.dim());
        for (mut row, source) in b.rows_mut().into_iter().zip(sources) {
            row.assign(&values.b.row(source));
            row *= factor;
        }
        for (values, end) in [(values.a.clone(), "lora_a"), (b, "lora_b")] {
            tensors.push(out_tensor(path, format!("{name}.{end}"), values));
        }
    }
    gguf::write(path, &metadata, &tensors)
}

fn out_tensor<'a>(path: &'a Path, name: String, values: Array2<f32>) -> OutTensor<'a> {
    let shape = values.shape().to_vec();
    let (key, values) = (name.clone(), values.into_iter().collect::<Vec<f32>>());
    let data = move || {
        let error = |message| Error::Tensor { path: path.into(), key: key.clone(), message };
        gguf::encode(TensorType::F32, &values).map(Cow::Owned).map_err(error)
    };
    OutTensor { name, kind: TensorType::F32, shape, data: Box::new(data) }
}
