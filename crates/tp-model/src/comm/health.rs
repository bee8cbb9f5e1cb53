//! The first failure of any rank, and who must hear of it.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::CommError;

type Hook = Box<dyn FnOnce(&CommError) + Send>;

/// Shared by all that serve one group of ranks in this process: whoever notices a failure tells
/// it here once, and whatever waits for another rank stops waiting.
#[derive(Clone, Default)]
pub struct Health(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    failure: Option<CommError>,
    closed: bool,
    hooks: Vec<Hook>,
}

impl Health {
    /// The first failure, if there was one.
    pub fn failure(&self) -> Option<CommError> {
        self.lock().failure.clone()
    }

    /// As [`Health::failure`], if it is told within `time`.
    pub(crate) fn failure_within(&self, time: Duration) -> Option<CommError> {
        let deadline = Instant::now() + time;
        loop {
            let failure = self.failure();
            if failure.is_some() || Instant::now() >= deadline {
                return failure;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Fails with the first failure, if there was one.
    pub(crate) fn check(&self) -> Result<(), CommError> {
        self.failure().map_or(Ok(()), Err)
    }

    /// Tells of a failure; returns the first one, which every rank reports. After
    /// [`Health::close`] it is told to nobody.
    pub fn fail(&self, failure: CommError) -> CommError {
        let mut state = self.lock();
        if let Some(first) = &state.failure {
            return first.clone();
        }
        if state.closed {
            return failure;
        }
        state.failure = Some(failure.clone());
        let hooks = std::mem::take(&mut state.hooks);
        drop(state);
        for hook in hooks {
            hook(&failure);
        }
        failure
    }

    /// From now on connections may end: the work is done.
    pub fn close(&self) {
        self.lock().closed = true;
    }

    /// Whether [`Health::close`] was called.
    pub(crate) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Calls `hook` once with the first failure: at once if there was one already.
    pub fn on_failure(&self, hook: impl FnOnce(&CommError) + Send + 'static) {
        let mut state = self.lock();
        match state.failure.clone() {
            None => state.hooks.push(Box::new(hook)),
            Some(failure) => {
                drop(state);
                hook(&failure);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that holds the lock panics.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Health").field(&self.failure()).finish()
    }
}
