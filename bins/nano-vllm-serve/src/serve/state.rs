//! What every request sees.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use engine::{AsyncEngine, RequestError};

use super::args::ServerArgs;
use super::auth::ApiKeys;
use super::errors::shutting_down;
use super::heartbeat::Heartbeat;
use super::lifecycle::Lifecycle;
use super::live::LastLook;
use super::metrics::Metrics;
use super::traces::Tracer;
use crate::openai::parts::Parsers;
use crate::openai::{ApiError, ModelNames};

/// The server's state; shared, never changed but through atomics.
pub struct App {
    /// The engine, on its own thread.
    pub engine: AsyncEngine,
    /// Names under which the model is served.
    pub names: ModelNames,
    /// How chats' answers are split.
    pub parsers: Parsers,
    /// Flags.
    pub server: ServerArgs,
    /// Who may come in.
    pub keys: ApiKeys,
    /// Ready, draining, stopping.
    pub lifecycle: Arc<Lifecycle>,
    /// Takes spans, if there is a collector.
    pub tracer: Option<Tracer>,
    /// Figures for Prometheus.
    pub metrics: Arc<Metrics>,
    /// The engine's progress.
    pub heartbeat: Arc<Heartbeat>,
    /// What the page shows.
    pub last_look: LastLook,
    /// When the model was loaded, in seconds since 1970.
    pub created: u64,
    /// Tells answers apart.
    pub ids: Ids,
}

impl App {
    /// What the client is told about an error of the engine.
    pub fn error(&self, error: RequestError) -> ApiError {
        match error {
            RequestError::EngineDead(_) if self.lifecycle.is_stopping() => shutting_down(),
            error => error.into(),
        }
    }

    /// `system_fingerprint` of answers.
    pub fn fingerprint(&self) -> String {
        format!("nano-vllm-{}", env!("CARGO_PKG_VERSION"))
    }
}

/// Ids that no other request of this or another server has, as far as chance goes.
pub struct Ids {
    prefix: u64,
    next: AtomicU64,
}

impl Ids {
    /// Ids that begin at random.
    pub fn new() -> Self {
        Self {
            prefix: rand::random(),
            next: AtomicU64::new(0),
        }
    }

    /// The next id, of 24 hexadecimal digits.
    pub fn next(&self) -> String {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        format!("{:016x}{number:08x}", self.prefix)
    }
}
