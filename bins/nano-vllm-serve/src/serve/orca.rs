//! The load in answers' heads, for routers that ask for it (ORCA, as in vLLM): a request with
//! `endpoint-load-metrics-format: TEXT` or `JSON` gets `endpoint-load-metrics`.

use axum::http::{HeaderMap, HeaderValue};
use serde_json::{Value, json};

use super::metrics::Metrics;

/// The header's name.
pub const LOAD: &str = "endpoint-load-metrics";

/// How a load is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadFormat {
    Text,
    Json,
}

impl LoadFormat {
    /// What the request asks for, if for anything that there is.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let format = headers.get("endpoint-load-metrics-format")?;
        match format.to_str().ok()?.to_ascii_lowercase().as_str() {
            "text" => Some(Self::Text),
            "json" => Some(Self::Json),
            _ => None,
        }
    }

    /// The load now.
    pub fn header(self, metrics: &Metrics) -> Option<HeaderValue> {
        let figures = metrics.load();
        let text = match self {
            Self::Text => {
                let one = |(name, value)| format!("named_metrics.{name}={value:?}");
                format!("TEXT {}", figures.map(one).join(", "))
            }
            Self::Json => {
                let one = |(name, value): (&str, f64)| (name.to_owned(), json!(value));
                let named = Value::Object(figures.map(one).into_iter().collect());
                format!("JSON {}", json!({"named_metrics": named}))
            }
        };
        HeaderValue::try_from(text).ok()
    }
}
