//! Tensors of a file or folder: formats, shapes and sizes, and table rows for them.

use std::collections::BTreeMap;

use indicatif::{HumanBytes, HumanCount};
use qlora_wgpu::error::Result;
use qlora_wgpu::internal::bitsandbytes;
use qlora_wgpu::internal::gguf::GgufFile;
use qlora_wgpu::internal::safetensors::Tensors;
use serde::Serialize;

/// How values are stored.
#[derive(Serialize, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Storage {
    /// The type as named in the file, or `nf4`, `fp4`, `int4`.
    format: String,
    /// Weights per scale, for bitsandbytes' formats.
    block: Option<usize>,
    /// Whether the scales are quantized too.
    double_quantized: bool,
    /// Scales per super-scale, if the scales are quantized.
    super_block: Option<usize>,
}

impl Storage {
    fn plain(format: impl ToString) -> Self {
        Storage { format: format.to_string(), block: None, double_quantized: false, super_block: None }
    }

    fn label(&self) -> String {
        let block = self.block.map_or(String::new(), |block| format!(", blocks of {block}"));
        let double = if self.double_quantized { ", double-quantized" } else { "" };
        format!("{}{block}{double}", self.format)
    }
}

/// Size of one or several tensors.
#[derive(Serialize, Clone, Copy, Debug)]
pub struct Size {
    pub parameters: u64,
    pub bytes: u64,
    /// `None` if there are no parameters.
    pub bits_per_weight: Option<f64>,
}

impl Size {
    fn new(parameters: u64, bytes: u64) -> Self {
        let bits_per_weight = (parameters > 0).then(|| bytes as f64 * 8.0 / parameters as f64);
        Size { parameters, bytes, bits_per_weight }
    }

    fn of(shape: &[usize], bytes: usize) -> Self {
        Size::new(shape.iter().map(|&length| length as u64).product(), bytes as u64)
    }

    /// Sum over all tensors.
    pub fn sum<'a>(tensors: impl IntoIterator<Item = &'a TensorInfo>) -> Self {
        let add =
            |(parameters, bytes), tensor: &TensorInfo| (parameters + tensor.size.parameters, bytes + tensor.size.bytes);
        let (parameters, bytes) = tensors.into_iter().fold((0, 0), add);
        Size::new(parameters, bytes)
    }

    pub fn bits(&self) -> String {
        self.bits_per_weight.map_or("-".into(), |bits| format!("{bits:.3}"))
    }

    /// Table cells: parameters, bytes, and bits per weight.
    fn columns(&self) -> [String; 3] {
        [HumanCount(self.parameters).to_string(), HumanBytes(self.bytes).to_string(), self.bits()]
    }
}

/// A tensor, or a 4-bit weight with all its parts.
#[derive(Serialize, Clone, Debug)]
pub struct TensorInfo {
    name: String,
    #[serde(flatten)]
    storage: Storage,
    shape: Vec<usize>,
    #[serde(flatten)]
    size: Size,
}

/// All tensors with one format.
#[derive(Serialize, Clone, Debug)]
pub struct TotalInfo {
    #[serde(flatten)]
    storage: Storage,
    tensors: usize,
    #[serde(flatten)]
    size: Size,
}

/// Tensors of a GGUF file, sorted by name and layer.
pub fn of_gguf(file: &GgufFile) -> Result<Vec<TensorInfo>> {
    let info = |name: &str| {
        let tensor = file.tensor(name)?;
        let (storage, size) = (Storage::plain(tensor.kind), Size::of(tensor.shape, tensor.bytes.len()));
        Ok(TensorInfo { name: name.into(), storage, shape: tensor.shape.into(), size })
    };
    file.names().map(info).collect::<Result<_>>().map(sorted)
}

/// Tensors of a safetensors file or checkpoint, sorted by name and layer.
pub fn of_safetensors(tensors: &impl Tensors) -> Result<Vec<TensorInfo>> {
    let packed = bitsandbytes::quantized_weights(tensors);
    let is_part = |name: &str| bitsandbytes::weight_of(name).is_some_and(|weight| packed.contains(weight));
    let info = |name: &str| {
        if packed.contains(name) {
            let found = bitsandbytes::storage(tensors, name)?;
            let storage = Storage {
                format: found.format.to_string(),
                block: Some(found.block),
                double_quantized: found.super_block.is_some(),
                super_block: found.super_block,
            };
            let size = Size::of(&found.shape, found.bytes);
            return Ok(TensorInfo { name: name.into(), storage, shape: found.shape.into(), size });
        }
        let tensor = tensors.tensor(name)?;
        let (storage, size) = (Storage::plain(tensor.dtype), Size::of(tensor.shape, tensor.bytes.len()));
        Ok(TensorInfo { name: name.into(), storage, shape: tensor.shape.into(), size })
    };
    tensors.names().filter(|name| !is_part(name)).map(info).collect::<Result<_>>().map(sorted)
}

fn sorted(mut tensors: Vec<TensorInfo>) -> Vec<TensorInfo> {
    tensors.sort_by(|a, b| split(&a.name).cmp(&split(&b.name)));
    tensors
}

