//! Selects the modules that an adapter is for: `target_modules` and the keys beside it, by PEFT's
//! rules.

use std::fmt;

use fancy_regex::{CompileError, Error as RegexError, Regex, RegexBuilder};

use crate::error::{Error, Result};

/// Maximum size of a compiled expression in bytes. Real models need less than a tenth of it, but
/// `\w{99}{99}` would have no limit.
const MAX_COMPILED: usize = 1 << 20;

/// Maximum total size of the compiled expressions in a list, in bytes.
const MAX_ALL_COMPILED: usize = 16 << 20;

/// `target_modules`, or `exclude_modules`.
#[derive(Clone, Debug, PartialEq)]
pub enum TargetModules {
    /// Every linear layer except the output head: `"all-linear"`.
    AllLinear,
    /// Modules whose path is one of these, or ends with a dot followed by one of these.
    Names(Vec<String>),
    /// Modules whose whole path matches this expression.
    Regex(ModuleRegex),
}

impl TargetModules {
    /// Selects modules with one of `names`.
    pub fn names<T: Into<String>>(names: impl IntoIterator<Item = T>) -> Self {
        TargetModules::Names(names.into_iter().map(Into::into).collect())
    }

    /// Selects modules whose whole path matches `expression`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an expression that is malformed or needs too much memory.
    pub fn regex(expression: &str) -> Result<Self> {
        ModuleRegex::new(expression).map(TargetModules::Regex)
    }

    /// Whether the linear layer at `path` is selected; `is_head` says whether it is the model's
    /// output head.
    pub(crate) fn matches(&self, path: &str, is_head: bool) -> bool {
        match self {
            TargetModules::AllLinear => !is_head,
            TargetModules::Names(names) => names.iter().any(|name| is_called(path, name)),
            TargetModules::Regex(expression) => expression.is_match(path),
        }
    }
}

/// Whether `path` is `name` or ends with a dot followed by `name`.
fn is_called(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// A regular expression for module paths, in Python's syntax, including lookaround and
/// backreferences. If it takes more than a million steps on a path, it doesn't match.
#[derive(Clone)]
pub struct ModuleRegex {
    text: String,
    regex: Regex,
}

impl ModuleRegex {
    /// Compiles an expression that must match a whole path.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is malformed or needs too much memory.
    pub(crate) fn new(text: &str) -> Result<Self> {
        Self::within(text, "^(?:", ")$", 1)
    }

    /// Compiles `text`, one of `count` expressions in a list, between `before` and `after`. Checks
    /// it alone first.
    fn within(text: &str, before: &str, after: &str, count: usize) -> Result<Self> {
        let limit = MAX_COMPILED.min(MAX_ALL_COMPILED / count);
        let compile = |text: &str| RegexBuilder::new(text).delegate_size_limit(limit).build();
        let invalid = |e: RegexError| {
            let why = if is_too_large(&e) {
                format!(
                    "it needs more than {limit} bytes when compiled, its share among {count} expressions; simplify it"
                )
            } else {
                format!("it is malformed: {}", reason(&e))
            };
            Error::invalid("target modules", "regular expression", format!("{text:?}"), why)
        };
        compile(text).map_err(invalid)?;
        Ok(ModuleRegex { text: text.into(), regex: compile(&format!("{before}{text}{after}")).map_err(invalid)? })
    }

    fn is_match(&self, path: &str) -> bool {
        self.regex.is_match(path).unwrap_or(false)
    }

    /// The original text.
    pub(crate) fn as_str(&self) -> &str {
        &self.text
    }
}

fn is_too_large(error: &RegexError) -> bool {
    let RegexError::CompileError(error) = error else { return false };
    matches!(&**error, CompileError::InnerError(error) if error.size_limit().is_some())
}

/// The last line of the error, which is the message; the others draw the position.
fn reason(error: &RegexError) -> String {
    let text = error.to_string();
    let last = text.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or_default();
    last.strip_prefix("error: ").unwrap_or(last).to_owned()
}

impl PartialEq for ModuleRegex {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl fmt::Debug for ModuleRegex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.text, f)
    }
}

