//! Jinja as `apply_chat_template` of Hugging Face's transformers has it, with bounds on time and memory.

use std::io::{self, Write};
use std::panic::resume_unwind;
use std::sync::LazyLock;
use std::thread::{self, ScopedJoinHandle};

use jiff::Zoned;
use jiff::fmt::strtime;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest};
use minijinja::{Environment, Error as JinjaError, ErrorKind, State, Value, filters};
use minijinja_contrib::pycompat;
use regex::Regex;
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use crate::error::{Error, Result};

const NAME: &str = "chat";

/// The most bytes of a template, far more than those of models have. minijinja's time for a chain of operators grows with the
/// square of its length.
const MAX_SOURCE: usize = 1 << 16;

/// Stack for each byte of a template, several times what one more level of its syntax tree takes.
const STACK_PER_BYTE: usize = 4 << 10;

/// Steps that a template may take: about a hundred a message are usual. minijinja counts every 64 bytes that are made or looked
/// through as a step too, so that this bounds memory (32 MiB) as well as time.
const MAX_STEPS: u64 = 1 << 19;

/// Bytes that are one step.
const BYTES_PER_STEP: usize = 64;

/// Bytes that are all of them.
const MAX_BYTES: usize = MAX_STEPS as usize * BYTES_PER_STEP;

/// A compiled template.
#[derive(Debug)]
pub(super) struct Jinja {
    environment: Environment<'static>,
}

impl Jinja {
    /// Compiles a template.
    ///
    /// # Errors
    /// [`Error::Template`] if it is malformed, [`Error::Invalid`] if it is longer than 64 KiB.
    pub fn new(source: &str) -> Result<Self> {
        if source.len() > MAX_SOURCE {
            return Err(Error::Invalid {
                op: "chat template",
                what: "its length",
                got: format!("{} bytes", source.len()),
                expected: format!("at most {MAX_SOURCE} are supported"),
            });
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(template_error)?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(MAX_STEPS));
        environment.set_unknown_method_callback(method);
        environment.add_filter(JOIN, filters::join);
        environment.add_filter("join", join);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        compile(&mut environment, without_generation_tags(source))?;
        Ok(Jinja { environment })
    }

    /// The template's text with these variables.
    ///
    /// # Errors
    /// [`Error::Template`] if the template raises an error, or does what is not supported.
    pub fn render(&self, variables: Value) -> Result<String> {
        self.environment.get_template(NAME).and_then(|template| template.render(variables)).map_err(template_error)
    }
}

/// Compiles `source` on a stack of its own: minijinja walks syntax trees recursively, and a chain of operators, filters or
/// `elif` is a tree as deep as it is long. What is compiled is flat.
fn compile(environment: &mut Environment<'static>, source: String) -> Result<()> {
    let stack = (2 << 20) + source.len() * STACK_PER_BYTE;
    let compiled = thread::scope(|scope| {
        let add = move || environment.add_template_owned(NAME, source);
        thread::Builder::new().stack_size(stack).spawn_scoped(scope, add).map(ScopedJoinHandle::join)
    });
    let no_thread = |e: io::Error| Error::Template { line: 0, message: format!("no thread to compile it on: {e}") };
    compiled.map_err(no_thread)?.unwrap_or_else(|panic| resume_unwind(panic)).map_err(template_error)
}

fn template_error(error: JinjaError) -> Error {
    let message = match error.kind() {
        ErrorKind::OutOfFuel => format!("takes more than {MAX_STEPS} steps, or the memory that goes with them"),
        kind => error.detail().map_or_else(|| kind.to_string(), str::to_owned),
    };
    Error::Template { line: error.line().unwrap_or(0), message }
}

