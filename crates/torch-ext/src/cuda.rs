//! The NVIDIA GPU, as far as this build and this machine have one.

/// Whether libtorch can use a CUDA device in this process: the build links libtorch's CUDA half
/// and a driver with at least one device is present.
pub fn is_available() -> bool {
    tch::Cuda::is_available()
}

/// How many CUDA devices libtorch sees.
pub fn device_count() -> usize {
    usize::try_from(tch::Cuda::device_count()).unwrap_or(0)
}