/// The modules that an adapter is for.
#[derive(Clone, Debug, PartialEq)]
pub struct Targets {
    modules: TargetModules,
    exclude: Option<TargetModules>,
    layers: Option<Layers>,
}

/// `layers_to_transform` and `layers_pattern`.
#[derive(Clone, Debug, PartialEq)]
struct Layers {
    indices: Vec<usize>,
    /// Original texts; empty for any container.
    containers: Vec<String>,
    /// Expressions that find the layer's index, as `idx`, in a path.
    patterns: Vec<ModuleRegex>,
}

impl Targets {
    /// Selects `modules`.
    pub fn new(modules: TargetModules) -> Self {
        Targets { modules, exclude: None, layers: None }
    }

    /// Excludes the modules in `exclude`.
    pub fn exclude(self, exclude: TargetModules) -> Self {
        Targets { exclude: Some(exclude), ..self }
    }

    /// Restricts the selection to the layers `indices`. A layer's index is the first number in a
    /// path that directly follows one of `containers` (expressions such as `layers` or `h`), or
    /// any name if there are none. As in PEFT, a module whose whole path is in the list of
    /// [`TargetModules::Names`] stays selected, and empty `indices` mean all layers.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the modules aren't [`TargetModules::Names`], or if an expression is
    /// malformed.
    pub fn layers(self, indices: Vec<usize>, containers: Vec<String>) -> Result<Self> {
        if !matches!(self.modules, TargetModules::Names(_)) {
            return Err(Error::invalid(
                "target modules",
                "layers_to_transform",
                format!("{indices:?}"),
                "it needs a list of target_modules",
            ));
        }
        let patterns = if containers.is_empty() {
            vec![ModuleRegex::new(r".*?\.[^.]*\.(?P<idx>\d+)\..*")?]
        } else {
            let count = containers.len();
            let pattern = |text: &String| ModuleRegex::within(text, r"^(?:(?:^|.*?\.)", r"\.(?P<idx>\d+)\.)", count);
            containers.iter().map(pattern).collect::<Result<_>>()?
        };
        Ok(Targets { layers: Some(Layers { indices, containers, patterns }), ..self })
    }

    /// Selected modules.
    pub fn modules(&self) -> &TargetModules {
        &self.modules
    }

    /// Excluded modules, if any.
    pub(crate) fn excluded(&self) -> Option<&TargetModules> {
        self.exclude.as_ref()
    }

    /// `layers_to_transform`.
    pub(crate) fn layers_to_transform(&self) -> Option<&[usize]> {
        self.layers.as_ref().map(|layers| &layers.indices[..])
    }

    /// `layers_pattern`.
    pub(crate) fn layers_pattern(&self) -> &[String] {
        self.layers.as_ref().map_or(&[], |layers| &layers.containers)
    }

    /// Whether the adapter is for the linear layer at `path` (such as
    /// `model.layers.0.self_attn.q_proj`); `is_head` says whether it is the model's output head.
    pub fn matches(&self, path: &str, is_head: bool) -> bool {
        if self.exclude.as_ref().is_some_and(|exclude| exclude.matches(path, is_head)) {
            return false;
        }
        let listed = matches!(&self.modules, TargetModules::Names(names) if names.iter().any(|name| name == path));
        listed || self.modules.matches(path, is_head) && self.layers.as_ref().is_none_or(|layers| layers.contain(path))
    }
}

impl Layers {
    fn contain(&self, path: &str) -> bool {
        if self.indices.is_empty() {
            return true;
        }
        let captures = self.patterns.iter().find_map(|pattern| pattern.regex.captures(path).ok().flatten());
        let index = captures.as_ref().and_then(|captures| captures.name("idx"));
        index.is_some_and(|index| self.indices.iter().any(|i| index.as_str().parse() == Ok(*i)))
    }
}

/// Values for individual modules: `rank_pattern` and `alpha_pattern`. A key is an expression that
/// matches a path as `(.*\.)?(KEY)$`. The first match counts.
#[derive(Clone, Debug, PartialEq)]
pub struct ModulePatterns<T>(Vec<(ModuleRegex, T)>);

