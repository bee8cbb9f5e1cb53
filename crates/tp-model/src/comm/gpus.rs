//! Connecting the GPUs of this process.

use std::time::Duration;

use super::{Collective, CommError, Health, Nccl, OneShot};

/// The ranks of a group of threads of this process, in order: rank `r` has GPU `devices[r]`.
///
/// Through NCCL; with `custom_all_reduce` short sums go through [`OneShot`]. A GPU that several ranks
/// share is for tests: NCCL takes no such group, so everything goes through [`OneShot`].
pub fn connect_gpus(
    devices: &[usize],
    custom_all_reduce: bool,
    timeout: Duration,
    health: &Health,
) -> Result<Vec<Box<dyn Collective>>, CommError> {
    let shared = (1..devices.len()).any(|at| devices[..at].contains(&devices[at]));
    let one_shot = |custom: bool| match custom && devices.len() > 1 {
        true => OneShot::group(devices, timeout, health),
        false => Ok(Vec::new()),
    };
    if shared {
        let ranks = one_shot(true)?.into_iter();
        return Ok(ranks.map(|rank| Box::new(rank) as _).collect());
    }
    let short = one_shot(custom_all_reduce)?;
    let long = Nccl::local_group(devices, health)?;
    if short.is_empty() {
        return Ok(long.into_iter().map(|rank| Box::new(rank) as _).collect());
    }
    let ranks = short.into_iter().zip(long);
    let ranks = ranks.map(|(short, long)| Box::new(short.with_nccl(long)) as _);
    Ok(ranks.collect())
}
