//! JSON objects in files, read key by key. Errors name the file and the key.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::input::{MAX_JSON, read_small_text};
use crate::error::{Error, Result};

/// An object in a JSON file: the whole file, or a nested object.
#[derive(Clone, Debug)]
pub(crate) struct JsonObject {
    path: PathBuf,
    /// Keys that lead to this object, each followed by a dot.
    prefix: String,
    map: Map<String, Value>,
}

impl JsonObject {
    /// Reads the file at `path`, which must contain one object.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        Self::read_within(path, MAX_JSON)
    }

    /// Reads the file at `path`, which may have at most `most` bytes.
    pub(crate) fn read_within(path: &Path, most: u64) -> Result<Self> {
        let text = read_small_text(path, most)?;
        let malformed = |e: serde_json::Error| {
            let hint = if e.is_eof() { "; it is truncated: copy or download it again" } else { "" };
            Error::File { path: path.into(), message: format!("is malformed: {e}{hint}") }
        };
        Ok(JsonObject {
            path: path.into(),
            prefix: String::new(),
            map: serde_json::from_str(&text).map_err(malformed)?,
        })
    }

    /// Keys and values.
    pub(crate) fn map(&self) -> &Map<String, Value> {
        &self.map
    }

    /// Whether `key` exists, even if it is null.
    pub(crate) fn contains(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// Keys in the order of the file.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        self.map.keys().map(String::as_str)
    }

    /// Value of `key` as JSON, unless it is absent or null.
    pub(crate) fn value(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Value of `key`, unless it is absent or null.
    pub(crate) fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        self.value(key).map(|value| T::deserialize(value).map_err(|e| self.error(key, e))).transpose()
    }

    /// Value of `key`; an error if it is absent or null.
    pub(crate) fn require<T: DeserializeOwned>(&self, key: &str) -> Result<T> {
        self.get(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    /// Object at `key`, unless it is absent or null.
    pub(crate) fn object(&self, key: &str) -> Result<Option<JsonObject>> {
        let prefix = format!("{}{key}.", self.prefix);
        Ok(self.get(key)?.map(|map| JsonObject { path: self.path.clone(), prefix, map }))
    }

    /// Makes an [`Error::File`] about `key`.
    pub(crate) fn error(&self, key: &str, message: impl Display) -> Error {
        Error::File { path: self.path.clone(), message: format!("`{}{key}`: {message}", self.prefix) }
    }

    /// Makes an [`Error::File`] about an unsupported value of `key`.
    pub(crate) fn unsupported(&self, key: &str, value: &Value, hint: impl Display) -> Error {
        self.error(key, format!("is {value}; {hint}"))
    }
}