/// The tags `generation` and `endgeneration`, with which transformers marks the assistant's words, as blocks that are
/// always shown. Lines stay where they are.
fn without_generation_tags(source: &str) -> String {
    static TAGS: LazyLock<[(Regex, &str); 2]> = LazyLock::new(|| {
        [
            (r"\{%([-+]?)\s*generation\s*([-+]?)%\}", "{%$1 if true $2%}"),
            (r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", "{%$1 endif $2%}"),
        ]
        .map(|(tag, block)| (Regex::new(tag).unwrap_or_else(|error| unreachable!("{error}")), block))
    });
    TAGS.iter().fold(source.to_owned(), |text, (tag, block)| tag.replace_all(&text, *block).into_owned())
}

/// minijinja's own `join`.
const JOIN: &str = "join of minijinja";

/// Joins texts. minijinja counts those that are many times in a list only once, so that the result is paid for here.
fn join(state: &mut State, values: &Value, rest: Rest<Value>) -> Result<Value, JinjaError> {
    let joiner = rest.first().map_or(0, |joiner| joiner.as_str().map_or(0, str::len));
    for value in values.try_iter()? {
        pay(state, length(&value).saturating_add(joiner))?;
    }
    let args: Vec<Value> = [values.clone()].into_iter().chain(rest.0).collect();
    state.apply_filter(JOIN, &args)
}

/// A method of Python's. What it looks through is paid for, and what it may make before it is made.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, JinjaError> {
    let text = value.as_str().unwrap_or_default();
    let given = args.iter().fold(text.len(), |sum, arg| sum.saturating_add(arg.as_str().map_or(0, str::len)));
    pay(state, given)?;
    match (name, args) {
        ("join", [values]) if value.as_str().is_some() => state.apply_filter("join", &[values.clone(), value.clone()]),
        ("replace", [old, new, ..]) => {
            let (old, new) = (old.as_str().unwrap_or_default(), new.as_str().unwrap_or_default());
            pay(state, text.matches(old).count().saturating_mul(new.len()))?;
            pycompat::unknown_method_callback(state, value, name, args)
        }
        ("format", _) => {
            // Any field may ask for any argument, and for any width.
            let widest = text.split(|c: char| !c.is_ascii_digit()).map(|digits| digits.parse().unwrap_or(0)).max();
            let longest = args.iter().map(length).fold(widest.unwrap_or(0), usize::max);
            pay(state, text.matches('{').count().saturating_mul(longest))?;
            pycompat::unknown_method_callback(state, value, name, args)
        }
        _ => pycompat::unknown_method_callback(state, value, name, args),
    }
}

fn pay(state: &State, bytes: usize) -> Result<(), JinjaError> {
    state.consume_fuel((bytes / BYTES_PER_STEP + 1) as u64)
}

/// Bytes of a value as text; where they are more than a template may make, as many as are too many.
fn length(value: &Value) -> usize {
    if let Some(text) = value.as_str() {
        return text.len();
    }
    let mut text = Bounded::default();
    match write!(text, "{value}") {
        Ok(()) => text.0.len(),
        Err(_) => MAX_BYTES,
    }
}

/// Text of at most as many bytes as a template may make.
#[derive(Default)]
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > MAX_BYTES - self.0.len() {
            return Err(io::Error::other("the text is too long"));
        }
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn raise_exception(message: String) -> Result<Value, JinjaError> {
    Err(JinjaError::new(ErrorKind::InvalidOperation, message))
}

