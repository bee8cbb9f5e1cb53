//! Typed access to the fields of a JSON object, with errors that name the field.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::ModelError;

/// A JSON object together with where it came from. A field that is `null` counts as absent, as
/// it does for `transformers`.
#[derive(Clone, Debug)]
pub(super) struct Fields {
    path: PathBuf,
    prefix: String,
    map: Map<String, Value>,
}

impl Fields {
    /// Reads a file that holds one JSON object.
    pub(super) fn read(path: &Path) -> Result<Self, ModelError> {
        let text = std::fs::read_to_string(path).map_err(|e| ModelError::io(path, e))?;
        match serde_json::from_str(&text) {
            Ok(Value::Object(map)) => Ok(Self {
                path: path.to_owned(),
                prefix: String::new(),
                map,
            }),
            Ok(other) => Err(ModelError::malformed(
                path,
                format!("expected a JSON object, found {}", brief(&other)),
            )),
            Err(e) => Err(ModelError::malformed(path, format!("not valid JSON: {e}"))),
        }
    }

    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Whether the file has the field, be it null.
    pub(super) fn names(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    /// A nested object; `None` if absent.
    pub(super) fn object(&self, name: &str) -> Result<Option<Fields>, ModelError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields {
                path: self.path.clone(),
                prefix: format!("{}{name}.", self.prefix),
                map: map.clone(),
            })),
            Some(_) => Err(self.wrong(name, "an object")),
        }
    }

    pub(super) fn usize(&self, name: &str) -> Result<Option<usize>, ModelError> {
        self.typed(name, "a non-negative integer", |v| {
            v.as_u64().and_then(|n| usize::try_from(n).ok())
        })
    }

    /// A required count, at least 1.
    pub(super) fn count(&self, name: &str) -> Result<usize, ModelError> {
        let expected = "an integer of at least 1";
        match self.usize(name)? {
            Some(0) | None => Err(self.wrong(name, expected)),
            // Far beyond any model; keeps products of two dimensions within 64 bits.
            Some(n) if n > u32::MAX as usize => Err(self.wrong(name, "an integer below 2^32")),
            Some(n) => Ok(n),
        }
    }

    pub(super) fn f64(&self, name: &str) -> Result<Option<f64>, ModelError> {
        self.typed(name, "a finite number", |v| {
            v.as_f64().filter(|x| x.is_finite())
        })
    }

    /// A number above zero, or `default`.
    pub(super) fn positive(&self, name: &str, default: Option<f64>) -> Result<f64, ModelError> {
        match self.f64(name)?.or(default) {
            Some(x) if x > 0.0 => Ok(x),
            _ => Err(self.wrong(name, "a number above 0")),
        }
    }

    pub(super) fn bool(&self, name: &str) -> Result<Option<bool>, ModelError> {
        self.typed(name, "true or false", Value::as_bool)
    }

    pub(super) fn string(&self, name: &str) -> Result<Option<&str>, ModelError> {
        self.get(name)
            .map(|v| v.as_str().ok_or_else(|| self.wrong(name, "a string")))
            .transpose()
    }

    pub(super) fn strings(&self, name: &str) -> Result<Option<Vec<String>>, ModelError> {
        self.typed(name, "a list of strings", |v| {
            v.as_array()?
                .iter()
                .map(|item| item.as_str().map(str::to_owned))
                .collect()
        })
    }

    /// A token id or a list of them; empty if absent.
    pub(super) fn token_ids(&self, name: &str) -> Result<Vec<u32>, ModelError> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = self.typed(name, "a token id or a list of token ids", |v| match v {
            Value::Array(items) => items.iter().map(id).collect(),
            other => id(other).map(|one| vec![one]),
        })?;
        Ok(ids.unwrap_or_default())
    }

    fn typed<T>(
        &self,
        name: &str,
        expected: &str,
        convert: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        self.get(name)
            .map(|v| convert(v).ok_or_else(|| self.wrong(name, expected)))
            .transpose()
    }

    /// The error for a field that is not what it must be.
    pub(super) fn wrong(&self, name: &str, expected: impl Into<String>) -> ModelError {
        ModelError::Config {
            path: self.path.clone(),
            field: format!("{}{name}", self.prefix),
            expected: expected.into(),
            found: self.map.get(name).map_or("nothing".to_owned(), brief),
        }
    }

    /// The error for a field whose value is legal but not implemented.
    pub(super) fn unsupported(&self, name: &str, supported: impl Into<String>) -> ModelError {
        ModelError::Unsupported {
            path: self.path.clone(),
            field: format!("{}{name}", self.prefix),
            found: self.map.get(name).map_or("nothing".to_owned(), brief),
            supported: supported.into(),
        }
    }
}

/// The value as JSON, shortened so that a message stays one line.
fn brief(value: &Value) -> String {
    const LONGEST: usize = 120;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        None => text,
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}
