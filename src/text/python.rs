//! Python features that chat templates expect: filters, functions and methods as in transformers
//! and Jinja2.

use std::fmt::{self, Write};

use jiff::Zoned;
use jiff::fmt::strtime;
use minijinja::value::{Kwargs, Rest, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters};
use minijinja_contrib::{globals, pycompat};

/// Bytes that count as one step of a template, as in minijinja.
const BYTES_PER_STEP: usize = 64;

use super::bounds::{self, MAX_BYTES};

type Result<T, E = Error> = std::result::Result<T, E>;

/// Adds all of them.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(method);
    environment.add_filter(JOIN, filters::join);
    environment.add_filter("join", join);
    environment.add_filter(SUM, filters::sum);
    environment.add_filter("sum", sum);
    environment.add_filter(MAP, filters::map);
    environment.add_filter("map", one_by_one(MAP));
    environment.add_filter("\u{1}select", filters::select);
    environment.add_filter("select", one_by_one("\u{1}select"));
    environment.add_filter("\u{1}reject", filters::reject);
    environment.add_filter("reject", one_by_one("\u{1}reject"));
    environment.add_filter("\u{1}selectattr", filters::selectattr);
    environment.add_filter("selectattr", one_by_one("\u{1}selectattr"));
    environment.add_filter("\u{1}rejectattr", filters::rejectattr);
    environment.add_filter("rejectattr", one_by_one("\u{1}rejectattr"));
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_function("joiner", joiner);
    environment.add_function("cycler", cycler);
    // `debug` writes everything, whatever its size.
    environment.remove_global("debug");
}

/// minijinja's own `join`.
const JOIN: &str = "join of minijinja";

/// Joins texts. If a text occurs many times in a list, minijinja counts it only once, so the
/// result is counted here.
fn join(state: &mut State, values: &Value, rest: Rest<Value>, named: Kwargs) -> Result<Value> {
    let [joiner, attribute] = options(&rest, &named, ["d", "attribute"])?;
    let items = match attribute.as_str() {
        Some(name) => Value::from(values.try_iter()?.map(|item| item.get_attr(name)).collect::<Result<Vec<_>>>()?),
        None => values.clone(),
    };
    for item in items.try_iter()? {
        pay(state, length(&item).saturating_add(joiner.as_str().map_or(0, str::len)))?;
    }
    let joiner = if joiner.is_undefined() { Value::from("") } else { joiner };
    state.apply_filter(JOIN, &[items, joiner])
}

/// Options of a filter, by position or name; undefined if not given.
fn options<const N: usize>(given: &Rest<Value>, named: &Kwargs, names: [&str; N]) -> Result<[Value; N]> {
    let mut options = [const { Value::UNDEFINED }; N];
    for (at, name) in names.into_iter().enumerate() {
        let named = named.get::<Option<Value>>(name)?;
        options[at] = given.get(at).cloned().or(named).unwrap_or_default();
    }
    named.assert_all_used()?;
    match given.get(N) {
        Some(more) => Err(invalid(format!("the filter doesn't accept {}", more.kind()))),
        None => Ok(options),
    }
}

/// minijinja's own `map`.
const MAP: &str = "\u{1}map";

/// minijinja's own `sum`, for numbers. For lists, its time would grow with the square of their
/// number.
const SUM: &str = "\u{1}sum";

fn sum(state: &mut State, values: Value, given: Rest<Value>, named: Kwargs) -> Result<Value> {
    let [attribute, start] = options(&given, &named, ["attribute", "start"])?;
    let attribute = attribute.as_str();
    let items = values.try_iter()?.map(|item| attribute.map_or(Ok(item.clone()), |name| item.get_attr(name)));
    if start.is_undefined() || start.is_none() || start.is_number() {
        let numbers = items.collect::<Result<Vec<_>>>()?;
        let start = if start.is_number() { start } else { Value::from(0) };
        return state.apply_filter(SUM, &[Value::from(numbers), Value::from(()), start]);
    }
    if !matches!(start.kind(), ValueKind::Seq | ValueKind::Iterable) {
        return Err(invalid(format!("`sum` adds numbers or lists, not values of type {}", start.kind())));
    }
    let mut all: Vec<Value> = start.try_iter()?.collect();
    for item in items {
        for item in item?.try_iter()? {
            pay(state, BYTES_PER_STEP)?;
            all.push(item);
        }
    }
    Ok(Value::from(all))
}

