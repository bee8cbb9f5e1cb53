//! Rank 0's way to lead the others.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::Duration;
#[cfg(any(feature = "cuda", test))]
use std::time::Instant;

#[cfg(any(feature = "cuda", test))]
use super::follow::{BUSY, REST};
use super::outputs::Outputs;
use super::world::World;
use crate::comm::{CommError, Health};
use crate::error::RunnerError;
use crate::parallel::ParallelConfig;
use crate::runner::RunnerConfig;

/// The ranks that rank 0 leads.
#[derive(Debug)]
pub struct Followers {
    pub(super) kind: Kind,
    /// Where outputs come from, if one of them samples.
    pub(super) outputs: Option<Outputs>,
}

#[derive(Debug)]
pub(super) enum Kind {
    Threads {
        lines: Vec<Sender<Arc<[u8]>>>,
        threads: Vec<JoinHandle<()>>,
        health: Health,
        world_size: usize,
        timeout: Duration,
    },
    Processes(World),
}

impl Followers {
    /// The other processes of a group, whose runners get the sizes of rank 0's. Waits until they
    /// have loaded the model.
    pub fn processes(
        world: &World,
        parallel: &ParallelConfig,
        config: &RunnerConfig,
    ) -> Result<Self, CommError> {
        world.configure(config)?;
        Ok(Self {
            outputs: world.outputs(parallel)?,
            kind: Kind::Processes(world.clone()),
        })
    }

    /// The first failure of the group, and a way to hear of it.
    pub fn health(&self) -> &Health {
        match &self.kind {
            Kind::Threads { health, .. } => health,
            Kind::Processes(world) => world.health(),
        }
    }

    /// How long a rank may keep the others waiting.
    pub fn timeout(&self) -> Duration {
        match &self.kind {
            Kind::Threads { timeout, .. } => *timeout,
            Kind::Processes(world) => world.timeout(),
        }
    }

    /// Gives all of them a step to take part in.
    pub(crate) fn send(&self, step: Vec<u8>) -> Result<(), CommError> {
        match &self.kind {
            Kind::Processes(world) => world.send_step(&step),
            Kind::Threads { lines, health, .. } => {
                let step: Arc<[u8]> = step.into();
                for (line, rank) in lines.iter().zip(1..) {
                    if line.send(step.clone()).is_err() {
                        return Err(health.fail(self.error(rank, "has ended".to_owned())));
                    }
                }
                Ok(())
            }
        }
    }

    /// Where the outputs of steps come from, if one of these ranks samples.
    pub(crate) fn outputs(&self) -> Option<&Outputs> {
        self.outputs.as_ref()
    }

    /// Waits until a step of the GPUs is done, an eighth longer than ranks may keep each other waiting:
    /// a kernel that waits for a late rank says which, if it gives up first. Fails with the group's
    /// first failure as soon as there is one.
    #[cfg(any(feature = "cuda", test))]
    pub(crate) fn wait_for_gpus(
        &self,
        mut done: impl FnMut() -> Result<bool, String>,
    ) -> Result<(), CommError> {
        let start = Instant::now();
        let patience = self.timeout() + self.timeout() / 8;
        while !done().map_err(|what| self.error(0, what))? {
            self.health().check()?;
            match start.elapsed() {
                waited if waited > patience => {
                    let what = format!(
                        "the GPUs have not finished a step within {} s: one of them or its rank hangs",
                        patience.as_secs_f32()
                    );
                    return Err(self.error(0, what));
                }
                waited if waited > BUSY => std::thread::sleep(REST),
                _ => std::thread::yield_now(),
            }
        }
        Ok(())
    }

    /// Makes an error of rank 0 in a step the group's; returns the group's first one, which every rank
    /// reports.
    pub(crate) fn failed(&self, step: u64, error: RunnerError) -> RunnerError {
        let own = match error {
            RunnerError::Comm { source, .. } => source,
            own => self.error(0, own.to_string()),
        };
        let source = self.health().fail(own);
        RunnerError::Comm { step, source }
    }

    /// Tells the group that rank 0 cannot go on.
    pub(crate) fn fail(&self, what: String) {
        self.health().fail(self.error(0, what));
    }

    fn error(&self, rank: usize, what: String) -> CommError {
        let world_size = match &self.kind {
            Kind::Threads { world_size, .. } => *world_size,
            Kind::Processes(world) => world.world_size(),
        };
        CommError {
            rank,
            world_size,
            what,
        }
    }
}

impl Drop for Followers {
    fn drop(&mut self) {
        if let Kind::Threads {
            lines,
            threads,
            health,
            ..
        } = &mut self.kind
        {
            health.close();
            // Without a line a thread ends, unless it hangs: that one is left behind.
            lines.clear();
            let healthy = health.failure().is_none();
            for thread in threads.drain(..).filter(|_| healthy) {
                let _ = thread.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn followers(timeout: Duration) -> Followers {
        Followers {
            kind: Kind::Threads {
                lines: Vec::new(),
                threads: Vec::new(),
                health: Health::default(),
                world_size: 3,
                timeout,
            },
            outputs: None,
        }
    }

    #[test]
    fn a_gpu_is_waited_for_until_it_is_done() {
        let mut looks = 0;
        let done = followers(Duration::from_secs(600)).wait_for_gpus(|| {
            looks += 1;
            Ok(looks == 4)
        });
        assert_eq!((done, looks), (Ok(()), 4));
    }

    #[test]
    fn a_gpu_that_is_never_done_is_an_error() {
        let error = followers(Duration::from_millis(40)).wait_for_gpus(|| Ok(false));
        let what = "rank 0 of 3: the GPUs have not finished a step within 0.045 s: one of them or its \
                    rank hangs";
        assert_eq!(error.unwrap_err().to_string(), what);
        let error = followers(Duration::ZERO).wait_for_gpus(|| Err("no driver".to_owned()));
        assert_eq!(error.unwrap_err().to_string(), "rank 0 of 3: no driver");
    }

    #[test]
    fn another_ranks_failure_ends_the_wait_for_a_gpu() {
        let followers = followers(Duration::from_secs(600));
        let dead = followers.error(2, "its connection closed".to_owned());
        let health = followers.health().clone();
        let error = followers.wait_for_gpus(|| {
            health.fail(dead.clone());
            Ok(false)
        });
        assert_eq!(error, Err(dead));
    }

    #[test]
    fn the_first_failure_is_what_all_report() {
        let followers = followers(Duration::from_secs(600));
        let own = RunnerError::Device {
            step: 7,
            what: "gone".to_owned(),
        };
        let error = followers.failed(7, own).to_string();
        assert_eq!(error, "rank 0 of 3: step 7: libtorch: gone");
        let later = RunnerError::Comm {
            step: 8,
            source: followers.error(1, "has ended".to_owned()),
        };
        assert_eq!(followers.failed(8, later).to_string(), error);
    }
}