fn strftime_now(format: &str) -> Result<String, JinjaError> {
    strtime::format(format, &Zoned::now()).map_err(|e| JinjaError::new(ErrorKind::InvalidOperation, e.to_string()))
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False, indent=indent)` writes it: spaces after commas and colons, and
/// nothing escaped for HTML.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, JinjaError> {
    let indent: Option<u8> = options.get("indent")?;
    // transformers' own defaults, which templates state now and then.
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let mut text = Bounded::default();
    let written = match indent {
        Some(indent) => {
            let indent = " ".repeat(indent.into());
            value.serialize(&mut Serializer::with_formatter(&mut text, PrettyFormatter::with_indent(indent.as_bytes())))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut text, PythonFormatter)),
    };
    let failed = |message: String| JinjaError::new(ErrorKind::BadSerialization, message);
    written.map_err(|e| failed(e.to_string()))?;
    Ok(Value::from_safe_string(String::from_utf8(text.0).map_err(|e| failed(e.to_string()))?))
}

struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use minijinja::context;

    use super::*;

    fn render(source: &str) -> Result<String> {
        let messages = [context! { role => "user", content => " <a> \"é\" " }];
        Jinja::new(source)?.render(context! { messages, bos_token => "<s>", eos_token => "</s>" })
    }

    #[test]
    fn blocks_take_their_lines_as_jinja2_in_transformers() {
        let source = "{% for message in messages %}\n    {% if true %}\n{{ message.role }}:\n    {% endif %}\n{% endfor %}\nend\n";
        assert_eq!(render(source).unwrap(), "user:\nend");
    }

    #[test]
    fn what_templates_take_from_python() {
        let cases = [
            ("{{ messages[0]['content'].strip() }}", "<a> \"é\""),
            ("{{ messages[0].content | trim | tojson }}", r#""<a> \"é\"""#),
            ("{{ {'b': [1, 'x'], 'a': none} | tojson }}", r#"{"b": [1, "x"], "a": null}"#),
            ("{{ {'b': [1]} | tojson(indent=2) }}", "{\n  \"b\": [\n    1\n  ]\n}"),
            ("{{ 'a</think>b'.split('</think>')[-1] }}", "b"),
            ("{{ 'abc'.startswith('ab') and not 'abc'.endswith('ab') }}", "True"),
            ("{% for key, value in {'k': 1}.items() %}{{ key }}{{ value }}{% endfor %}", "k1"),
            ("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
            ("{% for i in [1, 2, 3][::-1] %}{{ i }}{% endfor %}", "321"),
            ("{% set ns = namespace(n=0) %}{% for i in [1, 2] %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "3"),
            ("{{ bos_token + messages[0]['role'] + eos_token }}", "<s>user</s>"),
            ("{% if messages[0].tool_calls %}x{% else %}y{% endif %}{{ tools is defined }}", "yFalse"),
            ("{% generation %}\nkept{%- endgeneration %}", "kept"),
            ("{{ messages[0].content is string }}{{ messages | length }}", "True1"),
        ];
        for (source, wanted) in cases {
            assert_eq!(render(source).unwrap(), wanted, "{source}");
        }
        let year = render("{{ strftime_now('%Y') }}").unwrap();
        assert_eq!(year, Zoned::now().year().to_string());
    }

    #[test]
    fn templates_exhaust_neither_stack_nor_memory() {
        let fill = |before: &str, link: &str, after: &str| {
            let room = MAX_SOURCE - before.len() - after.len();
            format!("{before}{}{after}", link.repeat(room / link.len()))
        };
        for (before, link, after) in [
            ("{{ 1", "+1", " }}"),
            ("{{ ", "-", "1 }}"),
            ("{{ ", "not ", "1 }}"),
            ("{{ 1", "|e", " }}"),
            ("{{ a", ".b", " }}"),
            ("{{ a", "()", " }}"),
            ("{{ ", "1 if b else ", "1 }}"),
            ("{% if a %}", "{% elif b %}", "{% endif %}"),
        ] {
            Jinja::new(&fill(before, link, after)).unwrap();
        }
        let nested = Jinja::new(&fill("{{ ", "(", "")).unwrap_err();
        assert!(nested.to_string().contains("recursion"), "{nested}");
        let long = Jinja::new(&"a".repeat(MAX_SOURCE + 1)).unwrap_err();
        assert!(long.to_string().contains("65537 bytes"), "{long}");
        assert!(render("{{ [1] | tojson(indent=255) }}").is_ok() && render("{{ [1] | tojson(indent=256) }}").is_err());
    }

    #[test]
    fn rendering_takes_bounded_time_and_memory() {
        for source in [
            "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
            "{{ 'a' * 99999999 }}",
            "{% set n = namespace(x='a') %}{% for i in range(64) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "{{ (['a' * 999999] * 99999) | join }}",
            "{{ ''.join(['a' * 999999] * 99999) }}",
            "{{ [['a' * 999999] * 99999] | join }}",
            "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
            "{{ ('a' * 99999).replace('', 'b' * 99999, 99999) }}",
            "{{ '{:999999999999}'.format(1) }}",
            "{{ ('{0}' * 99999).format('a' * 99999) }}",
            "{{ '%99999999d' | format(1) }}",
            "{{ 'a' | indent(999999999, true) }}",
            "{% set s = 'a' * 999999 %}{% for i in range(99999) %}{{ s.count('b') }}{% endfor %}",
            "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
            "{{ [['a' * 999999] * 99999] | tojson }}",
            "{{ [['a' * 999999] * 99999] | tojson(indent=2) }}",
        ] {
            let error = render(source).expect_err(source).to_string();
            let bounds = ["steps", "recursion", "too long"];
            assert!(bounds.iter().any(|bound| error.contains(bound)), "{source}: {error}");
        }
        let methods = [("{{ ', '.join(['a', 1]) }}", "a, 1"), ("{{ 'aba'.replace('a', 'c', 1) }}", "cba")];
        for (source, wanted) in methods.into_iter().chain([("{{ '{:>3}|{}'.format('a', 2) }}", "  a|2")]) {
            assert_eq!(render(source).unwrap(), wanted, "{source}");
        }
    }

    #[test]
    fn errors_name_the_line() {
        let line = |source: &str| match render(source) {
            Err(Error::Template { line, message }) => (line, message),
            other => panic!("{other:?}"),
        };
        assert_eq!(line("a\n\n{{ raise_exception('roles must alternate') }}"), (3, "roles must alternate".into()));
        assert_eq!(line("a\n{% if %}").0, 2);
        assert_eq!(line("a\n{{ 1 | nonsense }}").0, 2);
        assert_eq!(line("{{ strftime_now('%') }}").0, 1);
    }
}
