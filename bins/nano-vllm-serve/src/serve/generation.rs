//! The engine's side of one HTTP request: its streams, timeouts and metrics.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use engine::{FinishReason, OutputDelta, RequestOutput, TokenStream};
use futures_core::Stream;
use tokio::time::Sleep;

use super::auth::TenantId;
use super::errors::shutting_down;
use super::lifecycle::InFlight;
use super::metrics::Rejection;
use super::state::App;
use super::traces::{Parent, Traced};
use crate::openai::{ApiError, Call};

/// One prompt of the request.
struct Member {
    stream: TokenStream,
    /// Choices that have not ended.
    open: u32,
    /// When each choice's last token came.
    last_token: Vec<Option<Instant>>,
    counted: bool,
}

/// Where a request comes from.
pub struct Origin {
    /// Whose key it brings.
    pub tenant: TenantId,
    /// The client's span.
    pub parent: Option<Parent>,
    /// Keeps the server from ending.
    pub in_flight: InFlight,
}

/// Everything that a request's prompts generate, in the order in which it comes. Dropping it
/// aborts what has not ended.
pub struct Generation {
    app: Arc<App>,
    members: Vec<Member>,
    n: u32,
    tenant: TenantId,
    traced: Option<Traced>,
    /// What ended it early.
    failed: Option<String>,
    arrival: Instant,
    /// Polled first, so that every prompt gets its turn.
    next: usize,
    timer: Option<Pin<Box<Sleep>>>,
    _in_flight: InFlight,
}

impl Generation {
    /// Hands the prompts of `call` to the engine. Tokenizes, so it may take a while.
    pub fn start(app: &Arc<App>, call: &Call, id: &str, origin: Origin) -> Result<Self, ApiError> {
        let arrival = Instant::now();
        let Origin {
            tenant,
            parent,
            in_flight,
        } = origin;
        let traced = app.tracer.is_some().then(|| Traced::new(call, id, parent));
        let mut members = Vec::with_capacity(call.prompts.len());
        for mut request in call.requests(id) {
            request.class = tenant.0.into();
            let stream = app.engine.generate(request).map_err(|error| {
                if matches!(error, engine::RequestError::QueueFull { .. }) {
                    app.metrics.on_rejection(tenant, Rejection::QueueFull);
                }
                app.error(error)
            })?;
            let m = &app.metrics;
            m.request_params_n.observe(f64::from(call.params.n));
            if let Some(max) = call.params.max_tokens {
                m.request_params_max_tokens.observe(f64::from(max));
            }
            m.on_start(tenant);
            members.push(Member {
                stream,
                open: call.params.n,
                last_token: vec![None; call.params.n as usize],
                counted: false,
            });
        }
        let limits = &app.server;
        let first = [limits.queue_timeout, limits.request_timeout]
            .into_iter()
            .filter(|timeout| !timeout.is_zero())
            .min();
        Ok(Self {
            app: app.clone(),
            members,
            n: call.params.n,
            tenant,
            traced,
            failed: None,
            arrival,
            next: 0,
            timer: first.map(|timeout| Box::pin(tokio::time::sleep(timeout))),
            _in_flight: in_flight,
        })
    }

    /// What has come of each prompt so far.
    pub fn output(&self, prompt: usize) -> &RequestOutput {
        self.members[prompt].stream.output()
    }

    /// The number of prompts.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Waits for the end.
    pub async fn finish(&mut self) -> Result<(), ApiError> {
        loop {
            match std::future::poll_fn(|cx| self.poll_delta(cx)).await {
                None => return Ok(()),
                Some(delta) => delta?,
            };
        }
    }

