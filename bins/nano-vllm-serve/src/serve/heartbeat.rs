//! Whether the engine still makes progress, without asking its thread.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The engine is idle.
const IDLE: u64 = u64::MAX;

/// Written by the engine's thread, read by `/health`.
#[derive(Debug)]
pub struct Heartbeat {
    origin: Instant,
    /// Milliseconds from `origin` to the last progress; [`IDLE`] if there is nothing to do.
    last: AtomicU64,
}

impl Heartbeat {
    /// An idle engine.
    pub fn new() -> Self {
        Self {
            origin: Instant::now(),
            last: AtomicU64::new(IDLE),
        }
    }

    /// A step has ended, or work came to an idle engine; `working`: work is left.
    pub fn beat(&self, working: bool) {
        let last = match working {
            true => u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(IDLE - 1),
            false => IDLE,
        };
        self.last.store(last, Ordering::Relaxed);
    }

    /// How long work has waited without progress; nothing for an idle engine.
    pub fn stalled(&self) -> Duration {
        match self.last.load(Ordering::Relaxed) {
            IDLE => Duration::ZERO,
            last => self
                .origin
                .elapsed()
                .saturating_sub(Duration::from_millis(last)),
        }
    }
}
