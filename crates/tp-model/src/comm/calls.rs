//! Calls into a driver that may wait for other ranks, and say nothing while they do.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

use super::{CommError, Health, Members};

/// Watches over the calls of one rank of a group, which makes them from one thread. An exchange of GPUs
/// is put on a stream and waited for there, but the driver may wait at once: NCCL connects two GPUs in
/// the first exchange that takes a way between them, inside the call, and a stream that is full takes
/// no more. Nothing can end that from outside, so whoever stays too long is the group's failure, and
/// whoever hears of it must not wait for this thread.
#[derive(Debug)]
pub(super) struct Calls {
    clock: Clock,
    /// Its end is the watch's.
    _alive: Sender<()>,
}

/// One call under way, until it is dropped. What is called within it is part of it.
#[derive(Debug)]
#[must_use]
pub struct Call(Option<Clock>);

/// When the call under way began.
#[derive(Clone, Debug)]
struct Clock {
    zero: Instant,
    /// In nanoseconds from `zero` on, and one more; 0: there is no call.
    began: Arc<AtomicU64>,
}

impl Calls {
    /// For the group's rank `rank`: `health` hears of a call that takes longer than `timeout`.
    pub(super) fn new(
        rank: usize,
        members: &Members,
        timeout: Duration,
        health: &Health,
    ) -> Result<Self, CommError> {
        let clock = Clock {
            zero: Instant::now(),
            began: Arc::default(),
        };
        let (alive, ended) = channel();
        let ranks = &members.ranks;
        let hangs = members.error(
            rank,
            format!(
                "waited {} s in the driver for the GPUs of ranks {ranks:?}: one of them or its rank \
                 hangs; look at what that rank said last",
                timeout.as_secs_f32()
            ),
        );
        let (watched, told) = (clock.clone(), health.clone());
        let watch = move || {
            if watched.overrun(timeout, &ended) {
                told.fail(hangs);
            }
        };
        let thread = Builder::new().name(format!("calls-{rank}")).spawn(watch);
        thread.map_err(|e| {
            let what = format!("cannot start a thread that watches over exchanges: {e}");
            health.fail(members.error(rank, what))
        })?;
        Ok(Self {
            clock,
            _alive: alive,
        })
    }

    /// A call that begins now.
    pub(super) fn enter(&self) -> Call {
        let now = self.clock.zero.elapsed().as_nanos() as u64 + 1;
        let began = &self.clock.began;
        let is_first = began.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
        Call(is_first.is_ok().then(|| self.clock.clone()))
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if let Some(clock) = &self.0 {
            clock.began.store(0, Ordering::Relaxed);
        }
    }
}

impl Clock {
    /// Waits for a call that takes longer than `timeout`: true; or for the end of `ended`.
    fn overrun(&self, timeout: Duration, ended: &Receiver<()>) -> bool {
        // A call that begins while this sleeps is younger than the sleep.
        let mut sleep = timeout;
        while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(sleep) {
            sleep = match self.began.load(Ordering::Relaxed) {
                0 => timeout,
                began => {
                    let began = Duration::from_nanos(began - 1);
                    let age = self.zero.elapsed().saturating_sub(began);
                    match timeout.checked_sub(age) {
                        None | Some(Duration::ZERO) => return true,
                        Some(left) => left,
                    }
                }
            };
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Longer than any test.
    const LONG: Duration = Duration::from_secs(600);

    fn calls(timeout: Duration, health: &Health) -> Calls {
        let members = Members::new(vec![1, 3], 4);
        Calls::new(1, &members, timeout, health).unwrap()
    }

    #[test]
    fn who_stays_in_a_call_is_a_failure_that_names_who_waits() {
        let health = Health::default();
        let calls = calls(Duration::from_millis(50), &health);
        let (tell, told) = channel();
        health.on_failure(move |failure| tell.send(failure.clone()).unwrap());
        let call = calls.enter();
        // What is called within a call does not end it.
        drop(calls.enter());
        let failure = told.recv_timeout(LONG).unwrap();
        drop(call);
        assert_eq!((failure.rank, failure.world_size), (3, 4));
        let what = "waited 0.05 s in the driver for the GPUs of ranks [1, 3]: ";
        assert!(failure.what.starts_with(what), "{failure}");
        assert_eq!(health.failure(), Some(failure));
    }

    #[test]
    fn calls_that_end_are_none() {
        let health = Health::default();
        let calls = calls(LONG, &health);
        let began = || calls.clock.began.load(Ordering::Relaxed);
        for _ in 0..3 {
            assert_eq!(began(), 0);
            let call = calls.enter();
            let at = began();
            assert_ne!(at, 0);
            drop(calls.enter());
            assert_eq!(began(), at);
            drop(call);
        }
        assert_eq!((began(), health.failure()), (0, None));
    }

    #[test]
    fn a_watch_outlives_many_short_calls_and_ends_with_its_group() {
        let clock = Clock {
            zero: Instant::now(),
            began: Arc::default(),
        };
        let (alive, ended) = channel();
        let watched = clock.clone();
        let watch = move || watched.overrun(Duration::from_millis(1), &ended);
        let watch = std::thread::spawn(watch);
        // Looks many times meanwhile, and finds no call.
        std::thread::sleep(Duration::from_millis(20));
        assert!(!watch.is_finished());
        drop(alive);
        assert!(!watch.join().unwrap());
    }
}
