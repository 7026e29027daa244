//! Shader text: whole `.wgsl` files with a few template tags for tile sizes, unrolled loops and
//! shared snippets. What a device gets is indented anew, so tags need not care for spaces.

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
            environment.add_template_owned(path.replace('\\', "/"), without_line_ends(source))?;
        }
    }
    folder.dirs().try_for_each(|folder| add_templates(environment, folder))
}

/// Leaves out the end of every line that is a single `{{ macro() }}`, as minijinja does for lines
/// of `{% %}`. What the macro writes has line ends of its own.
fn without_line_ends(source: &str) -> String {
    let is_call = |line: &str| line.starts_with("{{") && line.find("}}") == Some(line.len() - 2);
    source.split_inclusive('\n').map(|line| if is_call(line.trim()) { line.trim_end() } else { line }).collect()
}

/// Indents composed text by its brackets, and leaves one blank line where there are some, and after
/// each function and struct.
fn tidy(text: &str) -> String {
    let mut tidied = String::with_capacity(text.len());
    // For each line that has opened brackets: how many are open still, and the indentation within.
    let mut open: Vec<(usize, usize)> = Vec::new();
    let (mut blank, mut first, mut continues) = (false, true, false);
    for line in text.lines().map(str::trim) {
        if line.is_empty() {
            blank = true;
            continue;
        }
        let code = line.find("//").map_or(line, |at| line[..at].trim_end());
        let closers = code.find(|c| !matches!(c, ')' | ']' | '}')).unwrap_or(code.len());
        let close = |open: &mut Vec<(usize, usize)>| {
            if let Some(last) = open.last_mut() {
                last.0 -= 1;
                if last.0 == 0 {
                    open.pop();
                }
            }
        };
        (0..closers).for_each(|_| close(&mut open));
        let within = open.last().map_or(0, |&(_, within)| within);
        let indent = within + usize::from(continues && closers == 0);
        let after_item = tidied.ends_with("\n}\n");
        if (blank || after_item) && !first && closers == 0 {
            tidied.push('\n');
        }
        tidied.extend(std::iter::repeat_n("    ", indent));
        tidied.push_str(line);
        tidied.push('\n');
        let mut opened = 0;
        for c in code[closers..].chars() {
            match c {
                '(' | '[' | '{' => opened += 1,
                ')' | ']' | '}' if opened > 0 => opened -= 1,
                ')' | ']' | '}' => close(&mut open),
                _ => {}
            }
        }
        if opened > 0 {
            open.push((opened, indent + 1));
        }
        (blank, first) = (false, opened > 0);
        if !code.is_empty() {
            continues = !code.starts_with('@') && !code.ends_with([';', ',', '{', '}', '(', '[']);
        }
    }
    tidied
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
        .map(|text| tidy(&text))
        .map_err(|error| format!("shaders/{}: {error:#}", kernel.path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn composed_text_is_indented_by_its_brackets() {
        let text = "\n// A (comment.\n\n\nfn main(\n@builtin(x) x: u32,\n) {\n\n  let a =\n b(1u,\n   2u);\n\n\
            if (a) { c = 1; }\nd(e(\n f,\n));\n\n}\n\n\nstruct A {\nb: u32, // of {\n}\n";
        let tidied = "// A (comment.\n\nfn main(\n    @builtin(x) x: u32,\n) {\n    let a =\n        b(1u,\n            2u);\n\n    \
            if (a) { c = 1; }\n    d(e(\n        f,\n    ));\n}\n\nstruct A {\n    b: u32, // of {\n}\n";
        assert_eq!(tidy(text), tidied);
        assert_eq!(tidy(tidied), tidied);
    }

    #[test]
    fn only_lines_of_a_single_call_lose_their_ends() {
        let source = "  {{ a(1) }}\n\n{{ b }} c\n{{ d }}{{ e }}\n{{ f() }}\n";
        assert_eq!(without_line_ends(source), "  {{ a(1) }}\n{{ b }} c\n{{ d }}{{ e }}\n{{ f() }}");
    }
}
