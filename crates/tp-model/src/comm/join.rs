//! Waiting for others to join a group, but not for ever.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

use super::{CommError, Health, Members};

/// How long a failure of the group may go unnoticed.
const LOOK: Duration = Duration::from_millis(20);

/// What `join` returns for the group's rank `rank`; an error that names it if that takes longer than
/// `timeout`, and the group's first failure as soon as there is one. An error of `join` is told to
/// the group.
///
/// `join` runs on a thread of its own, which is left behind if it does not come back: what it returns
/// then is dropped. NCCL has a way to join without blocking, but not for this: a communicator that is
/// made so starts a thread for each exchange later on.
pub(super) fn join_within<T: Send + 'static>(
    rank: usize,
    members: &Members,
    timeout: Duration,
    health: &Health,
    join: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, CommError> {
    let failed = |what: String| health.fail(members.error(rank, what));
    let (tell, joined) = channel();
    let work = move || {
        // Nobody listens once the time is over.
        let _ = tell.send(join());
    };
    let thread = Builder::new().name(format!("join-{rank}")).spawn(work);
    thread.map_err(|e| failed(format!("cannot start a thread that joins a group: {e}")))?;
    let start = Instant::now();
    loop {
        let left = timeout.saturating_sub(start.elapsed());
        match joined.recv_timeout(left.min(LOOK)) {
            Ok(joined) => return joined.map_err(failed),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(failed("panicked while it joined a group".to_owned()));
            }
            Err(RecvTimeoutError::Timeout) => health.check()?,
        }
        if left.is_zero() {
            let (ranks, waited) = (&members.ranks, timeout.as_secs_f32());
            return Err(failed(format!(
                "waited {waited} s for the GPUs of ranks {ranks:?} to join a group: one of them did not \
                 come or hangs; look at what that rank said last"
            )));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn join<T: Send + 'static>(
        timeout: Duration,
        health: &Health,
        join: impl FnOnce() -> Result<T, String> + Send + 'static,
    ) -> Result<T, CommError> {
        let members = Members::new(vec![1, 3], 4);
        join_within(1, &members, timeout, health, join)
    }

    /// Longer than any test.
    const LONG: Duration = Duration::from_secs(600);

    #[test]
    fn who_joins_is_there() {
        let health = Health::default();
        assert_eq!(join(LONG, &health, || Ok(7)), Ok(7));
        assert_eq!(health.failure(), None);
    }

    #[test]
    fn who_never_comes_is_a_failure_that_names_who_waited() {
        let health = Health::default();
        let (open, never) = channel::<()>();
        let time = Duration::from_millis(50);
        let result = join(time, &health, move || {
            never.recv().map_err(|e| e.to_string())
        });
        let error = result.unwrap_err();
        assert_eq!((error.rank, error.world_size), (3, 4));
        let what = "waited 0.05 s for the GPUs of ranks [1, 3] to join";
        assert!(error.what.starts_with(what), "{error}");
        assert_eq!(health.failure(), Some(error));
        drop(open);
    }

    #[test]
    fn another_ranks_failure_ends_the_wait() {
        let health = Health::default();
        let dead = CommError {
            rank: 0,
            world_size: 4,
            what: "its connection closed".to_owned(),
        };
        let (open, never) = channel::<()>();
        let (told, first) = (health.clone(), dead.clone());
        let result = join(LONG, &health, move || {
            told.fail(first);
            never.recv().map_err(|e| e.to_string())
        });
        assert_eq!(result, Err(dead));
        drop(open);
    }

    #[test]
    fn what_cannot_join_says_why() {
        let health = Health::default();
        let error = join::<()>(LONG, &health, || Err("no such device".to_owned())).unwrap_err();
        assert_eq!(error.to_string(), "rank 3 of 4: no such device");
        assert_eq!(health.failure(), Some(error));
        let panics = || -> Result<(), String> { panic!("in the driver") };
        let error = join(LONG, &Health::default(), panics).unwrap_err();
        assert_eq!(error.what, "panicked while it joined a group");
    }
}
