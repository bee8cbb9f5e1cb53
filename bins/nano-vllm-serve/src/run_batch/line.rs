//! One line of the input: `{"custom_id", "method", "url", "body"}`.

use serde::Deserialize;
use serde_json::Value;

use super::files::InputLine;
use crate::openai::{ApiError, Endpoint, Fields};

/// A line, as far as it can be read.
#[derive(Debug)]
pub struct Line {
    /// Handed back with the answer; null if the line has none or none can be read.
    pub custom_id: Value,
    /// Where the line sends which body.
    pub request: Result<(Endpoint, Value), ApiError>,
}

/// What is still looked for in a line that is not valid: everything else is skipped over, so that
/// a number out of range or arrays nested too deep do not cost the answer its name.
#[derive(Deserialize)]
struct OnlyId {
    #[serde(default)]
    custom_id: Value,
}

impl Line {
    /// Reads a line.
    pub fn parse(line: &InputLine) -> Self {
        match read_json(line) {
            Ok(value) => {
                let mut custom_id = Value::Null;
                let request = take_request(value, line.number, &mut custom_id);
                Self { custom_id, request }
            }
            Err(error) => Self {
                custom_id: line
                    .bytes
                    .as_ref()
                    .ok()
                    .and_then(|bytes| serde_json::from_slice::<OnlyId>(bytes).ok())
                    .map_or(Value::Null, |found| found.custom_id),
                request: Err(error),
            },
        }
    }
}

fn read_json(line: &InputLine) -> Result<Value, ApiError> {
    let number = line.number;
    let error = |what: String| ApiError::malformed(format!("line {number} {what}"));
    let bytes = match &line.bytes {
        Ok(bytes) => bytes.as_slice(),
        Err(limit) => {
            return Err(error(format!("has more than {} MiB", limit >> 20)));
        }
    };
    // Some editors begin a file with a byte order mark.
    let bytes = match number {
        1 => bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes),
        _ => bytes,
    };
    let text = std::str::from_utf8(bytes).map_err(|e| error(format!("is not UTF-8: {e}")))?;
    serde_json::from_str(text).map_err(|e| {
        // serde_json counts lines within the text, which here has one.
        let message = e.to_string();
        let what = message.split(" at line ").next().unwrap_or_default();
        error(format!("is not JSON: {what} (column {})", e.column()))
    })
}

fn take_request(
    value: Value,
    number: u64,
    custom_id: &mut Value,
) -> Result<(Endpoint, Value), ApiError> {
    let mut f = Fields::new(value, &format!("line {number}"))?;
    *custom_id = f.take("custom_id").unwrap_or_default();
    let method: Option<String> = f.take_as("method", "\"POST\"")?;
    if let Some(other) = method.filter(|m| m != "POST") {
        return Err(ApiError::bad_value(
            "method",
            format!("method must be \"POST\", found \"{other}\""),
        ));
    }
    let url: String = f.take_as("url", "a string")?.ok_or_else(|| {
        ApiError::bad_value(
            "url",
            "url is missing: /v1/completions or /v1/chat/completions",
        )
    })?;
    let endpoint = Endpoint::from_path(&url)?;
    let body = f
        .take("body")
        .ok_or_else(|| ApiError::bad_value("body", "body is missing"))?;
    f.finish()?;
    Ok((endpoint, body))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(number: u64, bytes: &[u8]) -> Line {
        Line::parse(&InputLine {
            number,
            bytes: Ok(bytes.to_vec()),
        })
    }

    #[test]
    fn the_id_survives_what_is_wrong_around_it() {
        let deep = format!(
            r#"{{"body": {}{}, "custom_id": "x"}}"#,
            "[".repeat(100_000),
            "]".repeat(100_000)
        );
        for text in [
            r#"{"custom_id": "x", "body": {"temperature": 1e999}}"#,
            r#"{"custom_id": "x", "url": 5}"#,
            r#"{"url": "/v1/completions", "custom_id": "x"}"#,
            &deep,
        ] {
            let line = parse(3, text.as_bytes());
            assert_eq!(line.custom_id, json!("x"), "{}", &text[..40]);
            line.request.unwrap_err();
        }
    }

    #[test]
    fn errors_say_where() {
        let message = |bytes: &[u8]| parse(7, bytes).request.unwrap_err().message;
        assert_eq!(
            message(b"{\"url\": NaN}"),
            "line 7 is not JSON: expected value (column 9)"
        );
        assert_eq!(
            message(b"[1]"),
            "line 7 must be a JSON object, found an array"
        );
        assert!(message(b"\"\xff\"").starts_with("line 7 is not UTF-8: "));
        let long = InputLine {
            number: 7,
            bytes: Err(64 << 20),
        };
        assert_eq!(
            Line::parse(&long).request.unwrap_err().message,
            "line 7 has more than 64 MiB"
        );
    }

    #[test]
    fn a_byte_order_mark_may_begin_the_file() {
        let text = b"\xEF\xBB\xBF{\"url\": \"/v1/completions\", \"body\": {}}";
        assert!(parse(1, text).request.is_ok());
        assert!(parse(2, text).request.is_err());
    }
}
