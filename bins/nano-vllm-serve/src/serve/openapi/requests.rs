//! Schemas of what clients send.

use serde_json::{Map, Value, json};

use super::About;
use crate::openai::{EFFORTS, NOT_SUPPORTED_IN_CHATS};

/// `schema`, or null, which counts as absent.
fn optional(mut schema: Value) -> Value {
    match &mut schema["type"] {
        Value::String(kind) => {
            schema["type"] = json!([kind, "null"]);
            schema
        }
        _ => {
            let map = schema.as_object_mut().expect("a schema");
            map.remove("type");
            json!({"anyOf": [schema, {"type": "null"}]})
        }
    }
}

/// A field that has one value only: what else vLLM takes there is refused by name.
fn only(values: &[Value]) -> Value {
    let mut values = values.to_vec();
    values.push(Value::Null);
    json!({"enum": values, "description": "Other values are not supported"})
}

fn number(low: f64, high: f64) -> Value {
    optional(json!({"type": "number", "minimum": low, "maximum": high}))
}

fn integer(low: i64, high: u64) -> Value {
    optional(json!({"type": "integer", "minimum": low, "maximum": high}))
}

fn flag() -> Value {
    optional(json!({"type": "boolean"}))
}

/// The schemas by name.
pub fn schemas(about: &About<'_>) -> Value {
    json!({
        "CompletionRequest": completion(about),
        "ChatRequest": chat(about),
        "TokenizeRequest": tokenize(about),
        "DetokenizeRequest": {
            "type": "object", "required": ["tokens"],
            "properties": {"model": model(about), "tokens": tokens(about, 0)},
        },
        "Message": message(),
        "Tool": {
            "type": "object", "required": ["type", "function"],
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object", "required": ["name"],
                    "properties": {"name": {"type": "string"}, "parameters": json_schema()},
                },
            },
        },
    })
}

fn model(about: &About<'_>) -> Value {
    let mut names: Vec<Value> = about.names.iter().map(|name| json!(name)).collect();
    names.extend([json!(""), Value::Null]);
    json!({"enum": names})
}

fn token(about: &About<'_>) -> Value {
    json!({"type": "integer", "minimum": 0, "maximum": about.limits.vocab_size - 1})
}

fn tokens(about: &About<'_>, least: usize) -> Value {
    json!({"type": "array", "items": token(about), "minItems": least})
}

/// A prompt's token ids: one more must fit behind them.
fn prompt_tokens(about: &About<'_>) -> Value {
    let most = (about.limits.max_model_len - 1).min(about.limits.cache_tokens);
    let mut tokens = tokens(about, 1);
    tokens["maxItems"] = json!(most);
    tokens
}

