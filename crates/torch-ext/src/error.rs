use tch::{Device, Kind};

/// Why a kernel refused its arguments. Nothing was written when one of these is returned.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor is not in the memory of the device that the kernel runs on.
    #[error("{op}: `{operand}` is on {found:?}, expected {expected:?}")]
    Device {
        /// The kernel.
        op: &'static str,
        /// Its argument.
        operand: &'static str,
        /// Where the kernel runs.
        expected: Device,
        /// Where the tensor is.
        found: Device,
    },
    /// A tensor has an element type that the kernel does not take.
    #[error("{op}: `{operand}` has dtype {found:?}, expected {expected}")]
    Dtype {
        /// The kernel.
        op: &'static str,
        /// Its argument.
        operand: &'static str,
        /// The types that it takes.
        expected: &'static str,
        /// The tensor's type.
        found: Kind,
    },
    /// A tensor's shape does not fit the other arguments.
    #[error("{op}: `{operand}` has shape {found:?}, expected {expected}")]
    Shape {
        /// The kernel.
        op: &'static str,
        /// Its argument.
        operand: &'static str,
        /// The shape that fits.
        expected: String,
        /// The tensor's shape.
        found: Vec<i64>,
    },
    /// A tensor is a strided view.
    #[error("{op}: `{operand}` (shape {shape:?}) is not contiguous; call `.contiguous()` on it")]
    NotContiguous {
        /// The kernel.
        op: &'static str,
        /// Its argument.
        operand: &'static str,
        /// The tensor's shape.
        shape: Vec<i64>,
    },
    /// An index points outside of what it indexes.
    #[error("{op}: `{operand}`[{at}] is {found}, expected {expected}")]
    Index {
        /// The kernel.
        op: &'static str,
        /// Its argument.
        operand: &'static str,
        /// Position of the bad index.
        at: usize,
        /// The range that it must lie in.
        expected: String,
        /// The index.
        found: i64,
    },
    /// Any other argument has a value that makes no sense.
    #[error("{op}: `{operand}` is {found}, expected {expected}")]
    Argument {
        /// The kernel.
        op: &'static str,
        /// Its argument.
        operand: &'static str,
        /// What it must be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The system gave no memory.
    #[error("cannot map {bytes} bytes of memory: {source}")]
    Memory {
        /// How much was asked for.
        bytes: usize,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The driver, NVRTC or libtorch refused; the GPU's state is unknown then.
    #[error(transparent)]
    Cuda(#[from] crate::cuda::CudaError),
}
