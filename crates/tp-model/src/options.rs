//! How to load and run a model.

use std::path::Path;
use std::str::FromStr;
#[cfg(feature = "cuda")]
use std::sync::Arc;

use tch::{Device, Kind};
#[cfg(feature = "cuda")]
use torch_ext::cuda::Kernels;

#[cfg(feature = "cuda")]
use crate::attention::Paged;
use crate::attention::{AttentionBackend, Cpu, Reference, Sdpa};
use crate::config::{ModelConfig, RopeScaling};
use crate::error::ModelError;
use crate::layers::Ops;
use crate::weights::{Checkpoint, Dummy, Source};

/// How [`crate::Model::load`] loads.
#[derive(Clone, Copy)]
pub struct LoadOptions<'a> {
    /// Where weights and cache live.
    pub device: Device,
    /// Dtype of weights and cache.
    pub dtype: DtypeChoice,
    /// Where weights come from.
    pub format: LoadFormat,
    /// Which kernels run the model.
    pub backend: Backend,
    /// Experimental on a GPU, where chunks and batches still show in the last bits of some prompts:
    /// whether a token's logits are to be the same bits whatever else is in the step, however its
    /// prompt is cut into chunks, and whether its prefix was cached. The CPU's own kernels always
    /// are; on a GPU it costs speed. [`Model::load`](crate::Model::load) refuses it where the
    /// backend cannot.
    pub deterministic: bool,
    /// On a GPU: launch every kernel of a decode step, instead of replaying a captured graph.
    pub enforce_eager: bool,
    /// Called with the bytes read so far and the bytes in total, from several threads at a time.
    pub progress: Option<&'a (dyn Fn(u64, u64) + Sync)>,
}

impl Default for LoadOptions<'_> {
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            dtype: DtypeChoice::Auto,
            format: LoadFormat::Safetensors,
            backend: Backend::Auto,
            deterministic: false,
            enforce_eager: false,
            progress: None,
        }
    }
}

/// Dtype of weights and cache. On the CPU activations are float32 whatever the weights are; on a
/// GPU they have the dtype of the weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DtypeChoice {
    /// What `config.json` declares.
    #[default]
    Auto,
    /// 32 bits.
    Float32,
    /// 16 bits with the range of float32.
    Bfloat16,
    /// 16 bits, IEEE half precision.
    Float16,
}

impl DtypeChoice {
    pub(crate) fn resolve(self, config: &ModelConfig) -> Kind {
        match self {
            DtypeChoice::Auto => config.dtype,
            DtypeChoice::Float32 => Kind::Float,
            DtypeChoice::Bfloat16 => Kind::BFloat16,
            DtypeChoice::Float16 => Kind::Half,
        }
    }
}

impl FromStr for DtypeChoice {
    type Err = ModelError;

    fn from_str(s: &str) -> Result<Self, ModelError> {
        Ok(match s {
            "auto" => Self::Auto,
            "float32" | "float" => Self::Float32,
            "bfloat16" => Self::Bfloat16,
            "float16" | "half" => Self::Float16,
            _ => return Err(unknown("dtype", s, "auto, float32, bfloat16, float16")),
        })
    }
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadFormat {
    /// The checkpoint's safetensors files.
    #[default]
    Safetensors,
    /// A random generator: only `config.json` is read.
    Dummy {
        /// Seed of the generator.
        seed: u64,
    },
}

impl LoadFormat {
    pub(crate) fn open(self, dir: &Path) -> Result<Source, ModelError> {
        Ok(match self {
            LoadFormat::Safetensors => Source::Checkpoint(Checkpoint::open(dir)?),
            LoadFormat::Dummy { seed } => Source::Dummy(Dummy::new(seed)),
        })
    }
}

impl FromStr for LoadFormat {
    type Err = ModelError;

    fn from_str(s: &str) -> Result<Self, ModelError> {
        Ok(match s {
            "auto" | "safetensors" => Self::Safetensors,
            "dummy" => Self::Dummy { seed: 0 },
            _ => return Err(unknown("load format", s, "auto, safetensors, dummy")),
        })
    }
}

/// Which kernels run the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// The fastest for the device.
    #[default]
    Auto,
    /// Plain tensor operations, attention written out: the oracle.
    Reference,
    /// libtorch's matrix products and fused attention, on any device.
    Torch,
    /// Our own CPU kernels, the same bits whatever the batch: the default on the CPU.
    Cpu,
    /// Our own CUDA kernels for bfloat16 and float16: the default on a GPU for models of these
    /// dtypes.
    Cuda,
}

