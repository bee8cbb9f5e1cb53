//! The NVIDIA GPU: streams, events, CUDA graphs, memory, and the project's own kernels.
//!
//! libtorch's CUDA half is loaded when it is first asked for: a process that stays on the CPU
//! neither needs its libraries nor pays for starting them. Loading registers its kernels with
//! libtorch, so from then on `tch` sees the GPU.
//!
//! | module | what it holds |
//! |---|---|
//! | `shim` | what libtorch has and `tch` does not bind (`csrc/cuda/shim.cpp`) |
//! | `stream`, `graph`, `memory` | safe handles on it |
//! | `compile` | NVRTC, with a cache on disk |
//! | `kernels` | the kernels of `csrc/cuda/*.cu`; one file for each topic, with the checks |

#[cfg(feature = "cuda")]
mod activation;
#[cfg(feature = "cuda")]
mod ahead;
#[cfg(feature = "cuda")]
mod attention;
#[cfg(feature = "cuda")]
mod attention_decode;
#[cfg(feature = "cuda")]
mod attention_decode_work;
#[cfg(feature = "cuda")]
mod attention_prefill;
#[cfg(feature = "cuda")]
mod check;
#[cfg(feature = "cuda")]
mod compile;
#[cfg(feature = "cuda")]
mod copy;
#[cfg(feature = "cuda")]
mod gated_product;
#[cfg(feature = "cuda")]
mod gemv;
#[cfg(feature = "cuda")]
mod gemv_plan;
#[cfg(feature = "cuda")]
mod graph;
#[cfg(feature = "cuda")]
mod kernels;
#[cfg(feature = "cuda")]
mod linear_wgmma;
#[cfg(feature = "cuda")]
mod linear_wgmma_plan;
mod memory;
#[cfg(feature = "cuda")]
mod nccl;
#[cfg(feature = "cuda")]
mod nccl_api;
#[cfg(feature = "cuda")]
mod norm;
#[cfg(feature = "cuda")]
mod one_shot;
#[cfg(feature = "cuda")]
mod one_shot_group;
#[cfg(feature = "cuda")]
mod rope;
#[cfg(feature = "cuda")]
mod sample;
#[cfg(feature = "cuda")]
mod sample_state;
#[cfg(feature = "cuda")]
mod shim;
#[cfg(feature = "cuda")]
mod staging;
#[cfg(feature = "cuda")]
mod step;
#[cfg(feature = "cuda")]
mod stream;
#[cfg(feature = "cuda")]
mod tensor_map;

#[cfg(feature = "cuda")]
pub use self::{
    attention::{Heads, PagedKv, Scores},
    attention_decode_work::DecodeWorkspace,
    compile::{ARCHITECTURES, Source, compile_all},
    copy::CacheSet,
    graph::{Graph, GraphPool},
    kernels::Kernels,
    linear_wgmma::DeferredNorm,
    linear_wgmma_plan::WgmmaPlan,
    memory::{memory, release_memory},
    nccl::{Nccl, NcclAbort, NcclId},
    one_shot::OneShot,
    one_shot_group::OneShotAlarm,
    rope::WriteKv,
    sample::{SampleFailure, SampleMode},
    sample_state::{SampleSlot, SampleState},
    staging::Staging,
    step::{ROW_INTS, RowLimits, SEGMENT_INTS, StepTensors},
    stream::{
        Event, HostInts, Readback, Stream, Upload, copy_async, make_device_current, synchronize,
    },
};

pub use self::memory::Memory;

/// Every `.cu` file, for [`compile_all`].
#[cfg(feature = "cuda")]
pub const SOURCES: &[&Source] = &[
    &step::SOURCE,
    &norm::SOURCE,
    &activation::SOURCE,
    &gated_product::SOURCE,
    &gemv::SOURCE,
    &linear_wgmma::SOURCE,
    &copy::SOURCE,
    &attention_decode::SOURCE,
    &attention_prefill::SOURCE,
    &attention_prefill::SM90,
    &one_shot::SOURCE,
    &rope::SOURCE,
    &rope::MANY,
    &sample::LOGPROBS,
    &sample::RACE,
    &sample::SCAN,
    &sample::SELECT,
    &sample::UPDATE,
];

/// Why the CUDA half of libtorch cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LoadError {
    /// The crate was built without its `cuda` feature.
    #[error("built without CUDA support; build with `--features cuda`")]
    NotBuilt,
    /// The libraries of libtorch's CUDA half are missing or do not load.
    #[error("libtorch's CUDA libraries do not load ({0}); install the full set beside libtorch")]
    Library(String),
}

/// What the CUDA runtime, the driver, NVRTC or libtorch said.
#[derive(Clone, Debug, thiserror::Error)]
#[error("CUDA: {0}")]
pub struct CudaError(pub(crate) String);

impl From<LoadError> for CudaError {
    fn from(error: LoadError) -> Self {
        CudaError(error.to_string())
    }
}

/// Loads libtorch's CUDA half. Call it before anything else asks libtorch about CUDA: libtorch
/// remembers the first answer. Loading again does nothing.
pub fn load() -> Result<(), LoadError> {
    #[cfg(not(feature = "cuda"))]
    return Err(LoadError::NotBuilt);
    #[cfg(feature = "cuda")]
    shim::shim().map(|_| ())
}

/// Whether libtorch can use a CUDA device in this process: [`load`] succeeds, and there is a
/// driver with at least one device.
pub fn is_available() -> bool {
    load().is_ok() && tch::Cuda::is_available()
}

/// How many CUDA devices libtorch can use.
pub fn device_count() -> usize {
    if is_available() {
        usize::try_from(tch::Cuda::device_count()).unwrap_or(0)
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    #[test]
    fn a_device_that_is_reported_computes() {
        assert_eq!(super::is_available(), super::device_count() > 0);
        if super::is_available() {
            let x = Tensor::arange(100, (Kind::Float, Device::Cuda(0)));
            assert_eq!((&x * &x).sum(Kind::Float).double_value(&[]), 328_350.0);
        } else if let Err(e) = super::load() {
            println!("no CUDA here: {e}");
        }
    }
}