/// What `/v1/completions` and `/v1/chat/completions` share.
fn sampling(about: &About<'_>) -> Map<String, Value> {
    let limits = about.limits;
    let u32_max = u64::from(u32::MAX);
    let positive = |kind: &str| optional(json!({"type": kind, "exclusiveMinimum": 0}));
    let mut top_p = positive("number");
    top_p["maximum"] = json!(1);
    let mut repetition = positive("number");
    repetition["maximum"] = json!(1e30);
    let logprobs = match u64::try_from(limits.max_logprobs) {
        Ok(most) => integer(0, most),
        Err(_) => integer(-1, limits.vocab_size as u64),
    };
    let text = json!({"type": "string", "minLength": 1});
    let mut fields = json!({
        "model": model(about),
        "stream": flag(),
        "stream_options": optional(json!({
            "type": "object",
            "description": "Needs stream = true",
            "properties": {"include_usage": flag(), "continuous_usage_stats": flag()},
        })),
        "n": integer(1, limits.max_num_seqs.min(1024) as u64),
        "temperature": number(0.0, 2.0),
        "top_p": top_p,
        "top_k": integer(-1, i32::MAX as u64),
        "min_p": number(0.0, 1.0),
        "repetition_penalty": repetition,
        "presence_penalty": number(-2.0, 2.0),
        "frequency_penalty": number(-2.0, 2.0),
        "max_tokens": integer(1, u32_max),
        "min_tokens": integer(0, u32_max),
        "prompt_logprobs": logprobs,
        "seed": integer(i64::MIN, i64::MAX as u64),
        "stop": optional(json!({
            "anyOf": [text, {"type": "array", "items": text, "maxItems": 4}],
        })),
        "stop_token_ids": optional(tokens(about, 0)),
        "allowed_token_ids": optional(tokens(about, 1)),
        "bad_words": optional(json!({
            "type": "array", "items": {"type": "string", "pattern": "^[!-~]+$"},
        })),
        "logit_bias": optional(json!({
            "type": "object",
            "propertyNames": {"pattern": "^(0|[1-9][0-9]?)$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        })),
        "ignore_eos": flag(),
        "skip_special_tokens": flag(),
        "include_stop_str_in_output": flag(),
        "request_id": optional(json!({"type": "string", "pattern": "^[!-~]{1,128}$"})),
        "return_token_ids": flag(),
        "return_tokens_as_token_ids": flag(),
        "cache_salt": optional(json!({
            "type": "string", "maxLength": 128, "pattern": r"^[^@/\\\x00]+$",
        })),
        "add_special_tokens": flag(),
        "use_beam_search": only(&[json!(false)]),
        "length_penalty": only(&[json!(1)]),
        "best_of": only(&[json!(1)]),
        "spaces_between_special_tokens": only(&[json!(true)]),
    });
    fields["response_format"] = response_format();
    fields["structured_outputs"] = structured_outputs();
    for (name, kind) in crate::openai::GUIDED {
        let kinds = kinds_of_constraints();
        fields[name] = json!({
            "anyOf": [kinds[kind], {"type": "null"}],
            "description": format!("The older name of structured_outputs.{kind}"),
            "deprecated": true,
        });
    }
    fields["guided_whitespace_pattern"] = only(&[json!(" ?")]);
    fields["priority"] = match limits.priorities {
        true => integer(i64::from(i32::MIN), i32::MAX as u64),
        false => only(&[json!(0)]),
    };
    for name in crate::openai::NOT_SUPPORTED {
        fields[*name] = only(&[]);
    }
    match fields {
        Value::Object(map) => map,
        _ => unreachable!("an object was written"),
    }
}

/// A schema that an answer is to match. The real ones are JSON Schema's: what of it is understood is
/// too much to be written down here.
fn json_schema() -> Value {
    let kinds = [
        "object", "array", "string", "integer", "number", "boolean", "null",
    ];
    json!({
        "type": "object",
        "description": "A JSON schema of at most 64 levels and 256 KiB; references stay inside of it",
        "properties": {"type": {"enum": kinds}},
        "additionalProperties": false,
    })
}

/// What a text may have to look like, by the name in `structured_outputs`.
fn kinds_of_constraints() -> Value {
    json!({
        "json": json_schema(),
        "regex": {
            "type": "string", "pattern": "^[a-z0-9 ]{0,20}$",
            "description": "A regular expression for the text as a whole",
        },
        "choice": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "grammar": {
            "enum": ["start: \"yes\" | \"no\""],
            "description": "A context-free grammar in Lark's notation",
        },
        "json_object": {"const": true},
    })
}

fn response_format() -> Value {
    json!({"anyOf": [
        {"enum": [{"type": "text"}, {"type": "json_object"}, null]},
        {
            "type": "object", "required": ["type", "json_schema"],
            "properties": {
                "type": {"const": "json_schema"},
                "json_schema": {
                    "type": "object", "required": ["schema"],
                    "properties": {
                        "name": {"type": "string"},
                        "strict": flag(),
                        "schema": json_schema(),
                    },
                },
            },
        },
    ]})
}

fn structured_outputs() -> Value {
    let kinds = kinds_of_constraints();
    let kinds = kinds.as_object().expect("an object was written");
    let one_of_them = kinds.iter().map(|(name, schema)| {
        json!({
            "type": "object", "required": [name],
            "properties": {
                name: schema,
                "disable_any_whitespace": flag(),
                "disable_additional_properties": flag(),
                "whitespace_pattern": only(&[json!(" ?")]),
            },
            "additionalProperties": false,
        })
    });
    let any: Vec<Value> = one_of_them.chain([json!({"type": "null"})]).collect();
    json!({"anyOf": any, "description": "Excludes response_format and a forced tool call"})
}

fn completion(about: &About<'_>) -> Value {
    let mut fields = sampling(about);
    let one = json!({"type": "string", "minLength": 1});
    let ids = prompt_tokens(about);
    let list =
        |items: &Value| json!({"type": "array", "items": items, "minItems": 1, "maxItems": 1024});
    fields.insert(
        "prompt".to_owned(),
        json!({"anyOf": [one, list(&one), ids, list(&ids)]}),
    );
    fields.insert("echo".to_owned(), flag());
    fields.insert("logprobs".to_owned(), fields["prompt_logprobs"].clone());
    fields.insert("suffix".to_owned(), only(&[json!("")]));
    json!({"type": "object", "required": ["prompt"], "properties": fields})
}

fn chat(about: &About<'_>) -> Value {
    let mut fields = sampling(about);
    let mut add = |name: &str, schema: Value| fields.insert(name.to_owned(), schema);
    let messages = json!({
        "type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/Message"},
    });
    add("messages", messages);
    add("max_completion_tokens", integer(1, u64::from(u32::MAX)));
    add("logprobs", flag());
    let most = u64::try_from(about.limits.max_logprobs).unwrap_or(about.limits.vocab_size as u64);
    add("top_logprobs", integer(0, most));
    add("add_generation_prompt", flag());
    add("continue_final_message", flag());
    add("chat_template_kwargs", optional(json!({"type": "object"})));
    add(
        "documents",
        optional(json!({"type": "array", "items": {"type": "object"}})),
    );
    let efforts = EFFORTS.iter().map(|effort| json!(effort));
    let efforts: Vec<Value> = efforts.chain([Value::Null]).collect();
    add("reasoning_effort", json!({"enum": efforts}));
    add("echo", only(&[json!(false)]));
    add("include_reasoning", only(&[json!(true)]));
    let mut choices = vec![json!("none"), json!("required"), Value::Null];
    if about.tools {
        choices.push(json!("auto"));
    }
    let named = json!({
        "type": "object", "required": ["type", "function"],
        "properties": {
            "type": {"const": "function"},
            "function": {
                "type": "object", "required": ["name"],
                "properties": {"name": {"type": "string"}},
            },
        },
    });
    let choice = json!({
        "anyOf": [{"enum": choices}, named],
        "description": "A call can be forced where there are tools, of one of them",
    });
    add("tool_choice", choice);
    add("parallel_tool_calls", flag());
    add(
        "tools",
        optional(json!({
            "type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/Tool"},
        })),
    );
    for name in NOT_SUPPORTED_IN_CHATS {
        add(name, only(&[]));
    }
    json!({"type": "object", "required": ["messages"], "properties": fields})
}

fn message() -> Value {
    let text = json!({
        "type": "object", "required": ["text"],
        "properties": {"type": {"enum": ["text", null]}, "text": {"type": "string"}},
    });
    let part = json!({"anyOf": [{"type": "string"}, text]});
    json!({
        "type": "object", "required": ["role"],
        "description": "What else a message holds goes to the model's chat template",
        "properties": {
            "role": {"type": "string"},
            "content": {
                "anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": part}],
            },
        },
    })
}

fn tokenize(about: &About<'_>) -> Value {
    let messages = json!({
        "type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/Message"},
    });
    let shared = |name: &str, what: Value| {
        json!({
            "type": "object", "required": [name],
            "properties": {
                name: what,
                "model": model(about),
                "add_special_tokens": flag(),
                "return_token_strs": flag(),
            },
        })
    };
    let mut of_text = shared("prompt", json!({"type": "string"}));
    of_text["properties"]["messages"] = only(&[]);
    let mut of_chat = shared("messages", messages);
    of_chat["properties"]["prompt"] = only(&[]);
    of_chat["properties"]["add_generation_prompt"] = flag();
    for name in NOT_SUPPORTED_IN_CHATS {
        of_chat["properties"][name] = only(&[]);
    }
    json!({"anyOf": [of_text, of_chat]})
}
