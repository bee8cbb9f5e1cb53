//! What libtorch has and `tch` lacks, and the project's own kernels: the one crate of the
//! workspace with `unsafe` code and C++.
//!
//! * [`cpu`]: matrix products on packed weights, normalisation, rotary embedding, paged attention.
//! * [`cuda`]: the NVIDIA GPU (streams, graphs, memory) and the kernels for it.
//! * [`Mmap`]: read-only file mappings for checkpoints.
//!
//! Every function here is safe: it checks device, dtype, shape, contiguity and every index of its
//! arguments before it enters unsafe code, and says in an [`Error`] which argument does not fit.

pub mod cpu;
pub mod cuda;
mod error;
mod mmap;

pub use error::Error;
pub use mmap::{Advice, Mmap};
