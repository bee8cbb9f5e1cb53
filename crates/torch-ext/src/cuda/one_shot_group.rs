//! What the ranks of a one-shot group have in common: their buffers, and the alarm.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use cudarc::driver::sys;
use tch::{Device, Tensor};

use super::CudaError;
use super::kernels::check;
use super::shim::shim;

#[derive(Debug)]
pub(super) struct Group {
    /// uint8, one for each rank, on its device.
    pub(super) buffers: Vec<Tensor>,
    pub(super) alarm: Alarm,
    pub(super) patience: Duration,
}

/// Tells whether a rank was late, and ends all waiting.
#[derive(Clone, Debug)]
pub struct OneShotAlarm(pub(super) Arc<Group>);

/// One number in pinned memory, which the host and all GPUs read and write: 0, or 1 + the rank that
/// was late, or [`RUNG`].
#[derive(Debug)]
pub(super) struct Alarm(pub(super) Tensor);

/// What the host writes to end all waiting.
const RUNG: u32 = u32::MAX;

impl Alarm {
    fn word(&self) -> &AtomicU32 {
        // SAFETY: an aligned int32 in host memory that lives as long as the tensor, and that nobody
        // reads or writes but as a whole: here, and in the kernels.
        unsafe { AtomicU32::from_ptr(self.0.data_ptr().cast()) }
    }
}

// SAFETY: the tensor is never changed but through the atomic.
unsafe impl Sync for Alarm {}
// SAFETY: buffers are not changed by the host after they were made; their memory is the kernels',
// which order their accesses among each other.
unsafe impl Sync for Group {}
// SAFETY: tensors may be dropped by any thread.
unsafe impl Send for Group {}

impl Drop for Group {
    fn drop(&mut self) {
        // A kernel of another rank may still read what is about to be freed.
        for device in self.buffers.iter().map(Tensor::device) {
            if let (Device::Cuda(index), Ok(shim)) = (device, shim()) {
                // SAFETY: no pointers. An error here has nobody to hear it.
                let _ = unsafe { shim.device_synchronize(index as i32) };
            }
        }
    }
}

impl OneShotAlarm {
    /// Ends all waiting, now and later: for when a rank is known not to come.
    pub fn ring(&self) {
        self.0.alarm.word().store(RUNG, Ordering::Release);
    }

    /// The rank that another one waited for in vain, if there was one: what steps since then made
    /// means nothing.
    pub fn late(&self) -> Option<usize> {
        match self.0.alarm.word().load(Ordering::Acquire) {
            0 | RUNG => None,
            late => Some(late as usize - 1),
        }
    }
}

/// Lets each of these GPUs read and write the memory of the others.
pub(super) fn enable_access(devices: &[usize]) -> Result<(), CudaError> {
    let mut contexts = Vec::new();
    for &device in devices {
        let mut context = std::ptr::null_mut();
        // SAFETY: a valid place for the result. libtorch holds the primary context until the
        // process ends, and so may we.
        let result = unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device as i32) };
        check(result, "cuDevicePrimaryCtxRetain")?;
        contexts.push(context);
    }
    let pairs = |i: usize| (0..devices.len()).filter(move |j| *j != i);
    for (i, &device) in devices.iter().enumerate() {
        for j in pairs(i) {
            let mut can = 0;
            // SAFETY: a valid place for the result.
            let result =
                unsafe { sys::cuDeviceCanAccessPeer(&mut can, device as i32, devices[j] as i32) };
            check(result, "cuDeviceCanAccessPeer")?;
            if can == 0 {
                return Err(CudaError(format!(
                    "GPU {device} cannot reach the memory of GPU {}; leave the custom AllReduce off",
                    devices[j]
                )));
            }
        }
        // SAFETY: contexts of this process; the one that was current is put back.
        unsafe {
            check(sys::cuCtxPushCurrent_v2(contexts[i]), "cuCtxPushCurrent")?;
            let enabled =
                pairs(i).try_for_each(|j| match sys::cuCtxEnablePeerAccess(contexts[j], 0) {
                    sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
                    result => check(result, "cuCtxEnablePeerAccess"),
                });
            let mut popped = std::ptr::null_mut();
            check(sys::cuCtxPopCurrent_v2(&mut popped), "cuCtxPopCurrent")?;
            enabled?;
        }
    }
    Ok(())
}
