//! What the text must look like: `response_format`, `structured_outputs`, and the older `guided_*`.

use engine::{Constraint, StructuredOutputs};
use serde_json::{Map, Value, json};

use super::{ApiError, Fields};

/// The older names of what `structured_outputs` holds.
pub const GUIDED: [(&str, &str); 5] = [
    ("guided_json", "json"),
    ("guided_regex", "regex"),
    ("guided_choice", "choice"),
    ("guided_grammar", "grammar"),
    ("guided_json_object", "json_object"),
];

/// Reads these fields; at most one of them may ask for anything.
pub fn take_structured(f: &mut Fields) -> Result<Option<StructuredOutputs>, ApiError> {
    let mut found = Vec::new();
    found.extend(take_response_format(f)?);
    found.extend(take_structured_outputs(f)?);
    for (name, kind) in GUIDED {
        if let Some(value) = f.take(name) {
            found.extend(constraint(name, kind, value)?.map(|c| with_param(name, c)));
        }
    }
    let whitespace: Option<String> = f.take_as("guided_whitespace_pattern", "a string")?;
    let Some(mut first) = found.pop() else {
        return Ok(None);
    };
    if let Some(other) = found.pop() {
        let (name, other) = (first.param, other.param);
        let message = format!("{name} and {other} both say what the text must look like");
        return Err(ApiError::bad_value(name, message));
    }
    if first.param.starts_with("guided_") {
        first.whitespace_pattern = whitespace;
    }
    Ok(Some(first))
}

fn with_param(param: &'static str, constraint: Constraint) -> StructuredOutputs {
    StructuredOutputs {
        param,
        ..StructuredOutputs::new(constraint)
    }
}

fn take_response_format(f: &mut Fields) -> Result<Option<StructuredOutputs>, ApiError> {
    const NAME: &str = "response_format";
    let Some(value) = f.take(NAME) else {
        return Ok(None);
    };
    let wrong = |what: &str| ApiError::bad_value(NAME, format!("{NAME} {what}"));
    let Value::Object(format) = value else {
        return Err(wrong("must be an object with a type"));
    };
    let constraint = match format.get("type").and_then(Value::as_str) {
        Some("text") => return Ok(None),
        Some("json_object") => Constraint::JsonObject,
        Some("json_schema") => match format.get("json_schema").and_then(|s| s.get("schema")) {
            Some(schema) if !schema.is_null() => Constraint::Json(schema.clone()),
            _ => return Err(wrong("of type json_schema needs json_schema.schema")),
        },
        _ => {
            return Err(wrong(
                "must have the type \"text\", \"json_object\" or \"json_schema\"",
            ));
        }
    };
    Ok(Some(with_param(NAME, constraint)))
}

fn take_structured_outputs(f: &mut Fields) -> Result<Option<StructuredOutputs>, ApiError> {
    const NAME: &str = "structured_outputs";
    let Some(value) = f.take(NAME) else {
        return Ok(None);
    };
    let named = |error: ApiError| ApiError {
        param: Some(NAME.to_owned()),
        message: format!("{NAME}: {}", error.message),
        ..error
    };
    let mut inner = Fields::new(value, "the value").map_err(named)?;
    let mut found = Vec::new();
    for (_, kind) in GUIDED {
        if let Some(value) = inner.take(kind) {
            found.extend(constraint(NAME, kind, value)?);
        }
    }
    inner
        .refuse_unless("structural_tag", &[], "")
        .map_err(named)?;
    let disable_any_whitespace = inner.take_bool("disable_any_whitespace", false);
    let closed = inner.take_bool("disable_additional_properties", false);
    let whitespace_pattern = inner.take_as("whitespace_pattern", "a string");
    let (disable_any_whitespace, closed, whitespace_pattern) = (
        disable_any_whitespace.map_err(named)?,
        closed.map_err(named)?,
        whitespace_pattern.map_err(named)?,
    );
    inner.finish().map_err(named)?;
    match (found.pop(), found.is_empty()) {
        (Some(constraint), true) => Ok(Some(StructuredOutputs {
            disable_any_whitespace,
            whitespace_pattern,
            disable_additional_properties: closed,
            ..with_param(NAME, constraint)
        })),
        _ => Err(ApiError::bad_value(
            NAME,
            "structured_outputs must have exactly one of json, regex, choice, grammar and json_object",
        )),
    }
}

