//! From the engine's outputs to a response body.

use std::time::{SystemTime, UNIX_EPOCH};

use engine::{CompletionOutput, Finish, Frontend, RequestOutput, StopReason, TokenLogprobs};
use serde_json::{Value, json};

use super::call::{Call, Endpoint};
use super::logprobs::{self, TokenNames};
use super::parts::Splitter;

/// The body that answers `call`; `outputs` stand in the order of its prompts. `created` is in
/// seconds since 1970.
pub fn response(
    call: &Call,
    id: &str,
    created: u64,
    outputs: &[RequestOutput],
    frontend: &Frontend,
) -> Value {
    let names = TokenNames {
        tokenizer: frontend.tokenizer().map(|t| &**t),
        as_ids: call.tokens_as_ids,
    };
    let mut choices = Vec::new();
    for (at, output) in outputs.iter().enumerate() {
        for sequence in &output.outputs {
            let index = at * call.params.n as usize + sequence.index as usize;
            let mut choice = match call.endpoint {
                Endpoint::Completions => completion_choice(call, output, sequence, &names),
                Endpoint::Chat => chat_choice(call, id, sequence, &names),
            };
            choice["index"] = json!(index);
            choices.push(choice);
        }
    }
    let prompt_tokens: usize = outputs.iter().map(|o| o.prompt_token_ids.len()).sum();
    let completion_tokens: usize = match call.score_only {
        true => 0,
        false => outputs
            .iter()
            .flat_map(|o| &o.outputs)
            .map(|s| s.token_ids.len())
            .sum(),
    };
    let cached_tokens: u32 = outputs.iter().map(|o| o.metrics.num_cached_tokens).sum();
    let (prefix, object) = match call.endpoint {
        Endpoint::Completions => ("cmpl", "text_completion"),
        Endpoint::Chat => ("chatcmpl", "chat.completion"),
    };
    let mut body = json!({
        "id": format!("{prefix}-{id}"),
        "object": object,
        "created": created,
        "model": call.model,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        },
    });
    // Clients of vLLM read fields that were not asked for, too, and find null.
    if call.endpoint == Endpoint::Chat {
        body["prompt_logprobs"] = prompt_logprobs(&outputs[0], &names);
        body["prompt_token_ids"] = prompt_token_ids(call, &outputs[0]);
    }
    body
}

fn completion_choice(
    call: &Call,
    output: &RequestOutput,
    sequence: &CompletionOutput,
    names: &TokenNames<'_>,
) -> Value {
    let generated = match call.score_only {
        true => "",
        false => &sequence.text,
    };
    let mut text = String::new();
    if call.echo {
        text.push_str(&echoed(call, output, names));
    }
    text.push_str(generated);
    let mut choice = json!({"text": text, "logprobs": null});
    if let Some(entries) = &sequence.logprobs {
        choice["logprobs"] = completion_logprobs(call, output, entries, call.echo, 0, names);
    }
    choice["prompt_logprobs"] = prompt_logprobs(output, names);
    choice["prompt_token_ids"] = prompt_token_ids(call, output);
    finish(call, sequence, choice)
}

/// The `logprobs` of a completion's choice: the prompt's if `with_prompt`, then `entries`.
/// `offset` counts the characters that stand before them.
pub fn completion_logprobs(
    call: &Call,
    output: &RequestOutput,
    entries: &[TokenLogprobs],
    with_prompt: bool,
    offset: usize,
    names: &TokenNames<'_>,
) -> Value {
    let mut all: Vec<_> = Vec::new();
    if with_prompt {
        let prompt = output.prompt_logprobs.iter().flatten().map(Option::as_ref);
        all.extend(output.prompt_token_ids.iter().copied().zip(prompt));
    }
    if !call.score_only {
        all.extend(entries.iter().map(|e| (e.token, Some(e))));
    }
    logprobs::completion(&all, offset, names)
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

/// What exactly stopped a sequence, as the API writes it.
pub fn stop_reason(finish: &Finish) -> Value {
    match &finish.stop_reason {
        None => Value::Null,
        Some(StopReason::Text(text)) => json!(text),
        Some(StopReason::Token(id)) => json!(id),
    }
}

/// The prompt's text: as it was sent, or decoded if it was sent as token ids.
pub fn echoed(call: &Call, output: &RequestOutput, names: &TokenNames<'_>) -> String {
    if let [engine::Prompt::Text(text)] = call.prompts.as_slice() {
        return text.clone();
    }
    names
        .tokenizer
        .and_then(|t| t.decode(&output.prompt_token_ids, false).ok())
        .unwrap_or_default()
}

fn chat_choice(
    call: &Call,
    id: &str,
    sequence: &CompletionOutput,
    names: &TokenNames<'_>,
) -> Value {
    let mut splitter = Splitter::new(call.parsers, call.forced.as_ref());
    let parts = splitter.push(&sequence.text, true);
    let mut message = json!({
        "role": "assistant", "content": parts.content, "refusal": null, "reasoning": null,
    });
    if !parts.reasoning.is_empty() {
        message["reasoning"] = json!(parts.reasoning);
    }
    let called = !parts.calls.is_empty();
    if called {
        let at = sequence.index as usize;
        message["tool_calls"] = parts.calls.iter().map(|c| c.json(id, at, false)).collect();
        if parts.content.is_empty() {
            message["content"] = Value::Null;
        }
    }
    let mut choice = json!({"message": message, "logprobs": null});
    if let Some(entries) = &sequence.logprobs {
        choice["logprobs"] = logprobs::chat(entries, names);
    }
    let mut choice = finish(call, sequence, choice);
    if splitter.ends_with_calls() && choice["finish_reason"] == "stop" {
        choice["finish_reason"] = json!("tool_calls");
    }
    choice
}

/// What both kinds of choice end with.
fn finish(call: &Call, sequence: &CompletionOutput, mut choice: Value) -> Value {
    choice["token_ids"] = match (call.return_token_ids, call.score_only) {
        (false, _) => Value::Null,
        (true, true) => json!([]),
        (true, false) => json!(sequence.token_ids),
    };
    choice["finish_reason"] = match call.score_only {
        true => json!("length"),
        false => json!(sequence.finish_reason().map(|r| r.as_str())),
    };
    choice["stop_reason"] = sequence.finish.as_ref().map_or(Value::Null, stop_reason);
    choice
}

fn prompt_token_ids(call: &Call, output: &RequestOutput) -> Value {
    match call.return_token_ids {
        true => json!(output.prompt_token_ids),
        false => Value::Null,
    }
}

fn prompt_logprobs(output: &RequestOutput, names: &TokenNames<'_>) -> Value {
    match &output.prompt_logprobs {
        Some(entries) => logprobs::prompt(entries, names),
        None => Value::Null,
    }
}
