//! Chunks of a stream as server-sent events, written without building a JSON tree: this is all
//! that a streamed token costs.

use bytes::{BufMut, BytesMut};
use engine::{CompletionOutput, Finish, FinishReason, OutputDelta, RequestOutput};
use serde_json::{Map, Value, json};

use crate::openai::parts::{Parsers, Parts, Splitter};
use crate::openai::{
    ApiError, Call, Endpoint, TokenNames, completion_logprobs, logprobs, stop_reason,
};

/// The end of every stream.
pub const DONE: &[u8] = b"data: [DONE]\n\n";

/// What a chunk is about.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    pub call: &'a Call,
    pub names: &'a TokenNames<'a>,
    /// What has come of the choice's prompt.
    pub output: &'a RequestOutput,
    /// Written into the chunk, if there.
    pub usage: Option<Usage>,
}

/// Writes the chunks of one answer.
pub struct Frames {
    /// Everything before the first choice.
    head: String,
    endpoint: Endpoint,
    /// Characters of text that each choice has had, for `text_offset`.
    offsets: Vec<usize>,
    /// What each choice's text is split by, if it is.
    splitters: Vec<Splitter>,
    id: String,
}

/// Tokens of an answer so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    /// Tokens of the prompts that the prefix cache had, if that is to be told.
    pub cached_tokens: Option<u32>,
}

impl Usage {
    fn json(self) -> Value {
        let mut usage = json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        });
        if let Some(cached_tokens) = self.cached_tokens {
            usage["prompt_tokens_details"] = json!({"cached_tokens": cached_tokens});
        }
        usage
    }
}

impl Frames {
    /// For the answer to `call`; `created` is in seconds since 1970.
    pub fn new(call: &Call, id: &str, created: u64, fingerprint: &str, choices: usize) -> Self {
        let (prefix, object) = match call.endpoint {
            Endpoint::Completions => ("cmpl", "text_completion"),
            Endpoint::Chat => ("chatcmpl", "chat.completion.chunk"),
        };
        Self {
            head: format!(
                r#"data: {{"id":{},"object":"{object}","created":{created},"model":{},"system_fingerprint":"{fingerprint}","choices":["#,
                json!(format!("{prefix}-{id}")),
                json!(call.model),
            ),
            endpoint: call.endpoint,
            offsets: vec![0; choices],
            splitters: match call.parsers == Parsers::default() && call.forced.is_none() {
                true => Vec::new(),
                false => vec![Splitter::new(call.parsers, call.forced.as_ref()); choices],
            },
            id: id.to_owned(),
        }
    }

