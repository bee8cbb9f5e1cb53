//! The NVIDIA GPU, as far as this build and this machine have one.
//!
//! libtorch's CUDA half is loaded when it is first asked for: a process that stays on the CPU
//! neither needs its libraries nor pays for starting them. Loading registers its kernels with
//! libtorch, so from then on `tch` sees the GPU.

#[cfg(feature = "cuda")]
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

/// Why the CUDA half of libtorch cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The crate was built without its `cuda` feature.
    #[error("built without CUDA support; build with `--features cuda`")]
    NotBuilt,
    /// The libraries of libtorch's CUDA half are missing or do not load.
    #[error("libtorch's CUDA libraries do not load ({0}); install the full set beside libtorch")]
    Library(String),
}

/// Loads libtorch's CUDA half. Call it before anything else asks libtorch about CUDA: libtorch
/// remembers the first answer. Loading again does nothing.
pub fn load() -> Result<(), LoadError> {
    #[cfg(not(feature = "cuda"))]
    return Err(LoadError::NotBuilt);
    #[cfg(feature = "cuda")]
    {
        // SAFETY: the library's initialisers register kernels with the libtorch of this process,
        // which is what loading it is for; it comes from the folder of that same libtorch.
        let library = unsafe { Library::open(Some("libtorch_cuda.so"), RTLD_NOW | RTLD_GLOBAL) };
        let library = library.map_err(|e| LoadError::Library(e.to_string()))?;
        // What it registered must stay mapped until the process ends.
        let _ = library.into_raw();
        Ok(())
    }
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
