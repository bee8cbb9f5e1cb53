//! CPU kernels in float32, with weights and key/value cache in float32, bfloat16 or float16.
//!
//! **Batch invariance.** Every output element is computed by the same sequence of floating-point
//! operations whatever the number of rows in the call, how a prompt is cut into chunks, the block
//! size of the cache or the number of threads: the same request gives the same bits.
//!
//! The kernels are compiled for several [instruction sets](InstructionSet) and share libtorch's
//! pool of threads ([`set_num_threads`]).

mod activation;
mod attention;
mod cache;
mod check;
mod ffi;
mod packed;
pub mod roofline;
mod rope;
#[cfg(test)]
mod set_tests;

pub use activation::{add_rms_norm, rms_norm, silu_mul};
pub use attention::{AttentionParams, paged_attention};
pub use cache::{copy_blocks, new_cache};
pub use ffi::InstructionSet;
pub use packed::PackedWeight;
pub use rope::{RopeParams, rope_and_cache};

use tch::Kind;

/// Element type of weights or of the key/value cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Dtype {
    /// IEEE 754 single precision.
    F32 = 0,
    /// The upper half of a single.
    Bf16 = 1,
    /// IEEE 754 half precision.
    F16 = 2,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// The same type in `tch`'s words.
    pub fn kind(self) -> Kind {
        match self {
            Self::F32 => Kind::Float,
            Self::Bf16 => Kind::BFloat16,
            Self::F16 => Kind::Half,
        }
    }

    /// The type of a tensor, if it is one of the three.
    pub fn from_kind(kind: Kind) -> Option<Self> {
        match kind {
            Kind::Float => Some(Self::F32),
            Kind::BFloat16 => Some(Self::Bf16),
            Kind::Half => Some(Self::F16),
            _ => None,
        }
    }
}

/// Sets how many threads libtorch and these kernels use when called from this thread, and from
/// threads that have not used libtorch yet. At least one.
pub fn set_num_threads(threads: usize) {
    tch::set_num_threads(i32::try_from(threads.max(1)).unwrap_or(i32::MAX));
}

/// How many threads a kernel called from this thread uses.
pub fn num_threads() -> usize {
    usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1)
}

fn threads() -> i32 {
    num_threads() as i32
}

/// Work below this many nanoseconds stays on the calling thread. Starting and joining a team costs
/// a few microseconds on idle cores, but wherever another program holds one of them, every join
/// waits for its time slice: milliseconds, hundreds of times a token.
const TEAM_PAYS_NS: usize = 60_000;

/// Threads for work that reads `bytes` and multiplies and adds `macs` times.
fn threads_for(bytes: usize, macs: usize) -> i32 {
    // Of one thread: about 15 GB/s, and 40 products a nanosecond.
    match (bytes / 15).max(macs / 40) < TEAM_PAYS_NS {
        true => 1,
        false => threads(),
    }
}
