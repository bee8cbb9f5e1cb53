//! Where rank 0 gets the outputs of steps that another rank samples.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::comm::{CommError, Health, patience};
use crate::parallel::ParallelConfig;

/// Where the sampling rank puts the output of a step, as bytes.
pub(super) type OutputLine = Sender<Result<Vec<u8>, CommError>>;

/// Rank 0's end.
#[derive(Debug)]
pub(crate) struct Outputs {
    line: Receiver<Result<Vec<u8>, CommError>>,
    health: Health,
    patience: Duration,
    rank: usize,
    world_size: usize,
}

impl Outputs {
    /// Both ends.
    pub(super) fn new(
        parallel: &ParallelConfig,
        timeout: Duration,
        health: &Health,
    ) -> (OutputLine, Self) {
        let (sender, line) = channel();
        let news = sender.clone();
        health.on_failure(move |failure| {
            // If nobody waits any more, nobody need know.
            let _ = news.send(Err(failure.clone()));
        });
        let outputs = Self {
            line,
            health: health.clone(),
            // Every stage before loses patience first.
            patience: patience(timeout, parallel.pipeline_parallel_size),
            rank: parallel.sampling_rank(),
            world_size: parallel.world_size(),
        };
        (sender, outputs)
    }

    /// The next step's output; fails with the first failure of any rank. Looks for it for `busy`
    /// without rest: to be woken takes a while, in which a GPU could have begun the next step.
    pub(crate) fn next(&self, busy: Duration) -> Result<Vec<u8>, CommError> {
        let start = Instant::now();
        while start.elapsed() < busy {
            match self.line.try_recv() {
                Ok(output) => return output,
                Err(TryRecvError::Empty) => thread::yield_now(),
                Err(TryRecvError::Disconnected) => break,
            }
        }
        let what = match self.line.recv_timeout(self.patience) {
            Ok(output) => return output,
            Err(RecvTimeoutError::Timeout) => {
                format!("sent nothing for {} s", self.patience.as_secs_f32())
            }
            Err(RecvTimeoutError::Disconnected) => "has ended".to_owned(),
        };
        Err(self.health.fail(CommError {
            rank: self.rank,
            world_size: self.world_size,
            what,
        }))
    }
}