/// A constraint of this kind from the value of field `name`; `None` if the value asks for nothing.
fn constraint(
    name: &'static str,
    kind: &str,
    value: Value,
) -> Result<Option<Constraint>, ApiError> {
    let wrong = |expected: &str| {
        let message = match name == "structured_outputs" {
            true => format!("{name}.{kind} must be {expected}"),
            false => format!("{name} must be {expected}"),
        };
        Err(ApiError::bad_value(name, message))
    };
    Ok(Some(match (kind, value) {
        ("json", Value::String(text)) => match serde_json::from_str(&text) {
            Ok(schema) => Constraint::Json(schema),
            Err(_) => return wrong("a JSON schema, as an object or as text"),
        },
        ("json", schema @ (Value::Object(_) | Value::Bool(_))) => Constraint::Json(schema),
        ("json", _) => return wrong("a JSON schema, as an object or as text"),
        ("json_object", Value::Bool(wanted)) => return Ok(wanted.then_some(Constraint::JsonObject)),
        ("json_object", _) => return wrong("true or false"),
        ("regex", Value::String(regex)) => Constraint::Regex(regex),
        ("grammar", Value::String(grammar)) => Constraint::Grammar(grammar),
        ("choice", value) => match serde_json::from_value(value) {
            Ok(choices) => Constraint::Choice(choices),
            Err(_) => return wrong("a list of strings"),
        },
        _ => return wrong("a string"),
    }))
}

/// The text that is a call of one of `tools` or more, as a list of names and parameters; of one only
/// if not `parallel`.
pub fn calls_of(tools: &[Value], parallel: bool) -> Result<StructuredOutputs, ApiError> {
    let mut definitions = Map::new();
    let mut kinds = Vec::with_capacity(tools.len());
    for tool in tools {
        let function = &tool["function"];
        let mut parameters = parameters_of(function);
        for place in ["$defs", "definitions"] {
            // References count from the root.
            let Some(Value::Object(own)) = parameters
                .as_object_mut()
                .and_then(|schema| schema.remove(place))
            else {
                continue;
            };
            let all = definitions
                .entry(place)
                .or_insert_with(|| json!({}))
                .as_object_mut()
                .expect("only objects are put there");
            for (name, schema) in own {
                if all.get(&name).is_some_and(|other| *other != schema) {
                    let message = format!("two tools define {place}/{name} in different ways");
                    return Err(ApiError::bad_value("tools", message));
                }
                all.insert(name, schema);
            }
        }
        kinds.push(json!({
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "parameters": parameters},
            "required": ["name", "parameters"],
            "additionalProperties": false,
        }));
    }
    let mut schema = json!({"type": "array", "minItems": 1, "items": {"anyOf": kinds}});
    if !parallel {
        schema["maxItems"] = json!(1);
    }
    for (place, all) in definitions {
        schema[place] = all;
    }
    Ok(of_a_call(schema))
}

/// The text that is a tool's arguments.
pub fn arguments_of(tool: &Value) -> StructuredOutputs {
    of_a_call(parameters_of(&tool["function"]))
}

/// Nobody reads a call as it stands: it is written without line breaks.
fn of_a_call(schema: Value) -> StructuredOutputs {
    StructuredOutputs {
        whitespace_pattern: Some(r"\x20".to_owned()),
        ..with_param("tools", Constraint::Json(schema))
    }
}

