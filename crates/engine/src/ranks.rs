//! One model on several ranks: who loads what, and what this process does in the group.

use std::path::Path;

use tch::Device;
use torch_ext::cuda::Memory;
use tp_model::comm::CommError;
use tp_model::distributed::{self, Followers, LocalRanks, World};
use tp_model::{
    LoadOptions, Model, ModelConfig, ParallelConfig, ParallelGroups, Runner, RunnerConfig,
    WorkingMemory,
};

use crate::builder::{BuildError, Progress, load_options, resolve_model};
use crate::config::{ConfigError, EngineConfig};
use crate::memory::free_host_memory;

/// Where the other ranks are.
pub(crate) enum Ranks {
    /// There are none.
    Solo,
    /// In this process.
    Threads(LocalRanks),
    /// In processes of their own.
    Processes(World),
}

impl Ranks {
    /// Loads this process's share of the model: all of it, on as many ranks as the configuration
    /// asks for, unless there are processes for the others.
    pub(crate) fn load(
        config: &EngineConfig,
        dir: &Path,
        options: &LoadOptions<'_>,
    ) -> Result<(Model, Self), BuildError> {
        if let Some(world) = &config.world {
            let model = load_share(config, world, dir, options)?;
            return Ok((model, Ranks::Processes(world.clone())));
        }
        let parallel = config.parallel();
        if parallel.world_size() == 1 {
            // For its checks: there may be a partition.
            parallel.partition(ModelConfig::from_dir(dir)?.num_layers)?;
            return Ok((Model::load(dir, options)?, Ranks::Solo));
        }
        if options.device != Device::Cpu {
            return load_on_gpus(config, dir, options);
        }
        let timeout = config.distributed_timeout;
        let health = config.health.clone().unwrap_or_default();
        let (model, ranks) = LocalRanks::load(dir, options, &parallel, timeout, health)?;
        Ok((model, Ranks::Threads(ranks)))
    }

    /// How many ranks share this machine's memory.
    pub(crate) fn on_this_machine(&self, config: &EngineConfig) -> usize {
        match self {
            Ranks::Solo => 1,
            Ranks::Threads(_) => config.parallel().world_size(),
            Ranks::Processes(world) => world.launcher().local_world_size,
        }
    }

    /// What each rank's cache can have, in bytes: what the rank with the least can, if ranks are
    /// processes, which may be on several machines. Waits until all have loaded the model.
    pub(crate) fn free_memory(&self, config: &EngineConfig) -> Result<u64, BuildError> {
        let own = free_host_memory() / self.on_this_machine(config) as u64;
        Ok(match self {
            Ranks::Processes(world) => world.wait_loaded()?.into_iter().fold(own, u64::min),
            Ranks::Solo | Ranks::Threads(_) => own,
        })
    }

    /// As [`Runner::measure`], on all ranks: rank 0's model, what each rank measured, and how many
    /// of them share its GPU.
    pub(crate) fn measure(
        &mut self,
        config: &EngineConfig,
        model: Model,
        device: usize,
        sizes: &RunnerConfig,
    ) -> Result<(Model, Vec<Measured>), BuildError> {
        match self {
            Ranks::Solo => {
                let (model, memory, work) = Runner::measure(model, device, sizes)?;
                Ok((model, vec![Measured::new(memory, work, 1)]))
            }
            Ranks::Threads(ranks) => {
                let (model, figures) = ranks.measure(model, sizes)?;
                let devices = devices_of(config);
                let sharing = |device: &usize| devices.iter().filter(|d| *d == device).count();
                let figures = figures.into_iter().zip(devices.iter().map(sharing));
                let figures = figures.map(|((memory, work), n)| Measured::new(memory, work, n));
                Ok((model, figures.collect()))
            }
            Ranks::Processes(world) => {
                // All have loaded the model by then.
                world.wait_loaded()?;
                world.measure(sizes)?;
                let (model, memory, work) = Runner::measure(model, device, sizes)?;
                let others = world.wait_measured()?;
                let figures = std::iter::once((memory, work)).chain(others);
                let figures = figures.map(|(memory, work)| Measured::new(memory, work, 1));
                Ok((model, figures.collect()))
            }
        }
    }

    /// Starts the other ranks, and makes the runner that leads them.
    pub(crate) fn runner(
        self,
        config: &EngineConfig,
        model: Model,
        sizes: &RunnerConfig,
    ) -> Result<Runner, BuildError> {
        let followers = match self {
            Ranks::Solo => return Ok(Runner::new(model, sizes)?),
            Ranks::Threads(ranks) => ranks.start(sizes)?,
            Ranks::Processes(world) => Followers::processes(&world, &config.parallel(), sizes)?,
        };
        Ok(Runner::with_followers(model, sizes, followers)?)
    }
}

/// What a rank found its GPU to have.
pub(crate) struct Measured {
    pub(crate) total: u64,
    pub(crate) free: u64,
    /// Needed beside the cache.
    pub(crate) work: WorkingMemory,
}

impl Measured {
    /// A rank's part of a GPU that `ranks` share.
    fn new(memory: Memory, work: WorkingMemory, ranks: usize) -> Self {
        let ranks = ranks as u64;
        Self {
            total: memory.total / ranks,
            free: memory.free / ranks,
            work,
        }
    }
}

/// Which GPU each rank has, if ranks are threads.
fn devices_of(config: &EngineConfig) -> Vec<usize> {
    let ranks = config.parallel().world_size();
    let given = config.device_ids.clone();
    given.unwrap_or_else(|| (0..ranks).collect())
}

