//! Jinja as in `apply_chat_template` of Hugging Face's transformers, with limits on depth, size
//! and time.

use std::io;
use std::panic::resume_unwind;
use std::sync::LazyLock;
use std::thread::{self, ScopedJoinHandle};

use minijinja::machinery::{eval, get_compiled_template, make_string_output};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error as JinjaError, ErrorKind, Value};
use regex::{Captures, Regex};

use super::instrument::{END_GENERATION, GENERATION, instrument};
use super::panics::caught;
use super::{bounds, marks, python};
use crate::error::{Error, Result};

const NAME: &str = "chat";

/// Maximum size of a template in bytes, far above those of real models. minijinja's time for a
/// chain of operators grows with the square of its length.
const MAX_SOURCE: usize = 1 << 16;

/// Stack per byte of a template, several times what a level of its syntax tree needs.
const STACK_PER_BYTE: usize = 4 << 10;

/// Maximum steps of a template. A few hundred per message are usual, including checks. minijinja
/// also counts every 64 bytes made or walked through as a step, so this limits memory too (256
/// MiB).
const MAX_STEPS: u64 = 1 << 22;

/// A compiled template.
#[derive(Debug)]
pub(super) struct Jinja {
    environment: Environment<'static>,
    /// Whether it has `generation` blocks.
    pub(super) generation: bool,
}

impl Jinja {
    /// Compiles a template.
    ///
    /// # Errors
    /// [`Error::Template`] if it is malformed, [`Error::Invalid`] if it is longer than 64 KiB.
    pub(super) fn new(source: &str) -> Result<Self> {
        if source.len() > MAX_SOURCE {
            return Err(Error::invalid(
                "chat template",
                "its length",
                format!("{} bytes", source.len()),
                format!("at most {MAX_SOURCE} are supported"),
            ));
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(template_error)?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(MAX_STEPS));
        // Makes errors say which variable is undefined.
        environment.set_debug(true);
        python::add_to(&mut environment);
        bounds::add_to(&mut environment);
        marks::add_to(&mut environment);
        let with_blocks = generation_blocks(source);
        let generation = with_blocks != source;
        compile(&mut environment, with_blocks)?;
        Ok(Jinja { environment, generation })
    }

    /// Renders the template with these variables; with marks, if there is a sentinel.
    ///
    /// # Errors
    /// [`Error::Template`] if the template raises an error, or does something unsupported.
    pub(super) fn render(&self, variables: Value, sentinel: Option<char>) -> Result<String> {
        let mut text = String::new();
        let render = || {
            let template = self.environment.get_template(NAME)?;
            let compiled = get_compiled_template(&template);
            let code = instrument(&compiled.instructions, sentinel);
            let blocks = compiled.blocks.iter().map(|(name, block)| (*name, instrument(block, sentinel))).collect();
            let escape = compiled.initial_auto_escape.clone();
            eval(&self.environment, &code, variables, &blocks, &mut make_string_output(&mut text), escape).map(drop)
        };
        // The library panics for some numbers, such as a slice with the smallest possible step.
        let panicked = |_| Error::Template { line: 0, message: "the template library can't compute it".into() };
        caught(render).map_err(panicked)?.map_err(template_error)?;
        Ok(text)
    }
}

/// Compiles `source` on its own stack: minijinja walks syntax trees recursively, and a chain of
/// operators, filters or `elif` is a tree as deep as the chain is long. The compiled code is flat.
fn compile(environment: &mut Environment<'static>, source: String) -> Result<()> {
    let stack = (2 << 20) + source.len() * STACK_PER_BYTE;
    let compiled = thread::scope(|scope| {
        let add = move || environment.add_template_owned(NAME, source);
        thread::Builder::new().stack_size(stack).spawn_scoped(scope, add).map(ScopedJoinHandle::join)
    });
    let no_thread =
        |e: io::Error| Error::Template { line: 0, message: format!("can't start a thread to compile it: {e}") };
    compiled.map_err(no_thread)?.unwrap_or_else(|panic| resume_unwind(panic)).map_err(template_error)
}

fn template_error(error: JinjaError) -> Error {
    // Errors inside macros and blocks are wrapped in others.
    let mut inner = &error;
    while let Some(source) = std::error::Error::source(inner).and_then(|source| source.downcast_ref::<JinjaError>()) {
        inner = source;
    }
    let message = match inner.kind() {
        ErrorKind::OutOfFuel => format!("takes more than {MAX_STEPS} steps, or too much memory"),
        kind => inner.detail().map_or_else(|| kind.to_string(), str::to_owned),
    };
    Error::Template { line: inner.line().or(error.line()).unwrap_or(0), message }
}