/// The schema of a function's parameters: none, if it does not say.
fn parameters_of(function: &Value) -> Value {
    match &function["parameters"] {
        Value::Null => json!({"type": "object", "properties": {}, "additionalProperties": false}),
        schema => schema.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<Option<StructuredOutputs>, ApiError> {
        let mut f = Fields::new(body, "the body")?;
        let structured = take_structured(&mut f)?;
        f.finish()?;
        Ok(structured)
    }

    #[test]
    fn every_name_is_known() {
        let schema = json!({"type": "integer"});
        let of_schema = || Constraint::Json(schema.clone());
        let text = schema.to_string();
        for (body, expected) in [
            (
                json!({"response_format": {"type": "json_object"}}),
                Constraint::JsonObject,
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {
                    "name": "n", "strict": true, "schema": schema,
                }}}),
                of_schema(),
            ),
            (json!({"structured_outputs": {"json": schema}}), of_schema()),
            (json!({"structured_outputs": {"json": text}}), of_schema()),
            (
                json!({"structured_outputs": {"json_object": true}}),
                Constraint::JsonObject,
            ),
            (
                json!({"structured_outputs": {"regex": "a*", "json_object": false}}),
                Constraint::Regex("a*".into()),
            ),
            (
                json!({"guided_regex": "a*"}),
                Constraint::Regex("a*".into()),
            ),
            (
                json!({"guided_choice": ["a"]}),
                Constraint::Choice(vec!["a".into()]),
            ),
            (
                json!({"guided_grammar": "start: \"a\""}),
                Constraint::Grammar("start: \"a\"".into()),
            ),
            (
                json!({"guided_json": schema, "response_format": {"type": "text"}}),
                of_schema(),
            ),
        ] {
            let read = read(body.clone()).unwrap();
            let read = read.unwrap_or_else(|| panic!("{body}"));
            assert_eq!(read.constraint, expected, "{body}");
            assert!(body.get(read.param).is_some(), "{body}");
        }
        assert_eq!(read(json!({"guided_json_object": false})).unwrap(), None);
        let wanted = read(json!({"structured_outputs": {
            "json": {}, "disable_any_whitespace": true, "disable_additional_properties": true,
            "whitespace_pattern": " ?",
        }}));
        let wanted = wanted.unwrap().unwrap();
        assert!(wanted.disable_any_whitespace && wanted.disable_additional_properties);
        assert_eq!(wanted.whitespace_pattern.as_deref(), Some(" ?"));
    }

    #[test]
    fn wrong_values_are_named() {
        for (body, param) in [
            (json!({"response_format": "json"}), "response_format"),
            (
                json!({"response_format": {"type": "yaml"}}),
                "response_format",
            ),
            (
                json!({"response_format": {"type": "json_schema"}}),
                "response_format",
            ),
            (
                json!({"response_format": {"type": "structural_tag"}}),
                "response_format",
            ),
            (json!({"structured_outputs": {}}), "structured_outputs"),
            (json!({"structured_outputs": []}), "structured_outputs"),
            (
                json!({"structured_outputs": {"regex": "a", "choice": ["a"]}}),
                "structured_outputs",
            ),
            (
                json!({"structured_outputs": {"regex": 1}}),
                "structured_outputs",
            ),
            (
                json!({"structured_outputs": {"regexp": "a"}}),
                "structured_outputs",
            ),
            (
                json!({"structured_outputs": {"structural_tag": "a"}}),
                "structured_outputs",
            ),
            (
                json!({"structured_outputs": {"json": "{"}}),
                "structured_outputs",
            ),
            (json!({"guided_choice": "a"}), "guided_choice"),
            (
                json!({"guided_regex": "a", "guided_choice": ["a"]}),
                "guided_choice",
            ),
            (
                json!({"response_format": {"type": "json_object"}, "guided_regex": "a"}),
                "guided_regex",
            ),
        ] {
            let error = read(body.clone()).expect_err(&body.to_string());
            assert_eq!(error.param.as_deref(), Some(param), "{body}");
            assert!(error.message.contains(param), "{}", error.message);
        }
    }

    #[test]
    fn definitions_of_tools_come_to_the_root() {
        let tool = |name: &str, defs: Value| {
            json!({"type": "function", "function": {"name": name, "parameters": {
                "type": "object", "$defs": defs, "properties": {"a": {"$ref": "#/$defs/x"}},
            }}})
        };
        let integer = json!({"x": {"type": "integer"}});
        let tools = [tool("f", integer.clone()), tool("g", integer)];
        let Constraint::Json(schema) = calls_of(&tools, false).unwrap().constraint else {
            panic!("a schema is made");
        };
        assert_eq!(schema["$defs"]["x"]["type"], "integer");
        assert_eq!(schema["maxItems"], 1);
        let tools = [tools[0].clone(), tool("g", json!({"x": {}}))];
        let error = calls_of(&tools, true).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("tools"));
    }
}