/// A minijinja filter that handles the items of a list independently. Each result is checked
/// before the next is computed.
fn one_by_one(
    filter: &'static str,
) -> impl Fn(&mut State, Value, Rest<Value>, Kwargs) -> Result<Vec<Value>> + Send + Sync + 'static {
    move |state: &mut State, values: Value, rest: Rest<Value>, named: Kwargs| {
        // minijinja's `map` doesn't pass named arguments to the other filter.
        let mapped = rest.first().filter(|_| filter == MAP).and_then(|name| Some(name.as_str()?.to_owned()));
        let named = named.args().next().is_some().then(|| Value::from(named.clone()));
        let (mut all, mut bytes) = (Vec::new(), 0);
        for item in values.try_iter()? {
            let with = |first: Value, rest: &[Value]| -> Vec<Value> {
                [first].into_iter().chain(rest.iter().cloned()).chain(named.clone()).collect()
            };
            let made = match &mapped {
                Some(name) => Value::from(vec![state.apply_filter(name, &with(item, &rest[1..]))?]),
                None => state.apply_filter(filter, &with(Value::from(vec![item]), &rest))?,
            };
            for made in made.try_iter()? {
                let made = bounds::made(state, made)?;
                bounds::measure(&made, 1, &mut bytes)?;
                all.push(made);
            }
            bounds::check_time(state)?;
        }
        Ok(all)
    }
}

/// Python methods. Counts what they walk through, and checks what they may make before making it.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value> {
    let text = value.as_str().unwrap_or_default();
    let given = args.iter().fold(text.len(), |sum, arg| sum.saturating_add(arg.as_str().map_or(0, str::len)));
    pay(state, given)?;
    match (name, args) {
        ("join", [values]) if value.as_str().is_some() => {
            return state.apply_filter("join", &[values.clone(), value.clone()]);
        }
        ("replace", [old, new, ..]) => {
            let (old, new) = (old.as_str().unwrap_or_default(), new.as_str().unwrap_or_default());
            pay(state, text.matches(old).count().saturating_mul(new.len()))?;
        }
        ("format", _) => {
            // Any field may refer to any argument and any width.
            let widest = text.split(|c: char| !c.is_ascii_digit()).map(|digits| digits.parse().unwrap_or(0)).max();
            let longest = args.iter().map(length).fold(widest.unwrap_or(0), usize::max);
            pay(state, text.matches('{').count().saturating_mul(longest))?;
        }
        ("split" | "rsplit" | "splitlines", _) => {
            let separator = args.first().and_then(Value::as_str).filter(|separator| !separator.is_empty());
            let blanks = || text.chars().filter(|c| c.is_whitespace()).count();
            let parts = separator.map_or_else(blanks, |separator| text.matches(separator).count());
            pay(state, parts.saturating_mul(bounds::VALUE_BYTES))?;
        }
        ("ljust" | "rjust" | "center" | "zfill", [width, ..]) if value.as_str().is_some() => {
            pay(state, width.as_usize().unwrap_or(0).saturating_mul(char::MAX.len_utf8()))?;
        }
        _ => {}
    }
    match value.as_str().map(|text| text_method(text, name, args)) {
        Some(Ok(Some(made))) => Ok(made),
        Some(Err(error)) => Err(error),
        _ => pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// Text methods that minijinja's own set lacks.
fn text_method(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>> {
    let parts = |parts: [&str; 3]| Value::from(minijinja::value::Tuple::from(parts.map(Value::from)));
    Ok(Some(match name {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "partition" => {
            let (separator,): (&str,) = from_args(args)?;
            let found = text.split_once(separator);
            found.map_or(parts([text, "", ""]), |(before, after)| parts([before, separator, after]))
        }
        "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let found = text.rsplit_once(separator);
            found.map_or(parts(["", "", text]), |(before, after)| parts([before, separator, after]))
        }
        "rsplit" => {
            let (separator, most): (Option<&str>, Option<i64>) = from_args(args)?;
            let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX - 1);
            rsplit(text, separator, most).into_iter().map(Value::from).collect()
        }
        "swapcase" => {
            let () = from_args(args)?;
            let swap = |c: char| -> String {
                if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
            };
            Value::from(text.chars().map(swap).collect::<String>())
        }
        "casefold" => {
            let () = from_args(args)?;
            Value::from(text.to_lowercase())
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (usize, Option<char>) = from_args(args)?;
            let missing = width.saturating_sub(text.chars().count());
            let left = match name {
                "ljust" => 0,
                "rjust" => missing,
                // Rounded like in Python.
                _ => missing / 2 + (missing & width & 1),
            };
            let fill = |count: usize| std::iter::repeat_n(fill.unwrap_or(' '), count).collect::<String>();
            Value::from(format!("{}{text}{}", fill(left), fill(missing - left)))
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            let zeros = "0".repeat(width.saturating_sub(text.chars().count()));
            Value::from(format!("{sign}{zeros}{digits}"))
        }
        _ => return Ok(None),
    }))
}

