//! Shader text: whole `.wgsl` files with a few template tags for tile sizes, unrolled loops and
//! shared snippets.

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, LazyLock};

use super::tier::Tier;
use include_dir::{Dir, include_dir};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, UndefinedBehavior, Value};

/// Access of a kernel to one of its storage buffers.
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
    /// Name of the kernel, for labels and messages.
    pub name: &'static str,
    /// Path of the shader in `shaders/`, like that of its Rust file in `src/kernels`.
    pub path: &'static str,
    /// Storage buffers in binding order, with their names in the shader.
    pub bindings: &'static [(&'static str, Access)],
    /// Size of its `Params` in bytes.
    pub params_bytes: usize,
    /// Name and byte offset of each field of its `Params`.
    #[allow(dead_code, reason = "tests compare it with the shader")]
    pub params_fields: &'static [(&'static str, usize)],
    /// Text constants of every variant that a tier may run.
    #[allow(dead_code, reason = "for tests and scripts/codegen")]
    pub variants: fn(Tier) -> Vec<Defines>,
}

/// Text constants of one variant of a kernel. Their values are part of a pipeline's identity.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Defines(Vec<(Word, Define)>);

/// A word from the program's own text.
#[derive(Clone, Copy, Debug, Eq)]
pub struct Word(&'static str);

impl PartialEq for Word {
    fn eq(&self, other: &Word) -> bool {
        // The same place in the code asks for a variant each time, so its words are usually at the
        // same address, and most comparisons end here.
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
        // With spare room, which a plain copy of the list wouldn't have.
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
    /// One of a fixed set of words.
    Word(Word),
    /// Bits of f32 values, so that they compare and reach the shader exactly. Shared, because
    /// every dispatch clones them.
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
    /// Initial capacity of a list. No variant has more constants, so a dispatch allocates its list
    /// once.
    pub(crate) const ROOM: usize = 24;

    /// Makes an empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Names of the constants.
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
    pub(crate) fn flag(&self, name: &str) -> bool {
        self.0.iter().any(|(other, value)| other.0 == name && *value == Define::Flag(true))
    }

    /// Whether the variant uses cooperative matrices: it then defines their size.
    pub(crate) fn is_cooperative(&self) -> bool {
        self.0.iter().any(|(name, _)| name.0 == "edge")
    }

    /// Describes the variant in one line, for labels and messages.
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

/// Returns a WGSL literal with exactly these bits. Finite values only (a codebook's values are).
fn wgsl_float(bits: u32) -> String {
    format!("{:?}f", f32::from_bits(bits))
}

/// All shaders. Any of them may include any other by its path.
static SHADERS: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/shaders");

static ENVIRONMENT: LazyLock<Environment<'static>> = LazyLock::new(|| {
    // The shaders are part of the crate: whether they parse can't depend on input, and the
    // registry test uses them.
    environment().unwrap_or_else(|error| unreachable!("shaders: {error:#}"))
});

fn environment() -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    add_templates(&mut environment, &SHADERS)?;
    Ok(environment)
}

fn add_templates(environment: &mut Environment<'static>, folder: &Dir<'static>) -> Result<(), minijinja::Error> {
    for file in folder.files() {
        if let (Some(path), Some(source)) = (file.path().to_str(), file.contents_utf8()) {
            environment.add_template_owned(path.replace('\\', "/"), source)?;
        }
    }
    folder.dirs().try_for_each(|folder| add_templates(environment, folder))
}

/// Composes the WGSL text of a kernel's variant. `immediates` chooses where `Params` lives: in
/// immediate data, or in a uniform buffer after the last storage binding.
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
        .get_template(kernel.path)
        .and_then(|template| template.render(Value::from(context)))
        .map_err(|error| format!("shaders/{}: {error:#}", kernel.path))
}
