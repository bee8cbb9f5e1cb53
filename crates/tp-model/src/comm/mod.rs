//! Communication between the ranks of a tensor-parallel model.

#[cfg(any(feature = "cuda", test))]
mod calls;
#[cfg(feature = "cuda")]
mod gpus;
#[cfg(feature = "cuda")]
mod handoff;
mod health;
#[cfg(any(feature = "cuda", test))]
mod join;
#[cfg(feature = "cuda")]
mod nccl;
#[cfg(feature = "cuda")]
mod one_shot;
mod solo;
mod tcp;
mod threads;

use std::time::Duration;

#[cfg(feature = "cuda")]
pub use calls::Call;
#[cfg(feature = "cuda")]
pub use gpus::{connect_gpus, connect_stages};
#[cfg(feature = "cuda")]
pub use handoff::Handoff;
pub use health::Health;
#[cfg(feature = "cuda")]
pub use nccl::Nccl;
#[cfg(feature = "cuda")]
pub use one_shot::OneShot;
pub use solo::Solo;
use tch::Tensor;
pub use tcp::Tcp;
pub(crate) use tcp::{Peers, explain};
pub use threads::Threads;

/// A failed exchange: a peer is gone or the transport broke. It ends the step and the engine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rank {rank} of {world_size}: {what}")]
pub struct CommError {
    /// The rank at fault.
    pub rank: usize,
    /// How many ranks there are.
    pub world_size: usize,
    /// What failed.
    pub what: String,
}

/// Who the ranks of a group are among all ranks: for errors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Members {
    ranks: Vec<usize>,
    world_size: usize,
}

impl Members {
    /// These of `world_size` ranks, in the group's order.
    pub fn new(ranks: Vec<usize>, world_size: usize) -> Self {
        Self { ranks, world_size }
    }

    /// All of `world_size` ranks.
    pub fn all(world_size: usize) -> Self {
        Self::new((0..world_size).collect(), world_size)
    }

    /// An error of the group's rank `member`.
    fn error(&self, member: usize, what: String) -> CommError {
        CommError {
            rank: self.ranks.get(member).copied().unwrap_or(member),
            world_size: self.world_size,
            what,
        }
    }
}

/// Collective operations on tensors of one device. All ranks call the same operations in the
/// same order; shapes and dtypes agree between ranks.
pub trait Collective: Send + std::fmt::Debug {
    /// This rank, `0..world_size`.
    fn rank(&self) -> usize;

    /// How many ranks take part.
    fn world_size(&self) -> usize;

    /// The sum over ranks, element by element.
    fn all_reduce_sum(&self, tensor: Tensor) -> Result<Tensor, CommError>;

    /// `residual += ` the sum over ranks of `x`, then the RMS norm of that times `weight`, where one
    /// kernel does all of it; `None`, with nothing done, where none does. All of `[tokens, width]`,
    /// `weight` `[width]`.
    fn all_reduce_norm(
        &self,
        x: &Tensor,
        residual: &mut Tensor,
        weight: &Tensor,
        eps: f64,
    ) -> Result<Option<Tensor>, CommError> {
        let _ = (x, residual, weight, eps);
        Ok(None)
    }

    /// All ranks' tensors, concatenated along the last dimension in rank order.
    fn all_gather(&self, tensor: Tensor) -> Result<Tensor, CommError>;

    /// As [`Collective::all_gather`], on rank `root` alone; the others get `None`.
    fn gather(&self, tensor: Tensor, root: usize) -> Result<Option<Tensor>, CommError> {
        let all = self.all_gather(tensor)?;
        Ok((self.rank() == root).then_some(all))
    }

    /// Rank `root`'s tensor; the others pass one of the same shape and dtype.
    fn broadcast(&self, tensor: Tensor, root: usize) -> Result<Tensor, CommError>;

    /// Gives a tensor to rank `to`.
    fn send(&self, tensor: &Tensor, to: usize) -> Result<(), CommError>;

    /// Takes a tensor from rank `from`, of the shape and dtype of `like`.
    fn recv(&self, like: &Tensor, from: usize) -> Result<Tensor, CommError>;

    /// To be called by all ranks before captured exchanges are started. Where ranks share a GPU it
    /// waits until all have come.
    fn meet(&self) -> Result<(), CommError> {
        Ok(())
    }

    /// Work that may wait in the driver for other ranks begins, until what this returns is dropped: work
    /// that takes longer than the group's timeout is the group's failure. `None`: nothing waits so.
    #[cfg(feature = "cuda")]
    fn enter(&self) -> Option<Call> {
        None
    }

    /// What became of exchanges that are over, where they are not waited for when they are started.
    fn check(&self) -> Result<(), CommError> {
        Ok(())
    }
}

/// How long stage `stage` waits for the one before it: longer than that one waits itself, so that
/// the first to lose patience is the one that waits for the rank at fault.
pub(crate) fn patience(timeout: Duration, stage: usize) -> Duration {
    timeout + timeout / 8 * u32::try_from(stage.saturating_sub(1)).unwrap_or(u32::MAX)
}

/// The sum of at least one tensor, first to last: the order is part of the result's bits.
fn sum_in_order(tensors: &[Tensor]) -> Tensor {
    match tensors {
        [first, second, rest @ ..] => {
            let mut sum = first + second;
            for tensor in rest {
                let _ = sum.g_add_(tensor);
            }
            sum
        }
        _ => tensors[0].copy(),
    }
}