/// Who runs a model.
pub(crate) struct Compute {
    pub(crate) ops: Ops,
    pub(crate) attention: Box<dyn AttentionBackend>,
    /// The CUDA kernels, if those run everything.
    #[cfg(feature = "cuda")]
    pub(crate) kernels: Option<Arc<Kernels>>,
}

impl Backend {
    pub(crate) fn build(
        self,
        device: Device,
        kind: Kind,
        config: &ModelConfig,
        deterministic: bool,
    ) -> Result<Compute, ModelError> {
        let compute = |ops, attention| Compute {
            ops,
            attention,
            #[cfg(feature = "cuda")]
            kernels: None,
        };
        let unfit = cuda_unfit(device, kind, config);
        let built = match (self, device) {
            (Backend::Cpu | Backend::Auto, Device::Cpu) => compute(Ops::Cpu, Box::new(Cpu)),
            (Backend::Cpu, _) => {
                let what = format!("backend `cpu` does not run on {device:?}; use auto or torch");
                return Err(ModelError::Options(what));
            }
            (Backend::Cuda | Backend::Auto, _) if unfit.is_none() => cuda(device, deterministic)?,
            (Backend::Cuda, _) => {
                let why = unfit.unwrap_or_default();
                let what = format!("backend `cuda` {why}; use auto or torch");
                return Err(ModelError::Options(what));
            }
            (Backend::Torch | Backend::Auto, _) => compute(Ops::Torch, Box::new(Sdpa)),
            (Backend::Reference, _) => compute(Ops::Torch, Box::new(Reference)),
        };
        if deterministic && matches!(built.ops, Ops::Torch) {
            return Err(ModelError::Options(format!(
                "deterministic: libtorch's kernels on {device:?} promise no equal bits; use our own \
                 (backend cpu, or cuda with bfloat16 or float16)"
            )));
        }
        Ok(built)
    }
}

/// Why our CUDA kernels cannot run a model, if they cannot.
fn cuda_unfit(device: Device, kind: Kind, config: &ModelConfig) -> Option<String> {
    if !cfg!(feature = "cuda") {
        return Some("is not in this build, which has no CUDA support".to_owned());
    }
    if !matches!(device, Device::Cuda(_)) {
        return Some(format!("does not run on {device:?}"));
    }
    if !matches!(kind, Kind::BFloat16 | Kind::Half) {
        return Some(format!("takes bfloat16 and float16, not {kind:?}"));
    }
    if !CUDA_HEAD_DIMS.contains(&config.head_dim) {
        let dim = config.head_dim;
        return Some(format!(
            "has no kernel for head size {dim}, only {CUDA_HEAD_DIMS:?}"
        ));
    }
    if matches!(config.rope.scaling, RopeScaling::Dynamic { .. }) {
        return Some("has no table of angles for dynamic rotary scaling".to_owned());
    }
    None
}

/// Head sizes that the attention kernels are compiled for.
const CUDA_HEAD_DIMS: &[usize] = &[64, 80, 96, 128, 256];

#[cfg(not(feature = "cuda"))]
fn cuda(_: Device, _: bool) -> Result<Compute, ModelError> {
    unreachable!("refused by `cuda_unfit`")
}

#[cfg(feature = "cuda")]
fn cuda(device: Device, deterministic: bool) -> Result<Compute, ModelError> {
    let Device::Cuda(index) = device else {
        unreachable!("refused by `cuda_unfit`")
    };
    let kernels = Kernels::new(index).map_err(|e| ModelError::Options(e.to_string()))?;
    let kernels = Arc::new(kernels);
    Ok(Compute {
        ops: Ops::Cuda {
            kernels: kernels.clone(),
            deterministic,
        },
        attention: Box::new(Paged::new(kernels.clone())),
        kernels: Some(kernels),
    })
}

impl FromStr for Backend {
    type Err = ModelError;

    fn from_str(s: &str) -> Result<Self, ModelError> {
        Ok(match s {
            "auto" => Self::Auto,
            "reference" => Self::Reference,
            "torch" => Self::Torch,
            "cpu" => Self::Cpu,
            "cuda" => Self::Cuda,
            _ => return Err(unknown("backend", s, "auto, reference, torch, cpu, cuda")),
        })
    }
}

fn unknown(what: &str, found: &str, supported: &str) -> ModelError {
    ModelError::Options(format!("unknown {what} `{found}`; supported: {supported}"))
}