/// Loads a share of the model on each GPU of this process.
fn load_on_gpus(
    config: &EngineConfig,
    dir: &Path,
    options: &LoadOptions<'_>,
) -> Result<(Model, Ranks), BuildError> {
    let ranks = config.parallel().world_size();
    let devices = devices_of(config);
    let count = torch_ext::cuda::device_count();
    if devices.len() != ranks {
        let what = format!("{devices:?} are not one GPU for each of {ranks} ranks");
        return Err(ConfigError::new("device_ids", what).into());
    }
    if let Some(missing) = devices.iter().find(|device| **device >= count) {
        let what = match config.device_ids {
            Some(_) => format!("there is no GPU {missing}: libtorch sees {count}"),
            None => format!(
                "{ranks} ranks need as many GPUs, but libtorch sees {count}; use at most {count}, \
                 or --cpu"
            ),
        };
        return Err(ConfigError::new("tensor_parallel_size", what).into());
    }
    load_ranks(config, dir, options, &devices)
}

#[cfg(feature = "cuda")]
fn load_ranks(
    config: &EngineConfig,
    dir: &Path,
    options: &LoadOptions<'_>,
    devices: &[usize],
) -> Result<(Model, Ranks), BuildError> {
    let parallel = config.parallel();
    // Other backends run on libtorch's default stream, where nothing of ours may wait.
    let ours = matches!(
        config.attention_backend,
        tp_model::Backend::Auto | tp_model::Backend::Cuda
    );
    let custom = config.custom_all_reduce && ours;
    let timeout = config.distributed_timeout;
    let health = config.health.clone().unwrap_or_default();
    let loaded =
        LocalRanks::load_on_gpus(dir, options, &parallel, devices, custom, timeout, health);
    let (model, ranks) = loaded?;
    Ok((model, Ranks::Threads(ranks)))
}

#[cfg(not(feature = "cuda"))]
fn load_ranks(
    _: &EngineConfig,
    _: &Path,
    _: &LoadOptions<'_>,
    _: &[usize],
) -> Result<(Model, Ranks), BuildError> {
    Err(ConfigError::new("device", "this build has no CUDA support; use --cpu").into())
}

/// Runs this process's rank, any but rank 0, of the group that `config.world` is; returns rank 0's
/// exit code. Failures are told to the group.
pub fn follow(config: &EngineConfig, progress: Option<Progress<'_>>) -> Result<i32, BuildError> {
    let dir = resolve_model(config).map_err(|error| tell(config, error))?;
    follow_in(config, dir, progress)
}

/// As [`follow`], with the checkpoint in `dir`, which is dropped once it is loaded.
pub(crate) fn follow_in(
    config: &EngineConfig,
    dir: impl AsRef<Path>,
    progress: Option<Progress<'_>>,
) -> Result<i32, BuildError> {
    let Some(world) = &config.world else {
        let what = "only a process among several can follow; start it with a launcher";
        return Err(ConfigError::new("tensor_parallel_size", what).into());
    };
    let follow = move || {
        config.validate()?;
        let options = load_options(config, progress)?;
        let model = load_share(config, world, dir.as_ref(), &options)?;
        drop(dir);
        world.loaded(free_host_memory() / world.launcher().local_world_size as u64)?;
        Ok(distributed::follow(world, model)?)
    };
    follow().map_err(|error| tell(config, error))
}

/// Makes an error of this process known to all of its group.
pub(crate) fn tell(config: &EngineConfig, error: BuildError) -> BuildError {
    match &config.world {
        // The first failure is what every rank reports.
        Some(world) => tp_model::ModelError::from(world.fail(error.to_string())).into(),
        None => error,
    }
}

fn load_share(
    config: &EngineConfig,
    world: &World,
    dir: &Path,
    options: &LoadOptions<'_>,
) -> Result<Model, BuildError> {
    let parallel = config.parallel();
    world.agree(dir, options, &parallel)?;
    let partition = parallel.partition(ModelConfig::from_dir(dir)?.num_layers)?;
    let (device, groups) = match options.device {
        Device::Cpu => (Device::Cpu, world.groups(&parallel)?),
        _ => {
            let local = world.launcher().local_rank;
            (Device::Cuda(local), gpu_groups(world, &parallel, local)?)
        }
    };
    let options = LoadOptions { device, ..*options };
    Ok(Model::load_stage(dir, &options, groups, partition)?)
}

/// Connects this process's GPU, the one of its number on this machine, to those of the others.
#[cfg(feature = "cuda")]
fn gpu_groups(
    world: &World,
    parallel: &ParallelConfig,
    local_rank: usize,
) -> Result<ParallelGroups, BuildError> {
    match torch_ext::cuda::device_count() {
        count if local_rank < count => {}
        count => {
            let what = format!(
                "LOCAL_RANK={local_rank}, but libtorch sees {count} GPUs on this machine; start at \
                 most as many ranks on it, and let each see all GPUs (CUDA_VISIBLE_DEVICES)"
            );
            return Err(ConfigError::new("tensor_parallel_size", what).into());
        }
    }
    Ok(world.gpu_groups(parallel, local_rank)?)
}

#[cfg(not(feature = "cuda"))]
fn gpu_groups(_: &World, _: &ParallelConfig, _: usize) -> Result<ParallelGroups, BuildError> {
    Err(ConfigError::new("device", "this build has no CUDA support; use --cpu").into())
}

impl From<CommError> for BuildError {
    fn from(error: CommError) -> Self {
        tp_model::ModelError::from(error).into()
    }
}
