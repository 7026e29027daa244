//! Shader text: whole `.wgsl` files with a few template tags for tile sizes, unrolled loops and shared snippets.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, LazyLock};

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, UndefinedBehavior, Value};

/// How a kernel uses one of its storage buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// `var<storage, read>`
    Read,
    /// `var<storage, read_write>`
    Write,
}

/// A kernel as the device sees it; everything else about it is in its file under `kernels`.
#[derive(Debug)]
pub struct Kernel {
    /// Its name, that of `shaders/NAME.wgsl` and of its Rust file.
    pub name: &'static str,
    /// The template of its shader.
    pub source: &'static str,
    /// Storage buffers in binding order, as named in the shader.
    pub bindings: &'static [(&'static str, Access)],
    /// Bytes of its `Params`.
    pub params_bytes: usize,
    /// Name and byte offset of each field of its `Params`.
    pub params_fields: &'static [(&'static str, usize)],
}

/// Text constants of one variant of a kernel. Their values are part of a pipeline's identity.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Defines(Vec<(Word, Define)>);

/// A word of the program's text.
#[derive(Clone, Copy, Debug, Eq)]
pub struct Word(&'static str);

impl PartialEq for Word {
    fn eq(&self, other: &Word) -> bool {
        // A variant is asked for at the same place each time, so that its words are the same bytes: most comparisons end here.
        std::ptr::eq(self.0, other.0) || self.0 == other.0
    }
}

impl Hash for Word {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl Default for Defines {
    fn default() -> Self {
        Defines(Vec::with_capacity(Defines::ROOM))
    }
}

impl Clone for Defines {
    fn clone(&self) -> Self {
        // With the room that a copy of the list has not.
        let mut all = Vec::with_capacity(Defines::ROOM.max(self.0.len()));
        all.extend_from_slice(&self.0);
        Defines(all)
    }
}

/// The value of a text constant.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Define {
    /// For `{% if NAME %}`.
    Flag(bool),
    /// A size or a count.
    Number(u32),
    /// A word out of a fixed set.
    Word(Word),
    /// The bits of f32 values, so that they compare and reach the shader exactly. Every dispatch has a clone.
    Floats(Arc<[u32]>),
}

impl From<bool> for Define {
    fn from(value: bool) -> Self {
        Define::Flag(value)
    }
}

impl From<u32> for Define {
    fn from(value: u32) -> Self {
        Define::Number(value)
    }
}

impl From<&'static str> for Define {
    fn from(value: &'static str) -> Self {
        Define::Word(Word(value))
    }
}

impl From<&[f32]> for Define {
    fn from(values: &[f32]) -> Self {
        Define::Floats(values.iter().map(|value| value.to_bits()).collect())
    }
}

impl Defines {
    /// Constants that a list has room for from the start. No variant has more, so a dispatch allocates its list once.
    pub(crate) const ROOM: usize = 24;

    /// No constants yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Their names.
    #[cfg(test)]
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.0.iter().map(|(name, _)| name.0)
    }

    /// Adds one constant.
    pub fn with(mut self, name: &'static str, value: impl Into<Define>) -> Self {
        self.0.push((Word(name), value.into()));
        self
    }

    /// Whether a flag of this name is set.
    pub fn flag(&self, name: &str) -> bool {
        self.0.iter().any(|(other, value)| other.0 == name && *value == Define::Flag(true))
    }

    /// Whether the variant multiplies cooperative matrices: it has the size of these.
    pub(crate) fn is_cooperative(&self) -> bool {
        self.0.iter().any(|(name, _)| name.0 == "edge")
    }

    /// The variant in one line, for labels and messages.
    pub fn label(&self) -> String {
        let show = |(name, value): &(Word, Define)| match value {
            Define::Flag(true) => Some(name.0.to_owned()),
            Define::Flag(false) | Define::Floats(_) => None,
            Define::Number(number) => Some(format!("{name}={number}")),
            Define::Word(word) => Some(format!("{name}={word}")),
        };
        self.0.iter().filter_map(show).collect::<Vec<_>>().join(" ")
    }
}

/// A WGSL literal with exactly these bits. Finite values only (a codebook's are).
fn wgsl_float(bits: u32) -> String {
    format!("{:?}f", f32::from_bits(bits))
}

macro_rules! shared {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!("../../shaders/shared/", $name)))),*]
    };
}

static ENVIRONMENT: LazyLock<Environment<'static>> = LazyLock::new(|| {
    // The snippets are part of the crate: whether they parse cannot depend on input, and the registry test uses them.
    environment().unwrap_or_else(|error| unreachable!("shaders/shared: {error:#}"))
});

fn environment() -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    for (name, source) in shared![
        "adamw.wgsl",
        "attention_coop.wgsl",
        "attention_heads.wgsl",
        "attention_lanes.wgsl",
        "attention_params.wgsl",
        "attention_rows.wgsl",
        "attention_strips.wgsl",
        "attention_tiles.wgsl",
        "coop.wgsl",
        "coop_tiles.wgsl",
        "dot_quads.wgsl",
        "dropout.wgsl",
        "factor.wgsl",
        "groups.wgsl",
        "matrix.wgsl",
        "matrix_params.wgsl",
        "qmatmul.wgsl",
        "qmatmul_dx.wgsl",
        "quads.wgsl",
        "reduce.wgsl",
        "rope_pairs.wgsl",
        "row_largest.wgsl",
        "row_teams.wgsl",
        "rows.wgsl",
        "skinny.wgsl",
        "store_rows.wgsl",
        "tile.wgsl",
    ] {
        environment.add_template(name, source)?;
    }
    Ok(environment)
}

/// The WGSL text of a kernel's variant. `immediates` chooses where `Params` lives: in immediate data, or in a
/// uniform buffer after the last storage binding.
pub fn compose(kernel: &Kernel, defines: &Defines, immediates: bool) -> Result<String, String> {
    let mut context: BTreeMap<&str, Value> = defines
        .0
        .iter()
        .map(|(name, value)| {
            let value = match value {
                Define::Flag(flag) => Value::from(*flag),
                Define::Number(number) => Value::from(*number),
                Define::Word(word) => Value::from(word.0),
                Define::Floats(bits) => bits.iter().map(|&bits| Value::from(wgsl_float(bits))).collect(),
            };
            (name.0, value)
        })
        .collect();
    let space = if immediates {
        "var<immediate>".to_owned()
    } else {
        format!("@group(0) @binding({}) var<uniform>", kernel.bindings.len())
    };
    context.insert("param_space", Value::from(space));
    ENVIRONMENT
        .render_named_str(kernel.name, kernel.source, Value::from(context))
        .map_err(|error| format!("shaders/{}.wgsl: {error:#}", kernel.name))
}
