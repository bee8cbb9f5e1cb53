//! Connecting the GPUs of this process.

use std::time::Duration;

use super::{Collective, CommError, Handoff, Health, Members, Nccl, OneShot, Solo};
use crate::parallel::{ParallelConfig, ParallelGroups};

/// The ranks of a group of threads of this process, in order: rank `r` has GPU `devices[r]`.
///
/// Through NCCL; with `custom_all_reduce` short sums go through [`OneShot`], if the GPUs can read each
/// other's memory. A GPU that several ranks
/// share is for tests: NCCL takes no such group, so everything goes through [`OneShot`].
pub fn connect_gpus(
    devices: &[usize],
    members: &Members,
    custom_all_reduce: bool,
    timeout: Duration,
    health: &Health,
) -> Result<Vec<Box<dyn Collective>>, CommError> {
    let one_shot = |custom: bool| match custom && devices.len() > 1 {
        true => OneShot::group(devices, members, timeout, health),
        false => Ok(Vec::new()),
    };
    if shared(devices) {
        let ranks = one_shot(true)?.into_iter();
        return Ok(ranks.map(|rank| Box::new(rank) as _).collect());
    }
    let short = one_shot(custom_all_reduce).unwrap_or_else(|error| {
        tracing::warn!(%error, "short sums go through NCCL, too");
        Vec::new()
    });
    let long = Nccl::local_group(devices, members, timeout, health)?;
    if short.is_empty() {
        return Ok(long.into_iter().map(|rank| Box::new(rank) as _).collect());
    }
    let ranks = short.into_iter().zip(long);
    let ranks = ranks.map(|(short, long)| Box::new(short.with_nccl(long)) as _);
    Ok(ranks.collect())
}

/// The groups of all ranks of a divided model, in order, as threads of this process: rank `r` has
/// GPU `devices[r]`. Stages are connected as [`connect_gpus`] says, with each other through NCCL, or,
/// where GPUs are shared, through [`Handoff`].
pub fn connect_stages(
    parallel: &ParallelConfig,
    devices: &[usize],
    custom_all_reduce: bool,
    timeout: Duration,
    health: &Health,
) -> Result<Vec<ParallelGroups>, CommError> {
    let (tp, pp) = (
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
    );
    let world_size = parallel.world_size();
    let group = |ranks: Vec<usize>| {
        let devices: Vec<usize> = ranks.iter().map(|rank| devices[*rank]).collect();
        (devices, Members::new(ranks, world_size))
    };
    let mut within = Vec::with_capacity(world_size);
    for stage in 0..pp {
        let (devices, members) = group(parallel.tp_members(stage * tp).0);
        match tp {
            1 if pp > 1 => within.push(Box::new(Solo) as _),
            _ => {
                let ranks = connect_gpus(&devices, &members, custom_all_reduce, timeout, health);
                within.extend(ranks?);
            }
        }
    }
    let mut between: Vec<Vec<Box<dyn Collective>>> = Vec::with_capacity(tp);
    for part in 0..tp {
        let (devices, members) = group(parallel.pp_members(part).0);
        between.push(match pp {
            1 => vec![Box::new(Solo)],
            _ if shared(&devices) => {
                let stages = Handoff::group(&devices, &members, timeout, health);
                stages
                    .into_iter()
                    .map(|stage| Box::new(stage) as _)
                    .collect()
            }
            _ => {
                let stages = Nccl::local_group(&devices, &members, timeout, health)?;
                stages
                    .into_iter()
                    .map(|stage| Box::new(stage) as _)
                    .collect()
            }
        });
    }
    let mut between: Vec<_> = between.into_iter().map(Vec::into_iter).collect();
    let ranks = within.into_iter().enumerate().map(|(rank, within)| {
        let next = between[rank % tp].next();
        ParallelGroups {
            tp: within,
            pp: next.expect("a group has a seat for each of its ranks"),
        }
    });
    Ok(ranks.collect())
}

fn shared(devices: &[usize]) -> bool {
    (1..devices.len()).any(|at| devices[..at].contains(&devices[at]))
}
