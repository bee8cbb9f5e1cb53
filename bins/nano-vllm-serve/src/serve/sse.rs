//! The body of a streamed answer.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use axum::http::HeaderValue;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use engine::{OutputDelta, Prompt, RequestOutput};
use http_body::Frame;
use tokio::time::{Instant, Sleep};

use super::frame::{self, Frames, Source, Usage, completion_tokens};
use super::generation::Generation;
use super::state::App;
use crate::openai::{ApiError, Call, TokenNames, echoed};

/// Bytes after which a batch of chunks is handed on.
const BATCH: usize = 32 << 10;

/// Bytes of a usual chunk of one token.
const CHUNK: usize = 384;

/// Server-sent events of one answer. Nothing runs ahead of the reader: news that come while the
/// socket is full wait in the engine's channel, and what waits there goes out as one chunk a
/// choice. Dropping the body aborts the request.
pub struct Events {
    app: Arc<App>,
    call: Call,
    generation: Generation,
    frames: Frames,
    /// Whether each choice has had its first chunk.
    begun: Vec<bool>,
    /// News that are not written yet, by choice.
    pending: Vec<Option<OutputDelta>>,
    /// Choices in `pending`, in the order in which they came.
    touched: Vec<usize>,
    /// Where chunks are written: hyper has copied the last ones when it asks for more, so that the
    /// memory serves again.
    buffer: BytesMut,
    keep_alive: Option<Pin<Box<Sleep>>>,
    ended: bool,
}

impl Events {
    /// The answer to `call`, whose prompts `generation` computes.
    pub fn new(app: Arc<App>, call: Call, id: &str, created: u64, generation: Generation) -> Self {
        let choices = generation.len() * call.params.n as usize;
        let interval = app.server.sse_keep_alive_interval;
        Self {
            frames: Frames::new(&call, id, created, &app.fingerprint(), choices),
            begun: vec![false; choices],
            pending: vec![None; choices],
            touched: Vec::new(),
            buffer: BytesMut::new(),
            keep_alive: (!interval.is_zero()).then(|| Box::pin(tokio::time::sleep(interval))),
            ended: false,
            app,
            call,
            generation,
        }
    }

    /// Makes it a response.
    pub fn into_response(self) -> Response {
        let mut response = Response::new(Body::new(self));
        let headers = response.headers_mut();
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("text/event-stream; charset=utf-8"),
        );
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        // Proxies such as nginx would gather the chunks otherwise.
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        response
    }

    fn take(&mut self, choice: usize, delta: OutputDelta) {
        match &mut self.pending[choice] {
            None => {
                self.pending[choice] = Some(delta);
                self.touched.push(choice);
            }
            Some(earlier) => {
                earlier.text.push_str(&delta.text);
                earlier.token_ids.extend(delta.token_ids);
                earlier.logprobs.extend(delta.logprobs);
                earlier.finish = delta.finish;
            }
        }
    }

    /// Writes what is pending of each choice whose chunk is due: its first, its last, and one of
    /// --stream-interval tokens. With `all` whatever there is.
    fn write(&mut self, all: bool) {
        let interval = self.app.server.stream_interval;
        let (call, generation) = (&self.call, &self.generation);
        let buffer = &mut self.buffer;
        buffer.reserve(self.touched.len() * CHUNK);
        let names = TokenNames {
            tokenizer: self.app.engine.frontend().tokenizer().map(|t| &**t),
            as_ids: call.tokens_as_ids,
        };
        let options = call.stream.unwrap_or_default();
        let n = call.params.n as usize;
        let (pending, begun) = (&mut self.pending, &mut self.begun);
        self.touched.retain(|choice| {
            let choice = *choice;
            let due = |delta: &mut OutputDelta| {
                let enough = delta.token_ids.len() >= interval || delta.finish.is_some();
                all || enough || !begun[choice]
            };
            let Some(delta) = pending[choice].take_if(due) else {
                return pending[choice].is_some();
            };
            let output = generation.output(choice / n);
            let usage = (options.include_usage && options.continuous_usage_stats)
                .then(|| usage_of_choice(call, output, choice % n));
            let from = Source {
                call,
                names: &names,
                output,
                usage,
            };
            if !std::mem::replace(&mut begun[choice], true) {
                let echo = match call.echo {
                    true => echo_of(call, choice / n, from.output, &names),
                    false => String::new(),
                };
                self.frames.first(buffer, from, choice, &echo);
            }
            self.frames.delta(buffer, from, choice, &delta);
            false
        });
    }

    fn end(&mut self, error: Option<&ApiError>) {
        if let Some(error) = error {
            frame::error(&mut self.buffer, error);
        } else if self.call.stream.unwrap_or_default().include_usage {
            let mut usage = usage(&self.call, &self.generation);
            if self.app.server.enable_prompt_tokens_details {
                let cached = |at| self.generation.output(at).metrics.num_cached_tokens;
                usage.cached_tokens = Some((0..self.generation.len()).map(cached).sum());
            }
            self.frames.usage(&mut self.buffer, usage);
        }
        self.buffer.extend_from_slice(frame::DONE);
        self.ended = true;
    }
}

