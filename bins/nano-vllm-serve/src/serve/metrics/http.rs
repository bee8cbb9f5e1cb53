//! What requests over HTTP took, under the names that vLLM's server has from `prometheus-fastapi-instrumentator`.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::{Body, Bytes, HttpBody};
use axum::http::{Method, StatusCode};
use http_body::{Frame, SizeHint};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::buckets::{HTTP, HTTP_FINE};

/// Routes that are asked for by machines, again and again.
const NOT_COUNTED: [&str; 7] = [
    "/metrics", "/health", "/ready", "/load", "/ping", "/version", "/live",
];
/// The handler of what has no route.
const NO_ROUTE: &str = "none";

type RequestLabels = [(&'static str, String); 3];
type TimeLabels = [(&'static str, String); 2];
type Times = Family<TimeLabels, Histogram, fn() -> Histogram>;

/// Requests by route, method and status.
pub struct HttpMetrics {
    requests: Family<RequestLabels, Counter>,
    times: Times,
    fine: Histogram,
}

impl HttpMetrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let this = Self {
            requests: Family::default(),
            times: Times::new_with_constructor(|| Histogram::new(HTTP)),
            fine: Histogram::new(HTTP_FINE),
        };
        registry.register(
            "http_requests",
            "Total number of requests by method, status and handler",
            this.requests.clone(),
        );
        registry.register(
            "http_request_duration_seconds",
            "Latency with only few buckets by handler, to the end of the answer",
            this.times.clone(),
        );
        registry.register(
            "http_request_duration_highr_seconds",
            "Latency with many buckets but no specific labels",
            this.fine.clone(),
        );
        this
    }

    /// Counts a request when the answer's body is through, or is given up.
    pub fn watch(
        self: &Arc<Self>,
        route: Option<&str>,
        method: &Method,
        status: StatusCode,
        since: Instant,
        body: Body,
    ) -> Body {
        if route.is_some_and(|route| NOT_COUNTED.contains(&route)) {
            return body;
        }
        // Anybody can make up methods; each would be a series.
        let method = match method.as_str() {
            known @ ("GET" | "POST" | "PUT" | "DELETE" | "HEAD" | "OPTIONS" | "PATCH") => known,
            _ => "other",
        };
        Body::new(Watched {
            body,
            _end: End {
                metrics: self.clone(),
                labels: [
                    ("handler", route.unwrap_or(NO_ROUTE).to_owned()),
                    ("method", method.to_owned()),
                    ("status", format!("{}xx", status.as_u16() / 100)),
                ],
                since,
            },
        })
    }
}

struct Watched {
    body: Body,
    _end: End,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Counts a request when it is dropped.
struct End {
    metrics: Arc<HttpMetrics>,
    labels: RequestLabels,
    since: Instant,
}

impl Drop for End {
    fn drop(&mut self) {
        let seconds = self.since.elapsed().as_secs_f64();
        let [handler, method, _] = self.labels.clone();
        let times = self.metrics.times.get_or_create(&[handler, method]);
        times.observe(seconds);
        self.metrics.fine.observe(seconds);
        self.metrics.requests.get_or_create(&self.labels).inc();
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;

    use super::*;

    #[test]
    fn a_request_counts_when_its_answer_has_ended() {
        let mut registry = Registry::default();
        let metrics = Arc::new(HttpMetrics::new(&mut registry));
        let watch = |route, method: &[u8], status| {
            let method = Method::from_bytes(method).unwrap();
            metrics.watch(route, &method, status, Instant::now(), Body::from("x"))
        };
        let text = || {
            let mut text = String::new();
            encode(&mut text, &registry).unwrap();
            text
        };
        let body = watch(Some("/v1/models"), b"GET", StatusCode::OK);
        assert_eq!(body.size_hint().exact(), Some(1));
        assert!(!text().contains("/v1/models"));
        drop(body);
        drop(watch(None, b"MADEUP", StatusCode::NOT_FOUND));
        drop(watch(Some("/health"), b"GET", StatusCode::OK));
        for line in [
            "http_requests_total{handler=\"/v1/models\",method=\"GET\",status=\"2xx\"} 1",
            "http_requests_total{handler=\"none\",method=\"other\",status=\"4xx\"} 1",
            "http_request_duration_seconds_count{handler=\"/v1/models\",method=\"GET\"} 1",
            "http_request_duration_highr_seconds_count 2",
        ] {
            assert!(text().contains(line), "{line} is not in\n{}", text());
        }
        assert!(!text().contains("/health"));
    }
}
