//! `/openapi.json`: what the server takes and gives, with the limits of the model that it serves.
//!
//! Written by hand, and kept true by schemathesis (`tests/clients/schemathesis`), which sends what
//! the document allows and what it forbids.

mod answers;
mod requests;

use engine::Limits;
use serde_json::{Value, json};

/// What the document depends on.
pub struct About<'a> {
    /// Names of the model.
    pub names: &'a [String],
    /// What requests are checked against.
    pub limits: &'a Limits,
    /// Whether a key is needed.
    pub keys: bool,
    /// Whether the model may call tools.
    pub tools: bool,
}

/// Routes that answer probes with nothing, and what for.
const PROBES: [(&str, &str, &str); 3] = [
    ("/health", "get", "Whether the engine works"),
    ("/ready", "get", "Whether new requests are taken"),
    ("/ping", "get", "As /health"),
];

/// Routes with a JSON body: path, schemas of request and answer, and what it does.
const POSTS: [(&str, &str, &str, &str); 4] = [
    (
        "/v1/completions",
        "CompletionRequest",
        "Completion",
        "Continue prompts",
    ),
    (
        "/v1/chat/completions",
        "ChatRequest",
        "ChatCompletion",
        "Answer a chat",
    ),
    (
        "/tokenize",
        "TokenizeRequest",
        "Tokens",
        "Token ids of a prompt or a chat",
    ),
    (
        "/detokenize",
        "DetokenizeRequest",
        "Text",
        "Text of token ids",
    ),
];

/// Routes that give JSON: path, schema of the answer, and what it is.
const GETS: [(&str, &str, &str); 3] = [
    ("/v1/models", "Models", "The names of the model"),
    ("/version", "Version", "The server's version"),
    ("/load", "Load", "Requests being served"),
];

/// The document.
pub fn document(about: &About<'_>) -> Value {
    let mut paths = json!({});
    for (path, method, summary) in PROBES {
        paths[path][method] = json!({
            "operationId": path.trim_start_matches('/'),
            "summary": summary,
            "responses": {"200": {"description": "Yes"}, "503": error("No")},
        });
    }
    paths["/ping"]["post"] = paths["/ping"]["get"].clone();
    paths["/ping"]["post"]["operationId"] = json!("ping_post");
    for (path, schema, summary) in GETS {
        paths[path]["get"] = json!({
            "operationId": path.trim_start_matches('/').replace('/', "_"),
            "summary": summary,
            "responses": {"200": answer("", "application/json", &reference(schema))},
        });
    }
    paths["/v1/models/{name}"]["get"] = json!({
        "operationId": "v1_model",
        "summary": "One of the names of the model",
        "parameters": [{
            "name": "name", "in": "path", "required": true,
            "schema": {"type": "string", "minLength": 1},
        }],
        "responses": {
            "200": answer("", "application/json", &reference("Model")),
            "404": error("No model has this name"),
        },
    });
    for (path, media, summary) in [
        ("/metrics", "text/plain", "Figures for Prometheus"),
        ("/openapi.json", "application/json", "This document"),
        ("/", "text/html", "A page with a chat and the live engine"),
        (
            "/live",
            "text/event-stream",
            "The events that the page is drawn from; without end",
        ),
    ] {
        let schema = match media {
            "application/json" => json!({"type": "object"}),
            _ => json!({"type": "string"}),
        };
        paths[path]["get"] = json!({
            "operationId": format!("get_{}", path.trim_matches('/').replace(['/', '.'], "_")),
            "summary": summary,
            "responses": {"200": answer("", media, &schema)},
        });
    }
    let figures = &mut paths["/metrics"]["get"]["responses"]["200"]["content"];
    figures["application/openmetrics-text"] = figures["text/plain"].clone();
    for (path, request, response, summary) in POSTS {
        paths[path]["post"] = post(path, request, response, summary);
    }
    if about.keys {
        require_key(&mut paths);
    }
    let mut document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "nano-vllm-serve",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "The OpenAI API in vLLM's dialect. Fields that are not listed have no \
                            effect; they are named in the answer's X-Ignored-Fields.",
            "license": {"name": "MIT OR Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": requests::schemas(about)},
    });
    for (name, schema) in answers::schemas() {
        document["components"]["schemas"][name] = schema;
    }
    if about.keys {
        document["components"]["securitySchemes"] =
            json!({"key": {"type": "http", "scheme": "bearer"}});
    }
    document
}

/// Every route but two needs a key.
fn require_key(paths: &mut Value) {
    let Some(paths) = paths.as_object_mut() else {
        return;
    };
    for (path, operations) in paths {
        let operations = operations.as_object_mut();
        for operation in operations.into_iter().flat_map(|o| o.values_mut()) {
            if matches!(path.as_str(), "/health" | "/ready") {
                continue;
            }
            operation["security"] = json!([{"key": []}]);
            operation["responses"]["401"] = answer(
                "No key, or a wrong one",
                "application/json",
                &json!({
                    "type": "object", "required": ["error"],
                    "properties": {"error": {"const": "Unauthorized"}},
                }),
            );
        }
    }
}

fn post(path: &str, request: &str, response: &str, summary: &str) -> Value {
    let mut ok = answer("", "application/json", &reference(response));
    let generates = path.starts_with("/v1");
    if generates {
        ok["content"]["text/event-stream"] = json!({
            "schema": {
                "type": "object", "required": ["data"],
                "description": "With stream = true. An event; the last one's data is [DONE]",
                "properties": {
                    "data": {"type": "string", "contentMediaType": "application/json"},
                },
            },
        });
    }
    let mut operation = json!({
        "operationId": path.trim_start_matches('/').replace('/', "_"),
        "summary": summary,
        "requestBody": {
            "required": true,
            "content": {"application/json": {"schema": reference(request)}},
        },
        "responses": {
            "200": ok,
            "400": error("The request is malformed, a value is out of its range, or not supported"),
            "404": error("No model has this name"),
            "408": error("The body did not come in time"),
            "413": error("The body is too long"),
        },
    });
    if generates {
        operation["responses"]["500"] = error("The model failed");
        operation["responses"]["503"] =
            error("The queue is full or the server ends; Retry-After says when to come again");
        operation["responses"]["504"] = error("It took longer than --request-timeout");
    }
    operation
}

fn reference(schema: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{schema}")})
}

fn answer(description: &str, media: &str, schema: &Value) -> Value {
    let description = match description {
        "" => "The answer",
        text => text,
    };
    json!({"description": description, "content": {media: {"schema": schema}}})
}

fn error(description: &str) -> Value {
    answer(description, "application/json", &reference("Error"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every `$ref` of a document.
    fn references(value: &Value, into: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                into.extend(map.get("$ref").and_then(Value::as_str).map(str::to_owned));
                map.values().for_each(|value| references(value, into));
            }
            Value::Array(items) => items.iter().for_each(|value| references(value, into)),
            _ => {}
        }
    }

    #[test]
    fn every_reference_leads_somewhere() {
        let limits = Limits {
            vocab_size: 100,
            max_model_len: 50,
            cache_tokens: 50,
            max_num_seqs: 4,
            max_logprobs: 20,
            priorities: false,
            seed: 0,
        };
        for keys in [false, true] {
            let about = About {
                names: &["m".to_owned()],
                limits: &limits,
                keys,
                tools: keys,
            };
            let document = document(&about);
            let mut all = Vec::new();
            references(&document, &mut all);
            assert!(all.len() > 20);
            for reference in all {
                let pointer = reference.trim_start_matches('#');
                assert!(document.pointer(pointer).is_some(), "{reference}");
            }
        }
    }
}