/// Tokens of all prompts and their choices.
fn usage(call: &Call, generation: &Generation) -> Usage {
    let mut usage = Usage::default();
    for at in 0..generation.len() {
        let output = generation.output(at);
        usage.prompt_tokens += output.prompt_token_ids.len();
        if !call.score_only {
            usage.completion_tokens += completion_tokens(&output.outputs);
        }
    }
    usage
}

/// Tokens of a prompt and of one of its choices, so far.
fn usage_of_choice(call: &Call, output: &RequestOutput, index: usize) -> Usage {
    let own = output.outputs.iter().find(|o| o.index as usize == index);
    Usage {
        prompt_tokens: output.prompt_token_ids.len(),
        completion_tokens: match own {
            Some(own) if !call.score_only => own.token_ids.len(),
            _ => 0,
        },
        cached_tokens: None,
    }
}

/// The text of one of several prompts.
fn echo_of(call: &Call, prompt: usize, output: &RequestOutput, names: &TokenNames<'_>) -> String {
    match &call.prompts[prompt] {
        Prompt::Text(text) => text.clone(),
        _ => echoed(call, output, names),
    }
}

impl http_body::Body for Events {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(None);
        }
        let mut taken = 0;
        loop {
            match this.generation.poll_delta(cx) {
                Poll::Ready(Some(Ok((choice, delta)))) => {
                    taken += delta.text.len() + delta.token_ids.len();
                    this.take(choice, delta);
                    if taken < BATCH {
                        continue;
                    }
                    // More may be there already: come back for it.
                    cx.waker().wake_by_ref();
                    this.write(false);
                }
                Poll::Ready(Some(Err(error))) => {
                    this.write(true);
                    this.end(Some(&error));
                }
                Poll::Ready(None) => {
                    this.write(true);
                    this.end(None);
                }
                Poll::Pending => {
                    this.write(false);
                    if this.buffer.is_empty() {
                        ready!(poll_keep_alive(this, cx));
                        this.buffer.extend_from_slice(b": keep-alive\n\n");
                    }
                }
            }
            if let Some(timer) = &mut this.keep_alive {
                let next = Instant::now() + this.app.server.sse_keep_alive_interval;
                timer.as_mut().reset(next);
            }
            return Poll::Ready(Some(Ok(Frame::data(this.buffer.split().freeze()))));
        }
    }
}

/// Ready when the stream has been silent for too long; never if that does not matter.
fn poll_keep_alive(events: &mut Events, cx: &mut Context<'_>) -> Poll<()> {
    match &mut events.keep_alive {
        Some(timer) => timer.as_mut().poll(cx),
        None => Poll::Pending,
    }
}
