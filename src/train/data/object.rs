//! JSON objects without duplicate keys, and their fields. With duplicates, a value would be lost.

use std::fmt::{self, Formatter};

use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// A result for a line; the error says what is wrong with it.
pub(super) type LineResult<T> = Result<T, String>;

/// Parses a JSON object.
///
/// # Errors
/// Says what is malformed, or which key occurs twice.
pub(super) fn read(text: &[u8]) -> serde_json::Result<Map<String, Value>> {
    let mut json = serde_json::Deserializer::from_slice(text);
    let value = json.deserialize_map(Strict)?;
    json.end()?;
    // A map deserializes only to an object.
    Ok(if let Value::Object(map) = value { map } else { Map::new() })
}

/// The value of a key.
pub(super) fn field<T: DeserializeOwned>(object: &Map<String, Value>, key: &str) -> LineResult<T> {
    let value = object.get(key).ok_or_else(|| format!("`{key}` is missing"))?;
    T::deserialize(value).map_err(|e| format!("`{key}`: {e}"))
}

/// A value without duplicate keys at any depth.
struct Strict;

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Value, D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if map.contains_key(&key) {
                return Err(A::Error::custom(format!("the key `{key}` is there twice")));
            }
            map.insert(key, entries.next_value_seed(Strict)?);
        }
        Ok(Value::Object(map))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(Strict)? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_as_they_are_and_keys_are_there_once() {
        let text = r#"{"a": [1, -2, 0.1, true, null, "x"], "b": {"c": {}}}"#;
        assert_eq!(Value::Object(read(text.as_bytes()).unwrap()), text.parse::<Value>().unwrap());
        for (text, wanted) in [
            (r#"{"a": 1, "a": 2}"#, "`a` is there twice"),
            (r#"{"a": [{"b": 1, "b": 1}]}"#, "`b` is there twice"),
            ("[1]", "expected an object"),
            ("{} {}", "trailing characters"),
        ] {
            let error = read(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }
}
