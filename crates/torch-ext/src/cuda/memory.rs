//! How much memory a GPU has.

#[cfg(feature = "cuda")]
use std::ffi::c_int;

#[cfg(feature = "cuda")]
use super::{CudaError, shim::shim};

/// Memory of a GPU, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Free for any process.
    pub free: u64,
    /// All there is.
    pub total: u64,
    /// In use by tensors of this process.
    pub allocated: u64,
    /// Held by libtorch: `allocated`, and what it keeps to hand out again.
    pub reserved: u64,
}

/// Memory of `device` now.
#[cfg(feature = "cuda")]
pub fn memory(device: usize) -> Result<Memory, CudaError> {
    let mut m = Memory::default();
    // SAFETY: valid places for the results.
    unsafe {
        shim()?.memory(
            device as c_int,
            &mut m.free,
            &mut m.total,
            &mut m.allocated,
            &mut m.reserved,
        )?;
    }
    Ok(m)
}

#[cfg(feature = "cuda")]
/// Gives memory that libtorch holds without using it back to the driver.
pub fn release_memory() -> Result<(), CudaError> {
    // SAFETY: no pointers.
    unsafe { shim()?.memory_release() }
}
