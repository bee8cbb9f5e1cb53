//! The ranks that follow, and rank 0's way to lead them.

#[cfg(test)]
mod overlap_tests;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use torch_ext::cpu::{num_threads, set_num_threads};

use super::outputs::{OutputLine, Outputs};
use super::world::{Order, World};
use crate::comm::{CommError, Health, Threads};
use crate::config::ModelConfig;
use crate::error::{ModelError, RunnerError};
use crate::model::Model;
use crate::options::LoadOptions;
use crate::parallel::ParallelConfig;
use crate::runner::{HostRunner, RunnerConfig, panic_text};

/// The ranks that rank 0 leads.
#[derive(Debug)]
pub struct Followers {
    kind: Kind,
    /// Where outputs come from, if one of them samples.
    outputs: Option<Outputs>,
}

#[derive(Debug)]
enum Kind {
    Threads {
        lines: Vec<Sender<Arc<[u8]>>>,
        threads: Vec<JoinHandle<()>>,
        health: Health,
        world_size: usize,
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

/// A model divided among threads of this process, before they start.
#[derive(Debug)]
pub struct LocalRanks {
    models: Vec<Model>,
    parallel: ParallelConfig,
    timeout: Duration,
    health: Health,
}

impl LocalRanks {
    /// Loads all shares of a model, rank by rank; returns rank 0's and the rest. A rank that waits
    /// longer than `timeout` for another is a failure of the group.
    pub fn load(
        dir: &Path,
        options: &LoadOptions<'_>,
        parallel: &ParallelConfig,
        timeout: Duration,
    ) -> Result<(Model, Self), ModelError> {
        let partition = parallel.partition(ModelConfig::from_dir(dir)?.num_layers)?;
        let health = Health::default();
        let total = parallel.world_size() as u64;
        let mut models = Vec::with_capacity(parallel.world_size());
        for (rank, groups) in (0..).zip(Threads::grid(parallel, timeout, &health)) {
            let progress = |done: u64, of: u64| {
                if let Some(tell) = options.progress {
                    tell(rank * of + done, total * of);
                }
            };
            let options = LoadOptions {
                progress: Some(&progress),
                ..*options
            };
            let partition = partition.clone();
            models.push(Model::load_stage(dir, &options, groups, partition)?);
        }
        let leader = models.remove(0);
        let ranks = Self {
            models,
            parallel: parallel.clone(),
            timeout,
            health,
        };
        Ok((leader, ranks))
    }

    /// Bytes of the weights of these ranks, in order from rank 1 on.
    pub fn weight_bytes(&self) -> Vec<usize> {
        self.models.iter().map(Model::weight_bytes).collect()
    }

    /// Starts a thread for each rank. The processor's threads are shared out evenly, rank 0's
    /// among them.
    pub fn start(self, config: &RunnerConfig) -> Result<Followers, ModelError> {
        let world_size = self.models.len() + 1;
        let share = (num_threads() / world_size).max(1);
        set_num_threads(share);
        let (mut lines, mut threads) = (Vec::new(), Vec::new());
        let (mut output_line, outputs) = match self.parallel.sampling_rank() {
            0 => (None, None),
            _ => {
                let (line, outputs) = Outputs::new(&self.parallel, self.timeout, &self.health);
                (Some(line), Some(outputs))
            }
        };
        for (model, rank) in self.models.into_iter().zip(1..) {
            let mut runner = HostRunner::new(model, config)?;
            let (line, steps) = channel();
            let health = self.health.clone();
            let outputs = match rank == self.parallel.sampling_rank() {
                true => output_line.take(),
                false => None,
            };
            let work = move || {
                set_num_threads(share);
                let result = catch_unwind(AssertUnwindSafe(|| {
                    follow_line(&mut runner, &steps, outputs.as_ref())
                }));
                let what = match result {
                    Ok(Ok(())) => return,
                    Ok(Err(error)) => error.to_string(),
                    Err(panic) => panic_text(panic.as_ref()),
                };
                health.fail(CommError {
                    rank,
                    world_size,
                    what,
                });
            };
            let thread = Builder::new().name(format!("rank-{rank}")).spawn(work);
            threads.push(thread.map_err(|e| {
                ModelError::Options(format!("cannot start the thread of rank {rank}: {e}"))
            })?);
            lines.push(line);
        }
        Ok(Followers {
            outputs,
            kind: Kind::Threads {
                lines,
                threads,
                health: self.health,
                world_size,
            },
        })
    }
}

fn follow_line(
    runner: &mut HostRunner,
    steps: &Receiver<Arc<[u8]>>,
    outputs: Option<&OutputLine>,
) -> Result<(), RunnerError> {
    while let Ok(step) = steps.recv() {
        if let (Some(output), Some(line)) = (runner.follow(&step)?, outputs)
            && line.send(Ok(output)).is_err()
        {
            // Rank 0 is gone, and with it whoever would give orders.
            return Ok(());
        }
    }
    Ok(())
}

/// Runs this process's rank until rank 0 ends the work; returns the code to exit with. `model` is
/// this rank's share.
pub fn follow(world: &World, model: Model) -> Result<i32, CommError> {
    let mut model = Some(model);
    let mut runner = None;
    loop {
        match world.order()? {
            Order::Bye(code) => return Ok(code),
            Order::Configure(config) => {
                let Some(model) = model.take() else {
                    return Err(world.fail("was given sizes twice".to_owned()));
                };
                let made = HostRunner::new(model, &config);
                runner = Some(made.map_err(|e| world.fail(e.to_string()))?);
                world.ready()?;
            }
            Order::Step(step) => {
                let Some(runner) = &mut runner else {
                    return Err(world.fail("was given a step before its sizes".to_owned()));
                };
                let done = catch_unwind(AssertUnwindSafe(|| runner.follow(&step)));
                match done {
                    Ok(Ok(None)) => {}
                    Ok(Ok(Some(output))) => world.send_output(&output)?,
                    Ok(Err(RunnerError::Comm { source, .. })) => return Err(source),
                    Ok(Err(error)) => return Err(world.fail(error.to_string())),
                    Err(panic) => return Err(world.fail(panic_text(panic.as_ref()))),
                }
            }
        }
    }
}
