//! Schemas of what the server answers.

use serde_json::{Value, json};

/// The schemas, by name.
pub fn schemas() -> Vec<(&'static str, Value)> {
    vec![
        ("Error", error()),
        (
            "Version",
            object(json!({"version": {"type": "string"}}), &["version"]),
        ),
        (
            "Load",
            object(json!({"server_load": count()}), &["server_load"]),
        ),
        (
            "Models",
            object(
                json!({
                    "object": {"const": "list"},
                    "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}},
                }),
                &["object", "data"],
            ),
        ),
        ("Model", model()),
        (
            "Tokens",
            object(
                json!({
                    "count": count(),
                    "max_model_len": count(),
                    "tokens": {"type": "array", "items": count()},
                    "token_strs": {"type": ["array", "null"], "items": {"type": "string"}},
                }),
                &["count", "max_model_len", "tokens"],
            ),
        ),
        (
            "Text",
            object(json!({"prompt": {"type": "string"}}), &["prompt"]),
        ),
        ("Usage", usage()),
        ("Completion", completion()),
        ("ChatCompletion", chat()),
    ]
}

fn object(properties: Value, required: &[&str]) -> Value {
    json!({"type": "object", "properties": properties, "required": required})
}

fn count() -> Value {
    json!({"type": "integer", "minimum": 0})
}

fn error() -> Value {
    let body = object(
        json!({
            "message": {"type": "string", "minLength": 1},
            "type": {"type": "string"},
            "param": {"type": ["string", "null"]},
            "code": {"type": "integer", "minimum": 400, "maximum": 599},
        }),
        &["message", "type", "param", "code"],
    );
    object(json!({"error": body}), &["error"])
}

fn model() -> Value {
    object(
        json!({
            "id": {"type": "string"},
            "object": {"const": "model"},
            "created": count(),
            "owned_by": {"type": "string"},
            "root": {"type": "string"},
            "parent": {"type": "null"},
            "max_model_len": count(),
            "permission": {"type": "array"},
        }),
        &["id", "object", "created", "owned_by", "max_model_len"],
    )
}

fn usage() -> Value {
    object(
        json!({
            "prompt_tokens": count(),
            "completion_tokens": count(),
            "total_tokens": count(),
            "prompt_tokens_details": {"type": ["object", "null"]},
        }),
        &["prompt_tokens", "completion_tokens", "total_tokens"],
    )
}

/// What both kinds of choice have, besides `own`.
fn choice(own: Value, required: &str) -> Value {
    let mut choice = object(
        json!({
            "index": count(),
            "logprobs": {"type": ["object", "null"]},
            "finish_reason": {"enum": ["stop", "length", "abort", "tool_calls"]},
            "stop_reason": {"type": ["string", "integer", "null"]},
            "token_ids": {"type": ["array", "null"], "items": count()},
        }),
        &[
            "index",
            "logprobs",
            "finish_reason",
            "stop_reason",
            required,
        ],
    );
    for (name, schema) in own.as_object().into_iter().flatten() {
        choice["properties"][name] = schema.clone();
    }
    choice
}

fn body(kind: &str, choice: Value) -> Value {
    object(
        json!({
            "id": {"type": "string"},
            "object": {"const": kind},
            "created": count(),
            "model": {"type": "string"},
            "system_fingerprint": {"type": "string"},
            "choices": {"type": "array", "items": choice, "minItems": 1},
            "usage": {"$ref": "#/components/schemas/Usage"},
        }),
        &["id", "object", "created", "model", "choices", "usage"],
    )
}

fn completion() -> Value {
    let own = json!({
        "text": {"type": "string"},
        "prompt_logprobs": {"type": ["array", "null"]},
        "prompt_token_ids": {"type": ["array", "null"], "items": count()},
    });
    body("text_completion", choice(own, "text"))
}

fn chat() -> Value {
    let message = object(
        json!({
            "role": {"const": "assistant"},
            "content": {"type": ["string", "null"]},
            "refusal": {"type": "null"},
            "reasoning": {"type": ["string", "null"]},
            "tool_calls": {"type": "array"},
        }),
        &["role", "content"],
    );
    let mut body = body(
        "chat.completion",
        choice(json!({"message": message}), "message"),
    );
    body["properties"]["prompt_logprobs"] = json!({"type": ["array", "null"]});
    body["properties"]["prompt_token_ids"] = json!({"type": ["array", "null"], "items": count()});
    body
}
