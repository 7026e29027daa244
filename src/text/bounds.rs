//! Limits on a template's values and time.

use std::time::{Duration, Instant};

use minijinja::value::{DynObject, ObjectRepr};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::instrument::{CHECK, CHECK_KEPT, MADE};
use super::marks::Turn;

/// Maximum size of a value, and of its text, in bytes.
pub(super) const MAX_BYTES: usize = 16 << 20;

/// Bytes counted for any value, in addition to its contents.
pub(super) const VALUE_BYTES: usize = 32;

/// Maximum nesting depth of a value. serde_json reads at most 128 levels, and templates add few.
const MAX_DEPTH: usize = 160;

/// Maximum time for rendering a template.
const MAX_TIME: Duration = Duration::from_secs(2);

/// Adds the checks that [`instrument`](super::instrument::instrument) inserts.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.add_test(CHECK, check);
    environment.add_test(CHECK_KEPT, check_kept);
    environment.add_filter(MADE, made);
}

/// Start of a rendering.
struct Started(Instant);

/// Checks the time and a value that an instruction made or read through.
fn check(state: &mut State, value: &Value) -> Result<bool, Error> {
    check_time(state)?;
    measure(value, 0, &mut 0)?;
    Ok(true)
}

pub(super) fn check_time(state: &mut State) -> Result<(), Error> {
    let started = state.get_or_insert_extension_with(|| Started(Instant::now())).0;
    if started.elapsed() > MAX_TIME { Err(too("takes longer than 2 seconds")) } else { Ok(()) }
}

/// Checks a value that a namespace is about to store. Values that could change afterwards or hide
/// others are refused.
fn check_kept(state: &mut State, value: &Value) -> Result<bool, Error> {
    if value.as_object().is_some_and(is_mutable) {
        return Err(too("keeps a namespace or a loop in a namespace, which is not supported"));
    }
    check(state, value)
}

/// Checks the time and the result of a filter, function, method or operator. Sequences that are
/// computed on demand become lists, so that they can't hide other values.
pub(super) fn made(state: &mut State, value: Value) -> Result<Value, Error> {
    let lazy = value.as_object().is_some_and(|object| object.repr() == ObjectRepr::Iterable);
    if !lazy {
        return check(state, &value).map(|_| value);
    }
    check_time(state)?;
    let (mut items, mut bytes) = (Vec::new(), 0);
    for item in value.try_iter()? {
        measure(&item, 1, &mut bytes)?;
        items.push(item);
    }
    state.consume_fuel(items.len() as u64)?;
    Ok(Value::from(items))
}

/// Walks through all of a value, as showing, comparing or dropping it would, and adds up its
/// bytes.
pub(super) fn measure(value: &Value, depth: usize, bytes: &mut usize) -> Result<(), Error> {
    *bytes += VALUE_BYTES + value.as_str().map_or(0, str::len);
    if *bytes > MAX_BYTES {
        return Err(too_large());
    }
    let Some(object) = value.as_object() else { return Ok(()) };
    if let Some(turn) = object.downcast_ref::<Turn>() {
        // A message was measured when it was read, and isn't nested deeper than JSON allows.
        *bytes += turn.bytes;
        return if *bytes > MAX_BYTES { Err(too_large()) } else { Ok(()) };
    }
    if depth == MAX_DEPTH {
        return Err(too(&format!("nests values deeper than {MAX_DEPTH} levels")));
    }
    if depth > 0 && is_mutable(object) {
        return Err(too("keeps a namespace or a loop in another value, which is not supported"));
    }
    match object.repr() {
        ObjectRepr::Seq | ObjectRepr::Iterable => {
            object.try_iter().into_iter().flatten().try_for_each(|item| measure(&item, depth + 1, bytes))
        }
        ObjectRepr::Map => object.try_iter_pairs().into_iter().flatten().try_for_each(|(key, value)| {
            measure(&key, depth + 1, bytes)?;
            measure(&value, depth + 1, bytes)
        }),
        _ => Ok(()),
    }
}

/// Whether it is a namespace, which may change after it was measured, or a loop, which may hold
/// hidden values.
fn is_mutable(object: &DynObject) -> bool {
    let name = object.type_name();
    name.ends_with("::Namespace") || name.ends_with("::Loop")
}

fn too_large() -> Error {
    too(&format!("makes a value of more than {MAX_BYTES} bytes"))
}

fn too(message: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.to_owned())
}
