//! Bodies in which some fields hold anything at all: each is answered or refused, and nothing panics.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Map, Value, json};

use crate::client::Server;

const ROUNDS: usize = 3000;

/// Every field that means something, and one that nobody knows.
const FIELDS: &[&str] = &[
    "add_generation_prompt",
    "add_special_tokens",
    "allowed_token_ids",
    "bad_words",
    "cache_salt",
    "chat_template_kwargs",
    "continue_final_message",
    "documents",
    "echo",
    "frequency_penalty",
    "ignore_eos",
    "include_stop_str_in_output",
    "logit_bias",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "min_p",
    "min_tokens",
    "model",
    "n",
    "nobody_knows_this",
    "presence_penalty",
    "priority",
    "prompt",
    "prompt_logprobs",
    "repetition_penalty",
    "request_id",
    "response_format",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "seed",
    "skip_special_tokens",
    "stop",
    "stop_token_ids",
    "stream",
    "stream_options",
    "structured_outputs",
    "suffix",
    "temperature",
    "tool_choice",
    "tools",
    "top_k",
    "top_logprobs",
    "top_p",
];

/// Names that mean something inside of fields.
const KEYS: &[&str] = &[
    "role",
    "content",
    "type",
    "text",
    "function",
    "name",
    "parameters",
    "json",
    "regex",
    "choice",
    "grammar",
    "json_schema",
    "schema",
    "include_usage",
    "enum",
    "properties",
    "7",
    "é",
];

fn number(rng: &mut StdRng) -> Value {
    match rng.random_range(0..8) {
        0 => json!(0),
        1 => json!(-1),
        2 => json!(rng.random_range(1..20)),
        3 => json!(rng.random::<u64>()),
        4 => json!(rng.random::<i64>()),
        5 => json!(rng.random_range(-3.0..3.0)),
        6 => json!(f64::MAX),
        _ => json!(f64::MIN_POSITIVE),
    }
}

fn text(rng: &mut StdRng) -> Value {
    let texts = [
        "",
        " ",
        "user",
        "assistant",
        "tool",
        "auto",
        "required",
        "none",
        "object",
        "string",
        "text",
        "json_object",
        "json_schema",
        "function",
        "nano-vllm-demo",
        "[a-z]+",
        "(((((",
        "\\",
        "{{ x }}",
        "{% for %}",
        "\u{0}",
        "🌍é\u{301}",
        "<|im_start|>",
        "start: \"a\"",
        "<think>",
    ];
    match rng.random_range(0..9) {
        0 => json!("é".repeat(rng.random_range(0..300))),
        _ => json!(texts[rng.random_range(0..texts.len())]),
    }
}

fn anything(rng: &mut StdRng, depth: usize) -> Value {
    match rng.random_range(0..if depth == 0 { 5 } else { 8 }) {
        0 => Value::Null,
        1 => json!(rng.random_bool(0.5)),
        2 => number(rng),
        3 | 4 => text(rng),
        5 | 6 => {
            let items = 0..rng.random_range(0..4);
            items.map(|_| anything(rng, depth - 1)).collect()
        }
        _ => {
            let keys = (0..rng.random_range(0..4)).map(|_| KEYS[rng.random_range(0..KEYS.len())]);
            let keys: Vec<&str> = keys.collect();
            let pairs = keys.into_iter();
            let pairs = pairs.map(|key| (key.to_owned(), anything(rng, depth - 1)));
            Value::Object(pairs.collect::<Map<_, _>>())
        }
    }
}

#[test]
fn every_body_is_answered_or_refused() {
    let server = Server::fake(0, &[]);
    let mut rng = StdRng::seed_from_u64(4);
    let (mut answered, mut refused) = (0, 0);
    for round in 0..ROUNDS {
        let (path, mut body) = match round % 2 {
            0 => (
                "/v1/completions",
                json!({"prompt": "a cat", "max_tokens": 3}),
            ),
            _ => {
                let messages = json!([{"role": "user", "content": "a cat"}]);
                (
                    "/v1/chat/completions",
                    json!({"messages": messages, "max_tokens": 3}),
                )
            }
        };
        for _ in 0..rng.random_range(1..4) {
            let field = FIELDS[rng.random_range(0..FIELDS.len())];
            body[field] = anything(&mut rng, 4);
        }
        let answer = server.post(path, &body);
        match answer.status {
            200 => answered += 1,
            400..500 => {
                refused += 1;
                answer.error();
                assert!(answer.body.len() < 4000, "{body}: a long error");
            }
            status => panic!("{status} for {body}: {}", answer.text()),
        }
    }
    // Otherwise this would test less than it says.
    assert!(
        answered > ROUNDS / 20 && refused > ROUNDS / 4,
        "{answered} {refused}"
    );
    server.wait_empty();
    assert_eq!(server.get("/health").status, 200);
}