/// Splits a name at its first number, usually the layer: text before, number, text after.
fn split(name: &str) -> (&str, Option<usize>, &str) {
    let mut start = 0;
    for part in name.split('.') {
        let end = start + part.len();
        if let Ok(index) = part.parse() {
            return (&name[..start], Some(index), &name[end..]);
        }
        start = end + 1;
    }
    (name, None, "")
}

/// Totals by format, largest first.
pub fn totals(tensors: &[TensorInfo]) -> Vec<TotalInfo> {
    let mut formats: BTreeMap<&Storage, Vec<&TensorInfo>> = BTreeMap::new();
    for tensor in tensors {
        formats.entry(&tensor.storage).or_default().push(tensor);
    }
    let total = |(storage, tensors): (&Storage, Vec<&TensorInfo>)| TotalInfo {
        storage: storage.clone(),
        tensors: tensors.len(),
        size: Size::sum(tensors),
    };
    let mut totals: Vec<TotalInfo> = formats.into_iter().map(total).collect();
    totals.sort_by_key(|total| std::cmp::Reverse(total.size.bytes));
    totals
}

/// A row per format, and one for all if there are several.
pub fn format_rows(totals: &[TotalInfo], tensors: usize, all: &Size) -> Vec<[String; 5]> {
    let row = |label: String, count: usize, size: &Size| {
        let [parameters, bytes, bits] = size.columns();
        [label, count.to_string(), parameters, bytes, bits]
    };
    let mut rows: Vec<_> = totals.iter().map(|total| row(total.storage.label(), total.tensors, &total.size)).collect();
    if rows.len() > 1 {
        rows.push(row("all".into(), tensors, all));
    }
    rows
}

/// A row per tensor, or per group of tensors that differ only in the layer.
pub fn tensor_rows(tensors: &[TensorInfo], all: bool) -> Vec<[String; 7]> {
    // Rows are in the order of their first tensors.
    let mut places = BTreeMap::new();
    let mut groups: Vec<Vec<&TensorInfo>> = Vec::new();
    for tensor in tensors {
        let (before, index, after) = split(&tensor.name);
        let place = *places
            .entry((before, after, index.filter(|_| all), &tensor.storage, &tensor.shape))
            .or_insert(groups.len());
        if place == groups.len() {
            groups.push(Vec::new());
        }
        groups[place].push(tensor);
    }
    let row = |group: Vec<&TensorInfo>| {
        let TensorInfo { name, storage, shape, .. } = group[0];
        let name = if let [_] = group[..] {
            name.clone()
        } else {
            let (before, _, after) = split(name);
            format!("{before}{{{}}}{after}", ranges(group.iter().filter_map(|tensor| split(&tensor.name).1)))
        };
        let count = group.len().to_string();
        let [parameters, bytes, bits] = Size::sum(group.iter().copied()).columns();
        [name, storage.label(), count, format!("{shape:?}"), parameters, bytes, bits]
    };
    groups.into_iter().map(row).collect()
}

/// Formats ascending numbers as ranges: `0-2,5`.
fn ranges(numbers: impl Iterator<Item = usize>) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for number in numbers {
        match ranges.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(number) => *last = number,
            _ => ranges.push((number, number)),
        }
    }
    let text = |(first, last)| if first == last { format!("{first}") } else { format!("{first}-{last}") };
    ranges.into_iter().map(text).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, format: &str, shape: &[usize]) -> TensorInfo {
        let size = Size::of(shape, shape.iter().product::<usize>() * 2);
        TensorInfo { name: name.into(), storage: Storage::plain(format), shape: shape.into(), size }
    }

    #[test]
    fn layers_that_are_alike_share_a_row() {
        let mut tensors: Vec<_> = (0..12)
            .flat_map(|layer| {
                let format = if layer == 4 { "Q6_K" } else { "Q4_K" };
                [
                    tensor(&format!("blk.{layer}.b"), format, &[2, 3]),
                    tensor(&format!("blk.{layer}.a"), "F32", &[layer / 10 + 1]),
                ]
            })
            .collect();
        tensors.extend([tensor("output", "F16", &[4]), tensor("empty", "F16", &[0])]);
        let tensors = sorted(tensors);
        let names: Vec<_> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names[..5], ["blk.0.a", "blk.0.b", "blk.1.a", "blk.1.b", "blk.2.a"]);
        assert_eq!(names[20..], ["blk.10.a", "blk.10.b", "blk.11.a", "blk.11.b", "empty", "output"]);

        let rows = tensor_rows(&tensors, false);
        let shown: Vec<_> = rows.iter().map(|row| [&row[0], &row[1], &row[2], &row[4]].map(String::as_str)).collect();
        assert_eq!(
            shown,
            [
                ["blk.{0-9}.a", "F32", "10", "10"],
                ["blk.{0-3,5-11}.b", "Q4_K", "11", "66"],
                ["blk.4.b", "Q6_K", "1", "6"],
                ["blk.{10-11}.a", "F32", "2", "4"],
                ["empty", "F16", "1", "0"],
                ["output", "F16", "1", "4"],
            ]
        );
        assert_eq!(rows[4][6], "-");
        assert_eq!(tensor_rows(&tensors, true).len(), tensors.len());
        let totals = totals(&tensors);
        assert_eq!(totals.iter().map(|total| total.tensors).sum::<usize>(), tensors.len());
        assert_eq!((totals[0].storage.label(), totals[0].size.bytes), ("Q4_K".into(), 132));
    }
}
