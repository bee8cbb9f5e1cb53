//! The ranks that follow, and rank 0's way to lead them.

#[cfg(test)]
mod overlap_tests;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::{Builder, JoinHandle, ScopedJoinHandle as JoinScoped};
use std::time::{Duration, Instant};

use torch_ext::cpu::{num_threads, set_num_threads};
use torch_ext::cuda::Memory;

use super::outputs::{OutputLine, Outputs};
use super::world::{Order, World};
use crate::comm::{CommError, Health, Threads};
use crate::config::ModelConfig;
use crate::error::{ModelError, RunnerError};
use crate::model::Model;
use crate::options::LoadOptions;
use crate::parallel::{ParallelConfig, ParallelGroups};
use crate::runner::{Runner, RunnerConfig, WorkingMemory, panic_text};

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
        let health = Health::default();
        let groups = Threads::grid(parallel, timeout, &health).into_iter();
        let ranks = groups.map(|groups| (options.device, groups)).collect();
        Self::load_ranks(dir, options, parallel, timeout, health, ranks)
    }

    /// As [`LocalRanks::load`], on GPUs: rank `r` on `devices[r]`, connected as
    /// [`connect_stages`](crate::comm::connect_stages) says.
    #[cfg(feature = "cuda")]
    pub fn load_on_gpus(
        dir: &Path,
        options: &LoadOptions<'_>,
        parallel: &ParallelConfig,
        devices: &[usize],
        custom_all_reduce: bool,
        timeout: Duration,
    ) -> Result<(Model, Self), ModelError> {
        let health = Health::default();
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

fn follow_line(
    runner: &mut Runner,
    steps: &Receiver<Arc<[u8]>>,
    outputs: Option<&OutputLine>,
) -> Result<(), RunnerError> {
    while let Some(next) = next(steps, Some(runner))? {
        let output = match next {
            Next::Told(step) => runner.follow(&step)?,
            Next::Finished(output) => Some(output),
        };
        if let (Some(output), Some(line)) = (output, outputs)
            && line.send(Ok(output)).is_err()
        {
            // Rank 0 is gone, and with it whoever would give orders.
            return Ok(());
        }
    }
    Ok(())
}

/// What a follower does next.
enum Next<T> {
    /// What rank 0 says.
    Told(T),
    /// Give rank 0 the output of an earlier step, which a GPU has finished.
    Finished(Vec<u8>),
}

/// How long a follower looks for both without rest.
const BUSY: Duration = Duration::from_millis(20);
const REST: Duration = Duration::from_micros(50);

/// The next word of rank 0, or the next output that `runner` owes it, whichever comes first; `None`
/// once rank 0 says no more.
fn next<T>(
    told: &Receiver<T>,
    mut runner: Option<&mut Runner>,
) -> Result<Option<Next<T>>, RunnerError> {
    let start = Instant::now();
    loop {
        let Some(runner) = runner.as_mut().filter(|runner| runner.owes()) else {
            return Ok(told.recv().ok().map(Next::Told));
        };
        match told.try_recv() {
            Ok(word) => return Ok(Some(Next::Told(word))),
            Err(TryRecvError::Disconnected) => return Ok(None),
            Err(TryRecvError::Empty) => {}
        }
        if let Some(output) = runner.finished()? {
            return Ok(Some(Next::Finished(output)));
        }
        match start.elapsed() > BUSY {
            true => std::thread::sleep(REST),
            false => std::thread::yield_now(),
        }
    }
}

/// Runs this process's rank until rank 0 ends the work; returns the code to exit with. `model` is
/// this rank's share.
pub fn follow(world: &World, model: Model) -> Result<i32, CommError> {
    let mut model = Some(model);
    let mut runner: Option<Runner> = None;
    let orders = world.orders()?;
    let failed = |error: RunnerError| match error {
        RunnerError::Comm { source, .. } => source,
        error => world.fail(error.to_string()),
    };
    loop {
        let order = match next(&orders, runner.as_mut()).map_err(failed)? {
            Some(Next::Told(order)) => order?,
            Some(Next::Finished(output)) => {
                world.send_output(&output)?;
                continue;
            }
            None => return Err(world.fail("hears nothing of rank 0 any more".to_owned())),
        };
        match order {
            Order::Bye(code) => return Ok(code),
            Order::Configure(config) => {
                let Some(model) = model.take() else {
                    return Err(world.fail("was given sizes twice".to_owned()));
                };
                // Rank 0 makes its own meanwhile, and GPUs exchange something in doing so.
                let on_cpu = model.device() == tch::Device::Cpu;
                if !on_cpu {
                    world.ready()?;
                }
                let made = Runner::new(model, &config);
                runner = Some(made.map_err(|e| world.fail(e.to_string()))?);
                if on_cpu {
                    world.ready()?;
                }
            }
            Order::Measure(config) => {
                let loaded = model.take();
                let device = loaded.as_ref().map(Model::device);
                let (Some(loaded), Some(tch::Device::Cuda(device))) = (loaded, device) else {
                    return Err(world.fail("was asked for the memory of a GPU".to_owned()));
                };
                let measured = Runner::measure(loaded, device, &config);
                let (loaded, memory, work) = measured.map_err(|e| world.fail(e.to_string()))?;
                model = Some(loaded);
                world.measured(memory, work)?;
            }
            Order::Step(step) => {
                let Some(runner) = &mut runner else {
                    return Err(world.fail("was given a step before its sizes".to_owned()));
                };
                let done = catch_unwind(AssertUnwindSafe(|| runner.follow(&step)));
                match done {
                    Ok(Ok(None)) => {}
                    Ok(Ok(Some(output))) => world.send_output(&output)?,
                    Ok(Err(error)) => return Err(failed(error)),
                    Err(panic) => return Err(world.fail(panic_text(panic.as_ref()))),
                }
            }
        }
    }
}
