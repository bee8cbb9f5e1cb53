//! From files to layers: which tensors a layer is made of, and which part of them a rank reads.

mod checkpoint;
mod dummy;
mod header;
mod loader;
mod matrix;
mod parallel;
#[cfg(test)]
mod tests;

pub(crate) use checkpoint::Checkpoint;
pub(crate) use dummy::Dummy;
pub(crate) use loader::{LoadContext, Loader, Part, Source, Split};
pub use matrix::Matrix;
pub(crate) use parallel::in_parallel;

/// A rank's share of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Which share, `0..world_size`.
    pub rank: usize,
    /// How many shares there are.
    pub world_size: usize,
}

impl Shard {
    /// All of the model.
    pub const WHOLE: Shard = Shard {
        rank: 0,
        world_size: 1,
    };

    /// This rank's range of a dimension, which `world_size` must divide.
    pub(crate) fn range(self, len: usize) -> std::ops::Range<usize> {
        let share = len / self.world_size;
        self.rank * share..(self.rank + 1) * share
    }
}
