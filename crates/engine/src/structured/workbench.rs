//! Where grammars are compiled: on threads with deep stacks, few at a time, and not for ever.

use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Grammars that are compiled at a time: the model needs the other processors.
pub(super) const PLACES: usize = 2;

/// How long a grammar may take, and how long it waits for a place. Usual ones take milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// Bytes of a stack. llguidance follows rules that refer to each other, and references of schemas, by
/// recursion: within the size that is read they can be deeper than a usual stack. What is not
/// touched of it is never there.
const STACK: usize = 512 << 20;

/// Why something was not made.
#[derive(Debug)]
pub(super) enum Failure {
    /// It cannot be.
    Cause(String),
    /// All places are taken by others that do not come to an end.
    Busy,
}

/// The places, and a bell for when one is free.
#[derive(Default)]
pub(super) struct Workbench(Arc<(Mutex<usize>, Condvar)>);

/// Gives a place back.
struct Place(Arc<(Mutex<usize>, Condvar)>);

impl Drop for Place {
    fn drop(&mut self) {
        *lock(&self.0.0) -= 1;
        self.0.1.notify_one();
    }
}

impl Workbench {
    /// Does `work` on a thread of its own and waits for it. What takes too long is given up: it
    /// cannot be stopped, and keeps its place until it ends.
    pub(super) fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Failure> {
        let (taken, bell) = &*self.0;
        let guard = lock(taken);
        let (mut guard, waited) = bell
            .wait_timeout_while(guard, PATIENCE, |taken| *taken >= PLACES)
            .unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            return Err(Failure::Busy);
        }
        *guard += 1;
        drop(guard);
        let place = Place(self.0.clone());
        let (sender, result) = sync_channel(1);
        thread::Builder::new()
            .name("grammar".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                let made = work();
                // Whoever waits next finds the place free.
                drop(place);
                // Nobody listens any more if it took too long.
                let _ = sender.send(made);
            })
            .map_err(|error| Failure::Cause(format!("no thread to compile it on: {error}")))?;
        result.recv_timeout(PATIENCE).map_err(|error| {
            Failure::Cause(match error {
                RecvTimeoutError::Timeout => {
                    format!("it takes more than {} s to compile", PATIENCE.as_secs())
                }
                RecvTimeoutError::Disconnected => "compiling it failed".to_owned(),
            })
        })
    }
}

/// What a panic leaves behind here can be used: nothing is changed in several steps.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn places_come_back_also_after_panics() {
        let bench = Workbench::default();
        for round in 0..2 * PLACES {
            let failed = bench.run(|| -> u32 { panic!("as asked for") });
            assert!(matches!(failed, Err(Failure::Cause(_))), "{failed:?}");
            assert_eq!(bench.run(move || round).unwrap(), round);
        }
        assert_eq!(*lock(&bench.0.0), 0);
    }

    #[test]
    fn one_that_does_not_end_leaves_a_place_for_others() {
        let bench = Arc::new(Workbench::default());
        let (sender, blocked) = channel::<()>();
        let waiting = bench.clone();
        let stuck = thread::spawn(move || waiting.run(move || blocked.recv().is_err()));
        for _ in 0..20 {
            bench.run(|| ()).unwrap();
        }
        drop(sender);
        assert!(stuck.join().unwrap().unwrap());
    }
}
