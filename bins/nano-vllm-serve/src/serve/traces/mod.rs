//! OpenTelemetry: one span a prompt, with vLLM's names, sent to a collector over OTLP/HTTP.
//!
//! Requests never wait for the collector: a span that finds the queue full is dropped, and counted
//! in the log.

mod export;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::HeaderMap;
use engine::RequestOutput;
use serde_json::{Value, json};
use tokio::sync::mpsc;

pub use export::Endpoint;
use export::Exporter;

use crate::openai::Call;

/// Spans that wait to be sent.
const QUEUE: usize = 4096;

/// Where a request stands in its client's trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parent {
    trace: u128,
    span: u64,
    sampled: bool,
}

impl Parent {
    /// Reads `traceparent`, as W3C's Trace Context defines it; a malformed one counts as none.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let text = headers.get("traceparent")?.to_str().ok()?;
        let mut parts = text.split('-');
        let mut part = |length: usize| {
            let hex = |c: u8| matches!(c, b'0'..=b'9' | b'a'..=b'f');
            let part = parts.next()?;
            (part.len() == length && part.bytes().all(hex)).then_some(part)
        };
        let (version, trace, span, flags) = (part(2)?, part(32)?, part(16)?, part(2)?);
        // Later versions may go on with further parts.
        if version == "ff" || (version == "00" && parts.next().is_some()) {
            return None;
        }
        let parent = Self {
            trace: u128::from_str_radix(trace, 16).ok()?,
            span: u64::from_str_radix(span, 16).ok()?,
            sampled: u8::from_str_radix(flags, 16).ok()? & 1 == 1,
        };
        (parent.trace != 0 && parent.span != 0).then_some(parent)
    }
}

/// A finished span in OTLP's JSON.
type Span = Value;

/// Takes spans.
pub struct Tracer {
    spans: mpsc::Sender<Span>,
    dropped: Arc<AtomicU64>,
}

impl Tracer {
    /// A tracer and the exporter behind it, which runs until the tracer is dropped.
    pub fn new(endpoint: Endpoint) -> (Self, impl Future<Output = ()> + Send) {
        let (spans, queue) = mpsc::channel(QUEUE);
        let dropped = Arc::new(AtomicU64::new(0));
        let exporter = Exporter::new(endpoint, queue, dropped.clone());
        (Self { spans, dropped }, exporter.run())
    }

    /// Reports a prompt that has ended, well or not. A client that does not record its own trace
    /// wants no part of it recorded here.
    pub fn record(&self, call: &Traced, output: &RequestOutput, error: Option<&str>) {
        if call.parent.is_some_and(|parent| !parent.sampled) {
            return;
        }
        if self.spans.try_send(call.span(output, error)).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// What a span needs to know of a request before it ends.
#[derive(Clone, Debug)]
pub struct Traced {
    /// The client's span.
    pub parent: Option<Parent>,
    /// When the request came.
    pub arrival: SystemTime,
    id: String,
    model: String,
    temperature: f32,
    top_p: f32,
    max_tokens: Option<u32>,
    n: u32,
}

impl Traced {
    /// For the request with this id.
    pub fn new(call: &Call, id: &str, parent: Option<Parent>) -> Self {
        Self {
            parent,
            arrival: SystemTime::now(),
            id: id.to_owned(),
            model: call.model.clone(),
            temperature: call.params.temperature,
            top_p: call.params.top_p,
            max_tokens: call.params.max_tokens,
            n: call.params.n,
        }
    }

    fn span(&self, output: &RequestOutput, error: Option<&str>) -> Span {
        let (start, end) = (nanos(self.arrival), nanos(SystemTime::now()));
        let completion: usize = output.outputs.iter().map(|o| o.token_ids.len()).sum();
        let prompt = output.prompt_token_ids.len();
        let mut attributes = vec![
            text("gen_ai.response.model", &self.model),
            text("gen_ai.request.id", &self.id),
            double("gen_ai.request.temperature", f64::from(self.temperature)),
            double("gen_ai.request.top_p", f64::from(self.top_p)),
            int("gen_ai.request.n", self.n as usize),
            int("gen_ai.usage.num_sequences", output.outputs.len()),
            int("gen_ai.usage.prompt_tokens", prompt),
            int("gen_ai.usage.completion_tokens", completion),
        ];
        if let Some(max) = self.max_tokens {
            attributes.push(int("gen_ai.request.max_tokens", max as usize));
        }
        let times = &output.metrics;
        let (queue, first, total) = (
            times.queue_time,
            times.time_to_first_token,
            times.total_time,
        );
        let between =
            |from: Option<Duration>, to: Option<Duration>| Some(to?.saturating_sub(from?));
        for (name, time) in [
            ("time_in_queue", queue),
            ("time_to_first_token", first),
            ("e2e", total),
            ("time_in_model_prefill", between(queue, first)),
            ("time_in_model_decode", between(first, total)),
            ("time_in_model_inference", between(queue, total)),
        ] {
            if let Some(time) = time {
                let name = format!("gen_ai.latency.{name}");
                attributes.push(double(&name, time.as_secs_f64()));
            }
        }
        let trace = self.parent.map_or_else(rand::random, |p| p.trace);
        let mut span = json!({
            "traceId": format!("{trace:032x}"),
            "spanId": format!("{:016x}", rand::random::<u64>() | 1),
            "name": "llm_request",
            "kind": 2, // a server's
            "startTimeUnixNano": start.to_string(),
            "endTimeUnixNano": end.max(start).to_string(),
            "attributes": attributes,
            "status": {},
        });
        if let Some(parent) = self.parent {
            span["parentSpanId"] = json!(format!("{:016x}", parent.span));
        }
        if let Some(message) = error {
            span["status"] = json!({"code": 2, "message": message});
        }
        span
    }
}

fn nanos(time: SystemTime) -> u128 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos())
}

fn text(key: &str, value: &str) -> Value {
    json!({"key": key, "value": {"stringValue": value}})
}

fn double(key: &str, value: f64) -> Value {
    json!({"key": key, "value": {"doubleValue": value}})
}

/// OTLP's JSON writes 64-bit integers as strings.
fn int(key: &str, value: usize) -> Value {
    json!({"key": key, "value": {"intValue": value.to_string()}})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traceparent() {
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("traceparent", text.parse().unwrap());
            Parent::of(&headers)
        };
        let (trace, span) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
        let parent = Parent {
            trace: 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c,
            span: 0xb7ad_6b71_6920_3331,
            sampled: true,
        };
        assert_eq!(read(&format!("00-{trace}-{span}-01")), Some(parent));
        assert_eq!(read(&format!("01-{trace}-{span}-01-new")), Some(parent));
        let unsampled = Parent {
            sampled: false,
            ..parent
        };
        assert_eq!(read(&format!("00-{trace}-{span}-00")), Some(unsampled));
        for bad in [
            "",
            "00",
            &format!("00-{trace}-{span}"),
            &format!("00-{trace}-{span}-1"),
            &format!("ff-{trace}-{span}-01"),
            &format!("00-{trace}-{span}-01-more"),
            &format!("00-{}-{span}-01", "0".repeat(32)),
            &format!("00-{trace}-{}-01", "0".repeat(16)),
            &format!("00-{}-{span}-01", trace.to_uppercase()),
            &format!("00-{trace}-+{}-01", &span[1..]),
        ] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
