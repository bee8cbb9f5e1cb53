//! Ranks that are threads of this process.

#[cfg(test)]
mod memory_tests;
#[cfg(test)]
mod overlap_tests;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::mpsc::channel;
use std::thread::{Builder, ScopedJoinHandle as JoinScoped};
use std::time::Duration;

use torch_ext::cpu::{num_threads, set_num_threads};
use torch_ext::cuda::Memory;

use super::follow::follow_line;
use super::followers::{Followers, Kind};
use super::outputs::Outputs;
use crate::comm::{CommError, Health, Threads};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::model::Model;
use crate::options::LoadOptions;
use crate::parallel::{ParallelConfig, ParallelGroups};
use crate::runner::{Runner, RunnerConfig, WorkingMemory, panic_text};

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
    /// longer than `timeout` for another is a failure of the group, which `health` hears of.
    pub fn load(
        dir: &Path,
        options: &LoadOptions<'_>,
        parallel: &ParallelConfig,
        timeout: Duration,
        health: Health,
    ) -> Result<(Model, Self), ModelError> {
        let groups = Threads::grid(parallel, timeout, &health).into_iter();
        let ranks = groups.map(|groups| (options.device, groups)).collect();
        Self::load_ranks(dir, options, parallel, timeout, health, ranks)
    }

    /// As [`LocalRanks::load`], on GPUs: rank `r` on `devices[r]`, connected as
    /// [`connect_stages`](crate::comm::connect_stages) says. A rank that hangs in the driver may keep
    /// the caller there: whoever must end all the same hears of it from `health`.
    #[cfg(feature = "cuda")]
    pub fn load_on_gpus(
        dir: &Path,
        options: &LoadOptions<'_>,
        parallel: &ParallelConfig,
        devices: &[usize],
        custom_all_reduce: bool,
        timeout: Duration,
        health: Health,
    ) -> Result<(Model, Self), ModelError> {
        if devices.len() != parallel.world_size() {
            return Err(ModelError::Options(format!(
                "{devices:?} are not one GPU for each of {} ranks",
                parallel.world_size()
            )));
        }
        // Before anything is connected.
        parallel.partition(ModelConfig::from_dir(dir)?.num_layers)?;
        let custom = custom_all_reduce;
        let groups = crate::comm::connect_stages(parallel, devices, custom, timeout, &health)?;
        let devices_of_ranks = devices.iter().map(|device| tch::Device::Cuda(*device));
        let ranks = devices_of_ranks.zip(groups).collect();
        let loaded = Self::load_ranks(dir, options, parallel, timeout, health, ranks)?;
        let shared = (1..devices.len()).any(|at| devices[..at].contains(&devices[at]));
        if loaded.0.kernels().is_none() && shared {
            // libtorch's own kernels run on the default stream, which ranks of a GPU have in common.
            return Err(ModelError::Options(
                "ranks that share a GPU need our own CUDA kernels: bfloat16 or float16, and backend \
                 auto or cuda"
                    .to_owned(),
            ));
        }
        Ok(loaded)
    }

    fn load_ranks(
        dir: &Path,
        options: &LoadOptions<'_>,
        parallel: &ParallelConfig,
        timeout: Duration,
        health: Health,
        ranks: Vec<(tch::Device, ParallelGroups)>,
    ) -> Result<(Model, Self), ModelError> {
        let partition = parallel.partition(ModelConfig::from_dir(dir)?.num_layers)?;
        let total = parallel.world_size() as u64;
        let mut models = Vec::with_capacity(parallel.world_size());
        for (rank, (device, groups)) in (0..).zip(ranks) {
            let progress = |done: u64, of: u64| {
                if let Some(tell) = options.progress {
                    tell(rank * of + done, total * of);
                }
            };
            let options = LoadOptions {
                device,
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

    /// As [`Runner::measure`], on all ranks at once, rank 0's `leader` among them: the largest steps
    /// take all of them. Returns rank 0's model, and what each rank measured.
    pub fn measure(
        &mut self,
        leader: Model,
        config: &RunnerConfig,
    ) -> Result<(Model, Vec<(Memory, WorkingMemory)>), ModelError> {
        let world_size = self.models.len() + 1;
        let models = std::iter::once(leader).chain(self.models.drain(..));
        let health = &self.health;
        let measure = |(rank, model): (usize, Model)| {
            let failed = |what: String| {
                ModelError::from(health.fail(CommError {
                    rank,
                    world_size,
                    what,
                }))
            };
            let measured = catch_unwind(AssertUnwindSafe(|| {
                let tch::Device::Cuda(device) = model.device() else {
                    let what = format!("{:?} has no memory of its own", model.device());
                    return Err(ModelError::Options(what));
                };
                Runner::measure(model, device, config)
            }));
            match measured {
                Ok(measured) => measured.map_err(|e| failed(e.to_string())),
                Err(panic) => Err(failed(panic_text(panic.as_ref()))),
            }
        };
        let measured: Vec<_> = std::thread::scope(|scope| {
            let measure = &measure;
            let start = |rank| scope.spawn(move || measure(rank));
            let threads: Vec<_> = models.enumerate().map(start).collect();
            threads.into_iter().map(JoinScoped::join).collect()
        });
        let mut figures = Vec::with_capacity(world_size);
        for measured in measured {
            let measured = measured
                .unwrap_or_else(|panic| Err(ModelError::Options(panic_text(panic.as_ref()))));
            let (model, memory, work) = measured?;
            self.models.push(model);
            figures.push((memory, work));
        }
        Ok((self.models.remove(0), figures))
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
            // GPUs exchange something while their runners are made: each on its own thread.
            let later = model.device() != tch::Device::Cpu;
            let made = match later {
                true => Err(model),
                false => Ok(Runner::new(model, config)?),
            };
            let config = *config;
            let (line, steps) = channel();
            let health = self.health.clone();
            let outputs = match rank == self.parallel.sampling_rank() {
                true => output_line.take(),
                false => None,
            };
            let work = move || {
                set_num_threads(share);
                let result = catch_unwind(AssertUnwindSafe(|| {
                    let mut runner = match made {
                        Ok(runner) => runner,
                        Err(model) => Runner::new(model, &config).map_err(|e| e.to_string())?,
                    };
                    let followed = follow_line(&mut runner, &steps, outputs.as_ref());
                    followed.map_err(|e| e.to_string())
                }));
                let what = match result {
                    Ok(Ok(())) => return,
                    Ok(Err(error)) => error,
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
                timeout: self.timeout,
            },
        })
    }
}
