//! One model on several ranks: who loads what, and what this process does in the group.

use std::path::Path;

use tp_model::comm::CommError;
use tp_model::distributed::{self, Followers, LocalRanks, World};
use tp_model::{LoadOptions, Model, Runner, RunnerConfig};

use crate::builder::{BuildError, Progress, load_options, resolve_model};
use crate::config::{ConfigError, EngineConfig};

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
            let model = load_share(world, dir, options)?;
            return Ok((model, Ranks::Processes(world.clone())));
        }
        if config.tensor_parallel_size == 1 {
            return Ok((Model::load(dir, options)?, Ranks::Solo));
        }
        if options.device != tch::Device::Cpu {
            return Err(ConfigError::new(
                "tensor_parallel_size",
                "several ranks run on the CPU only in this version; use 1, or --cpu",
            )
            .into());
        }
        let (size, timeout) = (config.tensor_parallel_size, config.distributed_timeout);
        let (model, ranks) = LocalRanks::load(dir, options, size, timeout)?;
        Ok((model, Ranks::Threads(ranks)))
    }

    /// How many ranks share this machine's memory.
    pub(crate) fn on_this_machine(&self, config: &EngineConfig) -> usize {
        match self {
            Ranks::Solo => 1,
            Ranks::Threads(_) => config.tensor_parallel_size,
            Ranks::Processes(world) => world.launcher().local_world_size,
        }
    }

    /// Starts the other ranks, and makes the runner that leads them.
    pub(crate) fn runner(self, model: Model, sizes: &RunnerConfig) -> Result<Runner, BuildError> {
        let followers = match self {
            Ranks::Solo => return Ok(Runner::new(model, sizes)?),
            Ranks::Threads(ranks) => ranks.start(sizes)?,
            Ranks::Processes(world) => Followers::processes(&world, sizes)?,
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
        let model = load_share(world, dir.as_ref(), &load_options(config, progress)?)?;
        drop(dir);
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

fn load_share(world: &World, dir: &Path, options: &LoadOptions<'_>) -> Result<Model, BuildError> {
    if options.device != tch::Device::Cpu {
        return Err(ConfigError::new(
            "device",
            "several ranks run on the CPU only in this version; use --cpu",
        )
        .into());
    }
    world.agree(dir, options)?;
    let comm = Box::new(world.collective()?);
    Ok(Model::load_shard(dir, options, comm)?)
}

impl From<CommError> for BuildError {
    fn from(error: CommError) -> Self {
        tp_model::ModelError::from(error).into()
    }
}