/// `str.rsplit`: at most `most` cuts, from the end.
fn rsplit<'t>(text: &'t str, separator: Option<&str>, most: usize) -> Vec<&'t str> {
    let mut parts: Vec<&str> = match separator {
        Some(separator) => text.rsplitn(most.saturating_add(1), separator).collect(),
        None => {
            let (mut parts, mut rest) = (Vec::new(), text.trim_end());
            while let Some(at) = rest.rfind(char::is_whitespace).filter(|_| parts.len() < most) {
                let width = rest[at..].chars().next().map_or(0, char::len_utf8);
                parts.push(&rest[at + width..]);
                rest = rest[..at].trim_end();
            }
            parts.extend(Some(rest).filter(|rest| !rest.is_empty()));
            parts
        }
    };
    parts.reverse();
    parts
}

fn pay(state: &State, bytes: usize) -> Result<()> {
    state.consume_fuel((bytes / BYTES_PER_STEP + 1) as u64)
}

/// Bytes of a value as text. Stops counting just above the maximum size of a value.
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

/// Text of at most the maximum size of a value.
#[derive(Default)]
struct Bounded(String);

impl Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if text.len() > MAX_BYTES - self.0.len() {
            return Err(fmt::Error);
        }
        self.0.write_str(text)
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

fn raise_exception(message: String) -> Result<Value> {
    Err(invalid(message))
}

fn strftime_now(format: &str) -> Result<String> {
    strtime::format(format, &Zoned::now()).map_err(|e| invalid(e.to_string()))
}

/// Returns nothing the first time, then the separator.
fn joiner(separator: Option<&str>) -> Value {
    globals::joiner(separator.map(Value::from))
}

/// Returns one text or number after another. It could hide other values from the limits.
fn cycler(items: Rest<Value>) -> Result<Value> {
    if items.is_empty() || items.iter().any(|item| item.as_object().is_some()) {
        return Err(invalid("`cycler` takes texts and numbers, at least one"));
    }
    globals::cycler(items.0)
}

