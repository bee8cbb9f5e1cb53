//! One model on several ranks: who loads what, and what this process does in the group.

use std::path::Path;

use tp_model::comm::CommError;
use tp_model::distributed::{self, Followers, LocalRanks, World};
use tp_model::{LoadOptions, Model, ModelConfig, Runner, RunnerConfig};

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
        if options.device != tch::Device::Cpu {
            let option = match config.pipeline_parallel_size {
                1 => "tensor_parallel_size",
                _ => "pipeline_parallel_size",
            };
            let what = "several ranks run on the CPU only in this version; use 1, or --cpu";
            return Err(ConfigError::new(option, what).into());
        }
        let timeout = config.distributed_timeout;
        let (model, ranks) = LocalRanks::load(dir, options, &parallel, timeout)?;
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
    if options.device != tch::Device::Cpu {
        return Err(ConfigError::new(
            "device",
            "several ranks run on the CPU only in this version; use --cpu",
        )
        .into());
    }
    let parallel = config.parallel();
    world.agree(dir, options, &parallel)?;
    let partition = parallel.partition(ModelConfig::from_dir(dir)?.num_layers)?;
    let groups = world.groups(&parallel)?;
    Ok(Model::load_stage(dir, options, groups, partition)?)
}

impl From<CommError> for BuildError {
    fn from(error: CommError) -> Self {
        tp_model::ModelError::from(error).into()
    }
}