/// Replaces the tags `generation` and `endgeneration`, with which transformers marks the
/// assistant's text, by blocks that are always shown, with a marker at start and end. Lines keep
/// their numbers.
fn generation_blocks(source: &str) -> String {
    static TAGS: LazyLock<[(Regex, String); 2]> = LazyLock::new(|| {
        [
            (r"generation", format!("if {GENERATION} ")),
            (r"endgeneration", format!("if {END_GENERATION} %}}{{% endif %}}{{% endif ")),
        ]
        .map(|(tag, block)| {
            // Skip comments and raw blocks.
            let other = r"\{#(?s:.*?)#\}|\{%[-+]?\s*raw\s*[-+]?%\}(?s:.*?)\{%[-+]?\s*endraw\s*[-+]?%\}";
            let expression = format!(r"{other}|\{{%(?<left>[-+]?)\s*{tag}\s*(?<right>[-+]?)%\}}");
            (Regex::new(&expression).unwrap_or_else(|error| unreachable!("{error}")), block)
        })
    });
    TAGS.iter().fold(source.to_owned(), |text, (tag, block)| {
        let replaced = |found: &Captures<'_>| match (found.name("left"), found.name("right")) {
            (Some(left), Some(right)) => format!("{{%{} {block}{}%}}", left.as_str(), right.as_str()),
            _ => found[0].to_owned(),
        };
        tag.replace_all(&text, replaced).into_owned()
    })
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use jiff::Zoned;
    use minijinja::context;

    use super::*;

    #[test]
    fn tags_in_comments_are_no_blocks() {
        let source = "{# {% generation %} #}{% raw %}{% generation %}{% endraw %}";
        assert_eq!(generation_blocks(source), source);
        assert!(generation_blocks("{# a #}{%- generation %}b{% endgeneration -%}").starts_with("{# a #}{%- if "));
    }

    #[test]
    fn what_the_library_panics_for_is_an_error() {
        // Without overflow checks, the library wraps around instead.
        let _ = render("{{ [1, 2, 3][::-9223372036854775808] }}");
    }

    fn render(source: &str) -> Result<String> {
        let messages = [context! { role => "user", content => " <a> \"é\" " }];
        Jinja::new(source)?.render(context! { messages, bos_token => "<s>", eos_token => "</s>" }, None)
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
            (
                "{{ {'b': 'é😀', 'a': 1e16} | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}",
                r#"{"a":1e+16,"b":"\u00e9\ud83d\ude00"}"#,
            ),
            (
                "{{ [[], {}, 1.0, 0.00001, true, '\u{7f}\u{1}<'] | tojson(indent=1) }}",
                "[\n [],\n {},\n 1.0,\n 1e-05,\n true,\n \"\u{7f}\\u0001<\"\n]",
            ),
            ("{{ {1: none}.items() | list }}{{ ({'a': 1} | items | list)[0][1] }}", "[(1, None)]1"),
            (
                "{{ 'a-b-c'.rsplit('-', 1) }}{{ ' a  b '.rsplit() }}{{ 'a b c'.rsplit(none, 1)[1] }}",
                "['a-b', 'c']['a', 'b']c",
            ),
            (
                "{{ 'abc'.removeprefix('a').removesuffix('c') }}{{ 'a=b=c'.partition('=') }}{{ 'a'.rpartition('=')[2] }}",
                "b('a', '=', 'b=c')a",
            ),
            (
                "{{ 'ab'.center(5, '*') }}{{ '-1'.zfill(4) }}{{ 'a'.ljust(2) }}{{ 'a'.rjust(2) }}{{ 'aB'.swapcase() }}",
                "**ab*-001a  aAb",
            ),
            (
                "{% set j = joiner('|') %}{{ j() }}a{{ j() }}b{% set c = cycler(1, 2) %}{{ c.next() }}{{ c.next() }}{{ c.next() }}",
                "a|b121",
            ),
            ("{{ tools is defined }}{{ 'abc'.index('c') if false }}", "False"),
            ("{{ [3, 1] + [2] }}{{ ([1] * 3) | length }}{{ [1, 2] == [1] + [2] }}", "[3, 1, 2]3True"),
            (
                "{% set ns = namespace(l=[]) %}{% for i in range(3) %}{% set ns.l = ns.l + [[i]] %}{% endfor %}{{ ns.l }}",
                "[[0], [1], [2]]",
            ),
            (
                "{{ [{'a': {'b': 1}}, {}] | map(attribute='a.b', default=2) | join('-') }}{{ [[1, 2], [3]] | map('join', d='+') | list }}",
                "1-2['1+2', '3']",
            ),
            (
                "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | rejectattr('role', 'in', ['user']) | list }}",
                "1[]",
            ),
            (
                "{{ range(5) | select('odd') | list }}{{ range(3) | reject('odd') | sum }}{{ [[1], [2]] | sum(start=[0]) }}{{ ([[1]] * 99999) | sum(start=[]) | length }}{{ ['a', 'b'] | map('upper') | first }}",
                "[1, 3]2[0, 1, 2]99999A",
            ),
            (
                "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m.items() | length }}{% else %}none{% endfor %}",
                "12",
            ),
            ("{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", "123"),
            ("{% macro f(x, y=2) %}{% for i in range(x) %}{{ i }}{{ y }}{% endfor %}{% endmacro %}{{ f(2) }}", "0212"),
            ("{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x }}", "a"),
            (
                "{{ messages[0] | tojson }}{{ messages[0].get('x', 'y') }}{{ 'role' in messages[0] }}",
                r#"{"role": "user", "content": " <a> \"é\" "}yTrue"#,
            ),
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
        assert_eq!(nested.to_string(), "line 1 of the chat template: template exceeds maximum recursion limits");
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
            "{% set a = [1] %}{% set a = a * 99999999 %}{{ a == a * 1 }}",
            "{{ [1] | batch(999999999, 0) | length }}",
            "{{ [1] | slice(999999999) | length }}",
            "{{ (['ab'] * 999999) | map('list') | list | length }}",
            "{{ ([('a' * 9999)] * 9999) | unique | list | length }}{{ (['a' * 99999] * 9999) | sort | length }}",
            "{{ ([[1]] * 99999) | map('batch', 99999, 0) | list | length }}",
            "{{ ([[1] * 99 + [2]] * 999) | select('in', [[1] * 99] * 999) | list | length }}",
            "{{ 'a'.center(999999999) }}",
            "{{ 'a'.zfill(999999999) }}",
            "{{ 'a'.ljust(999999999) }}",
            "{{ ('a' * 99999).split('') | join('b' * 99999) }}",
        ] {
            let error = render(source).expect_err(source).to_string();
            let bounds = ["steps", "recursion", "too long", "more than 16777216 bytes", "deeper than", "2 seconds"];
            assert!(bounds.iter().any(|bound| error.contains(bound)), "{source}: {error}");
        }
        let methods = [("{{ ', '.join(['a', 1]) }}", "a, 1"), ("{{ 'aba'.replace('a', 'c', 1) }}", "cba")];
        for (source, wanted) in methods.into_iter().chain([("{{ '{:>3}|{}'.format('a', 2) }}", "  a|2")]) {
            assert_eq!(render(source).unwrap(), wanted, "{source}");
        }
    }

    /// Values that grow in a loop, in depth (one level per round) or in size (doubling per round),
    /// and what is done with them.
    #[test]
    fn values_are_bounded_whatever_is_done_with_them() {
        let deep = [
            "[ns.x]",
            "(ns.x,)",
            "{'a': ns.x}",
            "{1: [ns.x]}",
            "dict(a=ns.x)",
            "[ns.x] * 1",
            "[ns.x] + []",
            "[ns.x] | batch(2)",
            "[ns.x] | list",
            "[ns.x] | map('list')",
            "[ns.x] | groupby('a')",
            "namespace(x=ns.x)",
            "cycler(ns.x)",
            "[[ns.x], 1][::-1]",
            "{'a': ns.x} | items",
            "{'a': ns.x}.values()",
            "[ns] + [ns.x]",
            "f(ns.x)",
        ];
        let wide = [
            "ns.x + ns.x",
            "[ns.x, ns.x]",
            "ns.x * 2",
            "{'a': ns.x, 'b': ns.x}",
            "[ns.x] | batch(2, ns.x)",
            "[ns.x] * 2",
            "(ns.x, ns.x)",
            "[ns.x, ns.x] | sum(start=[])",
            "(ns.x ~ ns.x)",
            "(ns.x + ns.x) | list",
        ];
        let growing = |rounds: u32, grow: &str, done: &str| {
            let source = "{% macro f(x) %}{% if x is iterable %}{{ f([x]) }}{% endif %}{% endmacro %}\
                 {% set ns = namespace(x=[1, 2], y=[1, 2]) %}{% for i in range(ROUNDS) %}\
                 {% set ns.x = GROW %}{% endfor %}{% for i in range(ROUNDS) %}{% set ns.y = ns.x %}{% endfor %}DONE";
            source.replace("ROUNDS", &rounds.to_string()).replace("GROW", grow).replace("DONE", done)
        };
        let bounds = ["deeper than", "more than 16777216 bytes", "recursion", "keeps a namespace", "`cycler`", "steps"];
        for grow in deep.iter().chain(&wide) {
            let error = render(&growing(99999, grow, "")).expect_err(grow).to_string();
            assert!(bounds.iter().any(|bound| error.contains(bound)), "{grow}: {error}");
        }
        // Just within the limits, everything finishes in time or is refused.
        let uses = [
            "{{ ns.x }}",
            "{{ ns.x | tojson }}",
            "{{ ns.x == ns.y }}{{ ns.x < ns.y }}",
            "{{ ns.x in [ns.y] }}",
            "{{ {ns.x: 1}[ns.y] }}",
            "{{ [ns.x, ns.y] | unique | list | length }}",
            "{{ [ns.x, ns.y] | sort | length }}",
            "{{ ns.x ~ '' }}",
            "{{ ns.x | string | length }}",
            "{{ ns.x | join }}",
            "{{ [ns.x] | join }}",
            "{{ ns.x | pprint }}",
            "{{ ns.x | length }}",
            "{{ '%s' | format(ns.x) }}",
            "{{ '{}'.format(ns.x) }}",
            "{% for a in ns.x %}{% endfor %}",
            "{{ ns.x | first | last }}",
            "{{ ns.x | min }}{{ ns.x is sameas ns.y }}",
            "{{ ns }}",
            "{{ raise_exception(ns.x) }}",
            "{{ ns.x | groupby(0) }}",
            "{{ [1] | map('default', ns.x) | list }}",
            "{{ undefined_function(ns.x) }}",
            "",
            "{{ ns.x.a }}",
        ];
        for (rounds, grow) in [(150, deep[0]), (70, deep[2]), (13, wide[0]), (12, wide[1]), (12, wide[3])] {
            for done in uses {
                let started = Instant::now();
                drop(render(&growing(rounds, grow, done)));
                assert!(started.elapsed() < Duration::from_secs(10), "{grow} {done}: {:?}", started.elapsed());
            }
        }
    }

    #[test]
    fn nothing_hides_in_loops_and_namespaces() {
        for (source, wanted) in [
            ("{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}", "keeps a namespace"),
            ("{% set ns = namespace() %}{% set ns.x = [ns] %}", "keeps a namespace"),
            ("{% set ns = namespace(x=namespace()) %}", "keeps a namespace"),
            (
                "{% set ns = namespace(x=1) %}{% for i in [1, 2] %}{% if loop.changed(ns.x) %}{% set ns.x = loop %}{% endif %}\
              {% endfor %}",
                "a loop in a namespace",
            ),
            ("{% for i in [1] %}{{ [loop] }}{% endfor %}", "a loop in another value"),
        ] {
            let error = render(source).unwrap_err().to_string();
            assert!(error.contains(wanted), "{source}: {error}");
        }
        let macros = "{% macro f(ns) %}{% set ns.x = ns.x + 1 %}{% endmacro %}{% set ns = namespace(x=1) %}{{ f(ns) }}{{ ns.x }}";
        assert_eq!(render(macros).unwrap(), "2");
    }

    #[test]
    fn a_template_has_two_seconds() {
        let started = Instant::now();
        // Every comparison walks through a million values, but minijinja counts it as one step.
        let slow = "{% set ns = namespace(a=[1, 2], b=[1, 2]) %}{% for i in range(17) %}{% set ns.a = [ns.a, ns.a] %}\
                    {% set ns.b = [ns.b, ns.b] %}{% endfor %}{% for i in range(99999) %}{% if ns.a == ns.b %}{% endif %}{% endfor %}";
        let error = render(slow).unwrap_err().to_string();
        assert!(error.contains("2 seconds"), "{error}");
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
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
        assert_eq!(line("\n{{ messages[0].x.y.z }}"), (2, "`messages[0].x` is undefined".into()));
        assert_eq!(line("{{ 'a'.nonsense() }}"), (1, "string has no method named nonsense".into()));
        assert_eq!(line("{{ 1 | xmlattr }}"), (1, "filter xmlattr is unknown".into()));
        assert_eq!(line("{{ now() }}"), (1, "now is unknown".into()));
        assert_eq!(line("{{ 1 | tojson(skipkeys=true) }}"), (1, "unknown keyword argument 'skipkeys'".into()));
    }
}
