//! Sends spans in batches.

use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::handshake;
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use super::Span;

/// A span is sent at most so much later.
const INTERVAL: Duration = Duration::from_secs(1);

/// Most spans of a message.
const BATCH: usize = 512;

/// How long the collector may take; then the batch is given up.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Most bytes of the collector's answer that are read.
const ANSWER: usize = 64 << 10;

/// A collector's address, as `--otlp-traces-endpoint` has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Host and port.
    authority: String,
    path: String,
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let uri: Uri = text.parse().map_err(|error| format!("{error}"))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => {
                return Err(
                    "https is not supported; send to a collector beside the server, which \
                            passes spans on"
                        .to_owned(),
                );
            }
            _ => return Err("must begin with http://".to_owned()),
        }
        let host = uri.host().unwrap_or_default();
        Ok(Self {
            // OTLP/HTTP has a port of its own.
            authority: format!("{host}:{}", uri.port_u16().unwrap_or(4318)),
            path: match uri.path() {
                "/" => "/v1/traces".to_owned(),
                path => path.to_owned(),
            },
        })
    }
}

/// Takes spans from the queue and sends them.
pub struct Exporter {
    endpoint: Endpoint,
    queue: mpsc::Receiver<Span>,
    dropped: Arc<AtomicU64>,
}

impl Exporter {
    pub fn new(endpoint: Endpoint, queue: mpsc::Receiver<Span>, dropped: Arc<AtomicU64>) -> Self {
        Self {
            endpoint,
            queue,
            dropped,
        }
    }

    /// Runs until nobody is left to send a span, and everything is out.
    pub async fn run(mut self) {
        let mut batch = Vec::with_capacity(BATCH);
        while self.gather(&mut batch).await {
            let spans = std::mem::take(&mut batch);
            let count = spans.len();
            let sent = match tokio::time::timeout(TIMEOUT, self.send(spans)).await {
                Ok(sent) => sent,
                Err(_) => Err(anyhow::anyhow!("no answer within {TIMEOUT:?}")),
            };
            if let Err(error) = sent {
                tracing::warn!(
                    "{count} spans are lost: {}: {error:#}",
                    self.endpoint.authority
                );
            }
            match self.dropped.swap(0, Ordering::Relaxed) {
                0 => {}
                dropped => tracing::warn!("{dropped} spans are lost: too many at once"),
            }
        }
    }

    /// Waits for a batch; false once there will be none.
    async fn gather(&mut self, batch: &mut Vec<Span>) -> bool {
        match self.queue.recv().await {
            Some(span) => batch.push(span),
            None => return false,
        }
        let full = async {
            while batch.len() < BATCH {
                match self.queue.recv().await {
                    Some(span) => batch.push(span),
                    None => return,
                }
            }
        };
        // Late is as good as full.
        let _ = tokio::time::timeout(INTERVAL, full).await;
        true
    }

    async fn send(&self, spans: Vec<Span>) -> anyhow::Result<()> {
        let stream = TcpStream::connect(&self.endpoint.authority)
            .await
            .context("cannot connect")?;
        let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
        let request = Request::post(&self.endpoint.path)
            .header("host", &self.endpoint.authority)
            .header("content-type", "application/json")
            .header("connection", "close")
            .body(Full::new(Bytes::from(message(spans).to_string())))?;
        let answer = async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), ANSWER).collect().await;
            let body = body.map_err(|error| anyhow::anyhow!("{error}"))?.to_bytes();
            ensure!(
                status.is_success(),
                "{status}: {}",
                String::from_utf8_lossy(&body[..body.len().min(200)])
            );
            Ok(())
        };
        let (answer, _) = tokio::join!(answer, connection);
        answer
    }
}

/// An `ExportTraceServiceRequest`.
fn message(spans: Vec<Span>) -> Value {
    let name = std::env::var("OTEL_SERVICE_NAME").unwrap_or_else(|_| "nano-vllm-serve".to_owned());
    json!({"resourceSpans": [{
        "resource": {"attributes": [super::text("service.name", &name)]},
        "scopeSpans": [{
            "scope": {"name": "nano-vllm-serve", "version": env!("CARGO_PKG_VERSION")},
            "spans": spans,
        }],
    }]})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        let read = |text: &str| text.parse::<Endpoint>().map(|e| (e.authority, e.path));
        let at = |authority: &str, path: &str| Ok((authority.to_owned(), path.to_owned()));
        assert_eq!(read("http://a:9"), at("a:9", "/v1/traces"));
        assert_eq!(read("http://a/"), at("a:4318", "/v1/traces"));
        assert_eq!(read("http://[::1]:9/x/y"), at("[::1]:9", "/x/y"));
        for bad in ["", "a:4317", "https://a", "grpc://a:4317", "http://"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
