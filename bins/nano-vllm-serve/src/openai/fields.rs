//! Reads a request body field by field: a wrong type is named, and so is a field nobody took.

use serde_json::{Map, Value};

use super::ApiError;

/// The fields of a JSON object that were not taken yet. A field that is `null` counts as absent,
/// as in the OpenAI API.
#[derive(Debug)]
pub struct Fields(Map<String, Value>);

impl Fields {
    /// Takes `value` apart; `what` names it in the error if it is no object.
    pub fn new(value: Value, what: &str) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self(map)),
            other => Err(ApiError::malformed(format!(
                "{what} must be a JSON object, found {}",
                kind(&other)
            ))),
        }
    }

    /// Whether a field is there.
    pub fn has(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|v| !v.is_null())
    }

    /// Takes a field as it is.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|v| !v.is_null())
    }

    /// Takes a field that must have type `T`; `expected` says so in words.
    pub fn take_as<T: serde::de::DeserializeOwned>(
        &mut self,
        name: &str,
        expected: &str,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        match read(value) {
            Ok(read) => Ok(Some(read)),
            Err(value) => {
                let found = shorten(&value);
                let message = format!("{name} must be {expected}, found {found}");
                Err(ApiError::bad_form(name, message))
            }
        }
    }

    /// Takes a boolean, `default` if absent.
    pub fn take_bool(&mut self, name: &str, default: bool) -> Result<bool, ApiError> {
        Ok(self.take_as(name, "true or false")?.unwrap_or(default))
    }

    /// Refuses a field that is known but not supported, unless it has a value that asks for
    /// nothing.
    pub fn refuse_unless(
        &mut self,
        name: &str,
        neutral: &[Value],
        instead: &str,
    ) -> Result<(), ApiError> {
        match self.take(name) {
            None => Ok(()),
            Some(v) if neutral.contains(&v) => Ok(()),
            Some(v) => Err(ApiError::bad_value(
                name,
                format!("{name} = {} is not supported{instead}", shorten(&v)),
            )),
        }
    }

    /// Names of what nobody took, shortened; fields that are `null` count as absent.
    pub fn unknown(self) -> Vec<String> {
        let present = self.0.into_iter().filter(|(_, value)| !value.is_null());
        present.map(|(name, _)| shorten_text(&name)).collect()
    }

    /// Refuses whatever is left.
    pub fn finish(self) -> Result<(), ApiError> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(name) => Err(ApiError::bad_value(
                &name.clone(),
                format!("unknown field '{}'", shorten_text(name)),
            )),
        }
    }
}

/// `value` as a `T`, or `value` itself. Numbers such as 5.0 count as integers where one is needed,
/// as in JSON Schema and in vLLM.
pub fn read<T: serde::de::DeserializeOwned>(mut value: Value) -> Result<T, Value> {
    if let Ok(read) = T::deserialize(&value) {
        return Ok(read);
    }
    to_integers(&mut value);
    T::deserialize(&value).map_err(|_| value)
}

/// Beyond this, a float does not tell neighbouring integers apart.
const EXACT: f64 = 9_007_199_254_740_992.0;

fn to_integers(value: &mut Value) {
    match value {
        Value::Number(number) => {
            let float = number.as_f64().filter(|_| number.is_f64());
            if let Some(float) = float.filter(|f| f.fract() == 0.0 && f.abs() <= EXACT) {
                *number = (float as i64).into();
            }
        }
        Value::Array(items) => items.iter_mut().for_each(to_integers),
        Value::Object(map) => map.values_mut().for_each(to_integers),
        _ => {}
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// At most 80 characters of a value: an error must not echo a whole body.
fn shorten(value: &Value) -> String {
    shorten_text(&value.to_string())
}

/// At most 80 characters of a text.
pub fn shorten_text(text: &str) -> String {
    match text.char_indices().nth(80) {
        None => text.to_owned(),
        Some((cut, _)) => format!("{}…", &text[..cut]),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_what_is_wrong() {
        let mut f = Fields::new(json!({"a": "x", "b": 1, "c": null, "zz": 1}), "it").unwrap();
        let e = f.take_as::<f32>("a", "a number").unwrap_err();
        assert_eq!(e.message, "a must be a number, found \"x\"");
        assert_eq!(e.param.as_deref(), Some("a"));
        assert_eq!(f.take_as::<f32>("b", "a number").unwrap(), Some(1.0));
        assert_eq!(f.take_as::<f32>("c", "a number").unwrap(), None);
        assert_eq!(f.finish().unwrap_err().message, "unknown field 'zz'");
        assert_eq!(read::<Vec<u32>>(json!([1, 2.0, -0.0])), Ok(vec![1, 2, 0]));
        for bad in [json!([1.5]), json!([-1.0]), json!([1e300]), json!(["1"])] {
            assert!(read::<Vec<u32>>(bad).is_err());
        }
        assert!(Fields::new(json!([]), "it").is_err());
    }

    #[test]
    fn long_values_are_cut() {
        let mut f = Fields::new(json!({"a": "x".repeat(10_000)}), "it").unwrap();
        let e = f.take_as::<f32>("a", "a number").unwrap_err();
        assert!(e.message.len() < 150, "{}", e.message.len());
    }
}