    /// The next news: which choice of the answer it is about, and what. After an error the rest
    /// is lost.
    pub fn poll_delta(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<(usize, OutputDelta), ApiError>>> {
        let polled = self.poll_members(cx);
        if let Poll::Ready(Some(Err(error))) = &polled {
            self.failed.get_or_insert_with(|| error.message.clone());
        }
        polled
    }

    fn poll_members(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<(usize, OutputDelta), ApiError>>> {
        let count = self.members.len();
        let mut open = false;
        for turn in 0..count {
            let at = (self.next + turn) % count;
            let member = &mut self.members[at];
            if member.open == 0 {
                continue;
            }
            match Pin::new(&mut member.stream).poll_next(cx) {
                Poll::Pending => open = true,
                Poll::Ready(None) => member.open = 0,
                Poll::Ready(Some(Err(error))) => {
                    let error = self.app.error(error);
                    return Poll::Ready(Some(Err(error)));
                }
                Poll::Ready(Some(Ok(delta))) => {
                    // The same prompt goes on: what one step brought arrives together.
                    self.next = at;
                    let index = at * self.n as usize + delta.index as usize;
                    return Poll::Ready(Some(self.noted(at, delta).map(|delta| (index, delta))));
                }
            }
        }
        if !open {
            return Poll::Ready(None);
        }
        self.next = (self.next + 1) % count;
        match self.poll_timer(cx) {
            Some(error) => Poll::Ready(Some(Err(error))),
            None => Poll::Pending,
        }
    }

    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Option<ApiError> {
        loop {
            if self.timer.as_mut()?.as_mut().poll(cx).is_pending() {
                return None;
            }
            let server = &self.app.server;
            let (queue, request) = (server.queue_timeout, server.request_timeout);
            let waited = self.arrival.elapsed();
            let seconds = |limit: Duration| limit.as_secs_f64();
            if !request.is_zero() && waited >= request {
                self.app.metrics.request_timeouts.inc();
                let message = format!("the request took longer than {} s", seconds(request));
                return Some(ApiError::other(504, "GatewayTimeout", message));
            }
            let queued = |m: &Member| m.stream.output().metrics.queue_time.is_none() && m.open > 0;
            if !queue.is_zero() && waited >= queue && self.members.iter().any(queued) {
                self.app
                    .metrics
                    .on_rejection(self.tenant, Rejection::QueueTimeout);
                let message = format!(
                    "the request waited longer than {} s for its turn; try again later",
                    seconds(queue)
                );
                return Some(ApiError::unavailable(message));
            }
            let left = match request.is_zero() {
                true => None,
                false => Some(request.saturating_sub(waited)),
            };
            self.timer = left.map(|left| Box::pin(tokio::time::sleep(left)));
        }
    }

    /// Counts a delta; an error if it ends its sequence because of one.
    fn noted(&mut self, at: usize, delta: OutputDelta) -> Result<OutputDelta, ApiError> {
        let member = &mut self.members[at];
        let m = &self.app.metrics;
        if !delta.token_ids.is_empty() {
            let now = Instant::now();
            m.on_tokens(self.tenant, delta.token_ids.len());
            if !member.counted {
                member.counted = true;
                let output = member.stream.output();
                m.on_prompt(self.tenant, output);
            }
            match member.last_token[delta.index as usize].replace(now) {
                None if delta.index == 0 => {
                    m.first_token.observe((now - self.arrival).as_secs_f64());
                }
                None => {}
                Some(last) => m.inter_token.observe((now - last).as_secs_f64()),
            }
        }
        if let Some(finish) = &delta.finish {
            member.open -= 1;
            m.on_end(finish.reason);
            match finish.reason {
                FinishReason::Stop | FinishReason::Length => {
                    if member.open == 0 {
                        observe_request(&self.app, member);
                    }
                }
                FinishReason::Abort if self.app.lifecycle.is_stopping() => {
                    return Err(shutting_down());
                }
                FinishReason::Abort => {}
                FinishReason::Error => {
                    let message = finish.error.clone().unwrap_or_default();
                    return Err(ApiError::internal(format!("generation failed: {message}")));
                }
            }
        }
        Ok(delta)
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        for member in &self.members {
            if let (Some(tracer), Some(traced)) = (&self.app.tracer, &self.traced) {
                let left = (member.open > 0).then_some("the client left");
                let error = self.failed.as_deref().or(left);
                tracer.record(traced, member.stream.output(), error);
            }
            for _ in 0..member.open {
                self.app.metrics.on_end(FinishReason::Abort);
            }
        }
    }
}

fn observe_request(app: &App, member: &Member) {
    let (m, output) = (&app.metrics, member.stream.output());
    let prompt = output.prompt_token_ids.len();
    m.request_prompt_tokens.observe(prompt as f64);
    let cached = output.metrics.num_cached_tokens;
    m.request_prefill_computed
        .observe(prompt as f64 - f64::from(cached));
    let mut longest = 0;
    for sequence in &output.outputs {
        longest = longest.max(sequence.token_ids.len());
        m.request_generation_tokens
            .observe(sequence.token_ids.len() as f64);
    }
    m.request_max_generation_tokens.observe(longest as f64);
    let times = &output.metrics;
    m.request_preemptions
        .observe(f64::from(times.num_preemptions));
    if let (Some(queue), Some(first), Some(total)) = (
        times.queue_time,
        times.time_to_first_token,
        times.total_time,
    ) {
        let seconds = |d: Duration| d.as_secs_f64();
        let decode = seconds(total.saturating_sub(first));
        m.e2e.observe(seconds(total));
        m.queue_time.observe(seconds(queue));
        m.prefill_time.observe(seconds(first.saturating_sub(queue)));
        m.decode_time.observe(decode);
        m.inference_time
            .observe(seconds(total.saturating_sub(queue)));
        if longest > 1 {
            m.time_per_output_token
                .observe(decode / (longest - 1) as f64);
        }
    }
}
