//! From files to layers: which tensors a layer is made of, and which part of them a rank reads.

mod checkpoint;
mod dummy;
mod header;
mod loader;
mod matrix;
mod parallel;
mod shard;
#[cfg(test)]
mod tests;

pub(crate) use checkpoint::Checkpoint;
pub(crate) use dummy::Dummy;
pub(crate) use loader::{LoadContext, Loader, Part, Source, Split};
pub use matrix::Matrix;
pub(crate) use parallel::in_parallel;
pub use shard::Shard;
