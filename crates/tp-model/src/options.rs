//! How to load and run a model.

use std::path::Path;
use std::str::FromStr;

use tch::{Device, Kind};

use crate::attention::{AttentionBackend, Cpu, Reference, Sdpa};
use crate::config::ModelConfig;
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
}

impl Backend {
    pub(crate) fn build(
        self,
        device: Device,
    ) -> Result<(Ops, Box<dyn AttentionBackend>), ModelError> {
        Ok(match (self, device) {
            (Backend::Cpu | Backend::Auto, Device::Cpu) => (Ops::Cpu, Box::new(Cpu)),
            (Backend::Cpu, _) => {
                let what = format!("backend `cpu` does not run on {device:?}; use auto or torch");
                return Err(ModelError::Options(what));
            }
            (Backend::Torch | Backend::Auto, _) => (Ops::Torch, Box::new(Sdpa)),
            (Backend::Reference, _) => (Ops::Torch, Box::new(Reference)),
        })
    }
}

impl FromStr for Backend {
    type Err = ModelError;

    fn from_str(s: &str) -> Result<Self, ModelError> {
        Ok(match s {
            "auto" => Self::Auto,
            "reference" => Self::Reference,
            "torch" => Self::Torch,
            "cpu" => Self::Cpu,
            _ => return Err(unknown("backend", s, "auto, reference, torch, cpu")),
        })
    }
}

fn unknown(what: &str, found: &str, supported: &str) -> ModelError {
    ModelError::Options(format!("unknown {what} `{found}`; supported: {supported}"))
}
