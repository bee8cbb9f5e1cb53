//! One rank: every collective is the identity.

use tch::Tensor;

use super::{Collective, CommError};

/// A world of one rank.
#[derive(Clone, Copy, Debug, Default)]
pub struct Solo;

impl Solo {
    fn no_peer(verb: &str, peer: usize) -> CommError {
        CommError {
            rank: 0,
            world_size: 1,
            what: format!("cannot {verb} rank {peer}: there is one rank"),
        }
    }
}

impl Collective for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn all_reduce_sum(&self, tensor: Tensor) -> Result<Tensor, CommError> {
        Ok(tensor)
    }

    fn all_gather(&self, tensor: Tensor) -> Result<Tensor, CommError> {
        Ok(tensor)
    }

    fn broadcast(&self, tensor: Tensor, root: usize) -> Result<Tensor, CommError> {
        match root {
            0 => Ok(tensor),
            _ => Err(Self::no_peer("receive from", root)),
        }
    }

    fn send(&self, _tensor: &Tensor, to: usize) -> Result<(), CommError> {
        Err(Self::no_peer("send to", to))
    }

    fn recv(&self, _like: &Tensor, from: usize) -> Result<Tensor, CommError> {
        Err(Self::no_peer("receive from", from))
    }
}