impl<T> Default for ModulePatterns<T> {
    fn default() -> Self {
        ModulePatterns(Vec::new())
    }
}

impl<T: Copy> ModulePatterns<T> {
    /// Creates patterns from these keys and values, in this order.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a malformed key, or if the keys need too much memory.
    pub fn new<K: AsRef<str>>(entries: impl IntoIterator<Item = (K, T)>) -> Result<Self> {
        let entries: Vec<(K, T)> = entries.into_iter().collect();
        let count = entries.len();
        let entry = |(key, value): (K, T)| Ok((ModuleRegex::within(key.as_ref(), r"^(.*\.)?(", ")$", count)?, value));
        entries.into_iter().map(entry).collect::<Result<_>>().map(ModulePatterns)
    }

    /// Value for the module at `path`, if a key matches it.
    pub(crate) fn get(&self, path: &str) -> Option<T> {
        self.0.iter().find(|(key, _)| key.is_match(path)).map(|&(_, value)| value)
    }

    /// Keys and values, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, T)> {
        self.0.iter().map(|(key, value)| (key.as_str(), *value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const Q: &str = "model.layers.1.self_attn.q_proj";
    const DOWN: &str = "model.layers.12.mlp.down_proj";
    const HEAD: &str = "lm_head";

    /// Which of the three are selected.
    fn chosen(targets: &Targets) -> [bool; 3] {
        [targets.matches(Q, false), targets.matches(DOWN, false), targets.matches(HEAD, true)]
    }

    #[test]
    fn names_are_whole_parts_of_paths() {
        let chosen = |names: &[&str]| chosen(&Targets::new(TargetModules::names(names.iter().copied())));
        assert_eq!(chosen(&["q_proj", "lm_head"]), [true, false, true]);
        assert_eq!(chosen(&["self_attn.q_proj", "1.mlp.down_proj"]), [true, false, false]);
        assert_eq!(chosen(&["_proj", "proj", "head", ""]), [false; 3]);
        assert_eq!(chosen(&[Q, DOWN]), [true, true, false]);
        assert_eq!(chosen(&[]), [false; 3]);
    }

    #[test]
    fn all_linear_leaves_the_head() {
        assert_eq!(chosen(&Targets::new(TargetModules::AllLinear)), [true, true, false]);
    }

    #[test]
    fn expressions_match_whole_paths() {
        let chosen = |text: &str| chosen(&Targets::new(TargetModules::regex(text).unwrap()));
        assert_eq!(chosen(r".*\.(q|k|v)_proj"), [true, false, false]);
        assert_eq!(chosen("q_proj"), [false; 3]);
        assert_eq!(chosen(r"model|model\.layers\.\d+\.mlp\.down_proj|lm_head"), [false, true, true]);
        // Written like PEFT's users do.
        assert_eq!(chosen(r"^(?!.*lm_head).*(q_proj|v_proj)$"), [true, false, false]);
        assert_eq!(chosen(r".*(?<=mlp\.)down_proj"), [false, true, false]);
        assert_eq!(chosen(r".*(l)ayers.*self_att.*q_pro.*|.*\.(\d)\2?2?\.mlp.*"), [true, true, false]);
        for bad in ["(", r"(?!lm_head", r"(.)\2", "a)(b", r"\p{Nothing}", "[z-a]"] {
            let error = TargetModules::regex(bad).unwrap_err().to_string();
            assert!(error.contains(&format!("{bad:?}")) && !error.contains('\n'), "{error}");
        }
        assert!(!TargetModules::regex("(?=a)(a*a*)*b").unwrap().matches(&"a".repeat(60), false), "ends all the same");
    }

    #[test]
    fn excluded_modules_are_left_out() {
        let all = || Targets::new(TargetModules::AllLinear);
        assert_eq!(chosen(&all().exclude(TargetModules::names(["q_proj"]))), [false, true, false]);
        assert_eq!(chosen(&all().exclude(TargetModules::regex(r".*\.mlp\..*").unwrap())), [true, false, false]);
        let listed = Targets::new(TargetModules::names([Q])).exclude(TargetModules::names(["q_proj"]));
        assert_eq!(chosen(&listed), [false; 3]);
    }

    #[test]
    fn layers_are_the_first_number_of_a_path() {
        let targets = |indices: &[usize], containers: &[&str]| {
            let containers = containers.iter().map(|&container| container.into()).collect();
            Targets::new(TargetModules::names(["q_proj", "down_proj"])).layers(indices.into(), containers).unwrap()
        };
        assert_eq!(chosen(&targets(&[1], &[])), [true, false, false]);
        assert_eq!(chosen(&targets(&[0, 12], &[])), [false, true, false]);
        assert_eq!(chosen(&targets(&[2], &[])), [false; 3]);
        assert_eq!(chosen(&targets(&[], &[])), [true, true, false]);
        assert_eq!(chosen(&targets(&[1, 12], &["h", "layers"])), [true, true, false]);
        assert_eq!(chosen(&targets(&[1], &["layer", "ayers"])), [false; 3]);
        assert!(targets(&[3], &[]).matches("model.layers.3.experts.1.down_proj", false));
        assert!(!targets(&[1], &[]).matches("model.layers.3.experts.1.down_proj", false));
        assert!(targets(&[0], &["layers"]).matches("layers.0.q_proj", false));

        let exact = Targets::new(TargetModules::names([Q])).layers(vec![7], vec![]).unwrap();
        assert_eq!(chosen(&exact), [true, false, false], "as PEFT has it");
        let error = Targets::new(TargetModules::AllLinear).layers(vec![1], vec![]).unwrap_err();
        assert_eq!(error.to_string(), "target modules: layers_to_transform is [1]; it needs a list of target_modules");
        let error =
            Targets::new(TargetModules::names(["x"])).layers(vec![1], vec!["(".into()]).unwrap_err().to_string();
        assert!(error.starts_with("target modules: regular expression is \"(\"; it is malformed: "), "{error}");
    }

    #[test]
    fn expressions_take_bounded_memory() {
        let error = TargetModules::regex(r"\w{200}").unwrap_err().to_string();
        assert!(error.contains("1048576 bytes"), "{error}");
        let hostile = (0..500).map(|i| (format!(r"\w{{9}}{i}"), 1));
        let error = ModulePatterns::new(hostile).unwrap_err().to_string();
        assert!(error.contains("among 500 expressions"), "{error}");
        // A rank for every module of a large model.
        let modules = ["self_attn.q_proj", "mlp.down_proj", r"(gate|up)_proj"];
        let large = (0..800).map(|i| (format!("model.layers.{i}.{}", modules[i % 3]), i));
        assert_eq!(ModulePatterns::new(large).unwrap().get("model.layers.799.self_attn.q_proj"), None);
        let containers = vec![r"\w{5}".to_owned(); 100];
        assert_eq!(
            Targets::new(TargetModules::names(["x"])).layers(vec![1], containers).unwrap_err().to_string(),
            "target modules: regular expression is \"\\\\w{5}\"; it needs more than 167772 bytes when compiled, its \
             share among 100 expressions; simplify it"
        );
    }

    #[test]
    fn the_first_pattern_that_matches_counts() {
        let patterns = ModulePatterns::new([
            (r"layers\.1\.self_attn\.q_proj", 1),
            ("q_proj|down_proj", 2),
            ("^model.layers.12.mlp.down_proj", 3),
            ("head", 4),
        ])
        .unwrap();
        assert_eq!((patterns.get(Q), patterns.get(DOWN), patterns.get(HEAD)), (Some(1), Some(2), None));
        assert_eq!(patterns.get("model.layers.0.self_attn.q_proj"), Some(2));
        assert_eq!(patterns.get("model.layers.0.self_attn.qq_proj"), None);
        let anchored = ModulePatterns::new([("^model.layers.12.mlp.down_proj", 3)]).unwrap();
        assert_eq!((anchored.get(DOWN), anchored.get(&format!("x.{DOWN}"))), (Some(3), None));
        let behind = ModulePatterns::new([(r"(?<!mlp\.)down_proj", 3), (r"down_proj", 4)]).unwrap();
        assert_eq!(behind.get(DOWN), Some(4));
    }
}