/// `json.dumps` with transformers' defaults: HTML and non-ASCII letters aren't escaped.
fn to_json(value: &Value, given: Rest<Value>, named: Kwargs) -> Result<Value> {
    let [ensure_ascii, indent, separators, sort_keys] =
        options(&given, &named, ["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let (ensure_ascii, sort_keys) = (ensure_ascii.is_true(), sort_keys.is_true());
    let indent = match (indent.as_str(), indent.as_i64()) {
        (Some(text), _) => Some(text.to_owned()),
        (None, Some(spaces)) => match u8::try_from(spaces.max(0)) {
            Ok(spaces) => Some(" ".repeat(spaces.into())),
            Err(_) => return Err(invalid(format!("`tojson`: an indent of {spaces} isn't supported"))),
        },
        (None, None) => None,
    };
    let default = [if indent.is_some() { "," } else { ", " }, ": "].map(str::to_owned);
    let separators: [String; 2] = if separators.is_none() || separators.is_undefined() {
        default
    } else {
        let texts = separators.try_iter()?.map(|text| text.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>();
        let two = texts.and_then(|texts| texts.try_into().ok());
        two.ok_or_else(|| invalid("`tojson`: `separators` must be two texts"))?
    };
    let [comma, colon] = &separators;
    let mut json = Json { text: Bounded::default(), indent: indent.as_deref(), comma, colon, ensure_ascii, sort_keys };
    json.value(value, 0)?;
    Ok(Value::from_safe_string(json.text.0))
}

/// Writes JSON like Python.
struct Json<'a> {
    text: Bounded,
    indent: Option<&'a str>,
    comma: &'a str,
    colon: &'a str,
    ensure_ascii: bool,
    sort_keys: bool,
}

impl Json<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<()> {
        match value.kind() {
            ValueKind::None => self.put("null"),
            ValueKind::Bool => self.put(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.put(&value.to_string()),
            ValueKind::Number => self.put(&number(f64::try_from(value.clone())?)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                self.put("[")?;
                let mut empty = true;
                for item in value.try_iter()? {
                    self.item(&mut empty, depth)?;
                    self.value(&item, depth + 1)?;
                }
                self.close(empty, "]", depth)
            }
            ValueKind::Map => {
                self.put("{")?;
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort_by_key(Value::to_string);
                }
                let mut empty = true;
                for key in &keys {
                    self.item(&mut empty, depth)?;
                    match key.kind() {
                        ValueKind::String | ValueKind::Number => self.string(&key.to_string())?,
                        kind => return Err(invalid(format!("`tojson`: a key is of type {kind}"))),
                    }
                    self.put(self.colon)?;
                    self.value(&value.get_item(key)?, depth + 1)?;
                }
                self.close(empty, "}", depth)
            }
            kind => Err(invalid(format!("`tojson`: a value of type {kind} is not JSON"))),
        }
    }

    /// Writes what precedes an item.
    fn item(&mut self, first: &mut bool, depth: usize) -> Result<()> {
        if !std::mem::take(first) {
            self.put(self.comma)?;
        }
        self.line(depth + 1)
    }

    fn close(&mut self, empty: bool, bracket: &str, depth: usize) -> Result<()> {
        if !empty {
            self.line(depth)?;
        }
        self.put(bracket)
    }

    fn line(&mut self, depth: usize) -> Result<()> {
        let Some(indent) = self.indent else { return Ok(()) };
        self.put("\n")?;
        (0..depth).try_for_each(|_| self.put(indent))
    }

    fn string(&mut self, text: &str) -> Result<()> {
        let quoted = serde_json::to_string(text).map_err(|e| invalid(e.to_string()))?;
        if !self.ensure_ascii || quoted.is_ascii() {
            return self.put(&quoted);
        }
        for c in quoted.chars() {
            if c.is_ascii() {
                self.put(c.encode_utf8(&mut [0; 4]))?;
            } else {
                c.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| self.put(&format!("\\u{unit:04x}")))?;
            }
        }
        Ok(())
    }

    fn put(&mut self, text: &str) -> Result<()> {
        self.text.write_str(text).map_err(|_| invalid("`tojson`: the text is too long"))
    }
}

/// Formats a number with a fraction like Python.
fn number(value: f64) -> String {
    if !value.is_finite() {
        return if value.is_nan() {
            "NaN"
        } else if value > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        }
        .into();
    }
    let text = format!("{value:?}");
    match text.split_once('e') {
        Some((digits, exponent)) => {
            let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
            format!("{digits}e{sign}{exponent:0>2}")
        }
        None => text,
    }
}
