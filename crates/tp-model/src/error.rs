//! What can be wrong with a checkpoint, and what can go wrong while it runs.

use std::path::{Path, PathBuf};

use crate::comm::CommError;
use crate::libtorch;

/// Why a model could not be loaded or set up. Every message names the file, and where there is
/// one the field or tensor, with what was expected and what was found.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file could not be opened or read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file is not what its name says.
    #[error("{}: {what}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, with expected and found.
        what: String,
    },
    /// A field of `config.json` has a missing, mistyped or impossible value.
    #[error("{}: `{field}`: expected {expected}, found {found}", path.display())]
    Config {
        /// The configuration file.
        path: PathBuf,
        /// Name of the field.
        field: String,
        /// What it must be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The checkpoint is well-formed but asks for something that is not implemented.
    #[error("{}: `{field}` = {found} is not supported; supported: {supported}", path.display())]
    Unsupported {
        /// The configuration file.
        path: PathBuf,
        /// Name of the field.
        field: String,
        /// What the checkpoint asks for.
        found: String,
        /// What would be accepted.
        supported: String,
    },
    /// A tensor is missing or is not what the configuration implies.
    #[error("{}: tensor `{tensor}`: expected {expected}, found {found}", path.display())]
    Tensor {
        /// The shard or index file.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// Shape, dtype or presence that was expected.
        expected: String,
        /// What is there.
        found: String,
    },
    /// An option does not fit the model or the machine.
    #[error("{0}")]
    Options(String),
    /// Another rank failed while the model was loaded.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// A CPU kernel refused its arguments, or there is not enough memory for weights.
    #[error(transparent)]
    Kernel(#[from] torch_ext::Error),
    /// libtorch refused an operation (out of memory, mostly).
    #[error("libtorch: {}", libtorch::message(&.0.to_string()))]
    Torch(#[from] tch::TchError),
}

impl ModelError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn malformed(path: &Path, what: impl Into<String>) -> Self {
        Self::Malformed {
            path: path.to_owned(),
            what: what.into(),
        }
    }

    pub(crate) fn tensor(
        path: &Path,
        tensor: &str,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Self::Tensor {
            path: path.to_owned(),
            tensor: tensor.to_owned(),
            expected: expected.into(),
            found: found.into(),
        }
    }
}

/// A failure of the runner that ends the engine, but for [`RunnerError::OutOfMemory`].
#[derive(Debug, thiserror::Error)]
pub enum RunnerError {
    /// The plan contradicts the runner's state: a defect of the scheduler, not of a request.
    #[error("step {step}: {what}")]
    Plan {
        /// Number of the plan.
        step: u64,
        /// What contradicts what.
        what: String,
    },
    /// Another rank failed, or cannot be reached.
    #[error("{source}")]
    Comm {
        /// Number of the plan.
        step: u64,
        /// Which rank, and why.
        source: CommError,
    },
    /// libtorch failed while running the model.
    #[error("step {step}: libtorch: {what}")]
    Device {
        /// Number of the plan.
        step: u64,
        /// libtorch's message.
        what: String,
    },
    /// There was no memory for the step's rows. Nothing of them was kept, and the runner can go on.
    #[error("step {step}: out of memory: {what}")]
    OutOfMemory {
        /// Number of the plan.
        step: u64,
        /// libtorch's message.
        what: String,
    },
}