    /// A choice's first chunk, before any text: the role of a chat's answer, an echoed prompt.
    pub fn first(&mut self, into: &mut BytesMut, from: Source<'_>, choice: usize, echo: &str) {
        let Source {
            call,
            names,
            output,
            usage,
        } = from;
        let mut body = match self.endpoint {
            Endpoint::Chat => json!({
                "index": choice,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": null,
                "finish_reason": null,
            }),
            Endpoint::Completions if call.echo => {
                let logprobs = match call.params.logprobs {
                    Some(_) => completion_logprobs(call, output, &[], true, 0, names),
                    None => Value::Null,
                };
                self.offsets[choice] = echo.chars().count();
                json!({
                    "index": choice, "text": echo, "logprobs": logprobs,
                    "finish_reason": null, "stop_reason": null,
                })
            }
            Endpoint::Completions if !call.return_token_ids => return,
            Endpoint::Completions => json!({
                "index": choice, "text": "", "logprobs": null,
                "finish_reason": null, "stop_reason": null,
            }),
        };
        if call.return_token_ids {
            match self.endpoint {
                // The reference has it beside the choices.
                Endpoint::Chat => {}
                Endpoint::Completions => {
                    body["prompt_token_ids"] = json!(output.prompt_token_ids);
                }
            }
            body["token_ids"] = json!([]);
        }
        into.extend_from_slice(self.head.as_bytes());
        into.extend_from_slice(body.to_string().as_bytes());
        // The token that has come is in the next chunk.
        let usage = usage.map(|usage| Usage {
            completion_tokens: 0,
            ..usage
        });
        let extra = (call.return_token_ids && self.endpoint == Endpoint::Chat)
            .then(|| format!(r#","prompt_token_ids":{}"#, json!(output.prompt_token_ids)));
        end(into, usage, extra.as_deref());
    }

    /// News of a choice.
    pub fn delta(
        &mut self,
        into: &mut BytesMut,
        from: Source<'_>,
        choice: usize,
        delta: &OutputDelta,
    ) {
        let Source {
            call,
            names,
            output,
            usage,
        } = from;
        into.extend_from_slice(self.head.as_bytes());
        into.extend_from_slice(b"{\"index\":");
        number(into, choice);
        let text = match call.score_only {
            true => "",
            false => delta.text.as_str(),
        };
        match self.endpoint {
            Endpoint::Completions => {
                into.extend_from_slice(b",\"text\":");
                string(into, text);
            }
            Endpoint::Chat => {
                // The chunk that only ends a choice has an empty delta.
                let only_end = text.is_empty() && delta.finish.is_some();
                into.extend_from_slice(b",\"delta\":{");
                if let Some(splitter) = self.splitters.get_mut(choice) {
                    let parts = splitter.push(text, delta.finish.is_some());
                    write_parts(into, &parts, &self.id, choice);
                } else if !only_end {
                    into.extend_from_slice(b"\"content\":");
                    string(into, text);
                }
                into.put_u8(b'}');
            }
        }
        into.extend_from_slice(b",\"logprobs\":");
        if delta.logprobs.is_empty() {
            into.extend_from_slice(b"null");
        } else {
            let value = match self.endpoint {
                Endpoint::Chat => logprobs::chat(&delta.logprobs, names),
                Endpoint::Completions => {
                    let offset = self.offsets[choice];
                    completion_logprobs(call, output, &delta.logprobs, false, offset, names)
                }
            };
            into.extend_from_slice(value.to_string().as_bytes());
            let tokens = delta.logprobs.iter().map(|e| names.text(e.token));
            self.offsets[choice] += tokens.map(|t| t.chars().count()).sum::<usize>();
        }
        if call.return_token_ids {
            let ids: &[u32] = match call.score_only {
                true => &[],
                false => &delta.token_ids,
            };
            into.extend_from_slice(b",\"token_ids\":");
            into.extend_from_slice(json!(ids).to_string().as_bytes());
        }
        match &delta.finish {
            None => into.extend_from_slice(b",\"finish_reason\":null"),
            Some(finish) => {
                let splitter = self.splitters.get(choice);
                ending(
                    into,
                    call,
                    finish,
                    splitter.is_some_and(Splitter::ends_with_calls),
                );
            }
        }
        if self.endpoint == Endpoint::Completions && delta.finish.is_none() {
            into.extend_from_slice(b",\"stop_reason\":null");
        }
        into.put_u8(b'}');
        end(into, usage, None);
    }

    /// The chunk after the last, with no choice and the answer's usage.
    pub fn usage(&self, into: &mut BytesMut, usage: Usage) {
        into.extend_from_slice(self.head.as_bytes());
        end(into, Some(usage), None);
    }
}

/// An error in the middle of a stream.
pub fn error(into: &mut BytesMut, error: &ApiError) {
    let body = json!({"error": error.body()});
    into.extend_from_slice(format!("data: {body}\n\n").as_bytes());
}

/// The fields of a delta whose text was split.
fn write_parts(into: &mut BytesMut, parts: &Parts, id: &str, choice: usize) {
    let calls: Vec<Value> = parts
        .calls
        .iter()
        .map(|call| call.json(id, choice, true))
        .collect();
    let mut fields = Map::new();
    for (name, text) in [("reasoning", &parts.reasoning), ("content", &parts.content)] {
        if !text.is_empty() {
            fields.insert(name.to_owned(), json!(text));
        }
    }
    if !calls.is_empty() {
        fields.insert("tool_calls".to_owned(), json!(calls));
    }
    let object = Value::Object(fields).to_string();
    // The braces are the caller's.
    into.extend_from_slice(&object.as_bytes()[1..object.len() - 1]);
}

fn ending(into: &mut BytesMut, call: &Call, finish: &Finish, called: bool) {
    let reason = match (call.score_only, finish.reason) {
        (true, _) => "length",
        (false, FinishReason::Stop) if called => "tool_calls",
        (false, reason) => reason.as_str(),
    };
    let stop = stop_reason(finish);
    into.extend_from_slice(
        format!(r#","finish_reason":"{reason}","stop_reason":{stop}"#).as_bytes(),
    );
}

fn end(into: &mut BytesMut, usage: Option<Usage>, extra: Option<&str>) {
    into.put_u8(b']');
    into.extend_from_slice(extra.unwrap_or_default().as_bytes());
    if let Some(usage) = usage {
        into.extend_from_slice(b",\"usage\":");
        into.extend_from_slice(usage.json().to_string().as_bytes());
    }
    into.extend_from_slice(b"}\n\n");
}

fn string(into: &mut BytesMut, text: &str) {
    // Writing to memory cannot fail, and a string is always JSON.
    let _ = serde_json::to_writer(into.writer(), text);
}

fn number(into: &mut BytesMut, number: usize) {
    let _ = serde_json::to_writer(into.writer(), &number);
}

/// Tokens that an answer's choices have so far.
pub fn completion_tokens(outputs: &[CompletionOutput]) -> usize {
    outputs.iter().map(|o| o.token_ids.len()).sum()
}
