//! Streams, events and copies that do not wait.

use std::ffi::{c_int, c_void};
use std::ptr;

use tch::{Device, Tensor};

use super::CudaError;
use super::shim::shim;

/// Makes a fresh stream of libtorch's pool the current one of this thread: CUDA graphs cannot be
/// captured on the default stream.
pub fn use_new_stream(device: usize) -> Result<(), CudaError> {
    let mut stream = ptr::null_mut();
    // SAFETY: `stream` is a valid place for the result.
    unsafe { shim()?.stream_use_new(device as c_int, &mut stream) }
}

/// libtorch's current stream of this thread.
pub(crate) fn current_stream(device: usize) -> Result<*mut c_void, CudaError> {
    let mut stream = ptr::null_mut();
    // SAFETY: `stream` is a valid place for the result.
    unsafe { shim()?.stream_current(device as c_int, &mut stream)? };
    Ok(stream)
}

/// Waits for everything on this thread's current stream.
pub fn synchronize(device: usize) -> Result<(), CudaError> {
    // SAFETY: no pointers.
    unsafe { shim()?.stream_synchronize(device as c_int) }
}

/// `dst.copy_(src)` in stream order, without waiting. The host side must be pinned, and must
/// neither change nor be freed before the copy is done: [`PinnedCopy`] sees to that.
pub fn copy_async(dst: &Tensor, src: &Tensor) -> Result<(), CudaError> {
    if dst.size() != src.size() {
        let (to, from) = (dst.size(), src.size());
        return Err(CudaError(format!("copy of {from:?} into {to:?}")));
    }
    // SAFETY: both are live tensors of the same shape; libtorch's allocator keeps pinned blocks
    // that are in use by a stream from being handed out again.
    unsafe { shim()?.copy_async(dst.as_ptr().cast(), src.as_ptr().cast()) }
}

/// A point in a stream.
#[derive(Debug)]
pub struct Event {
    raw: *mut c_void,
    device: usize,
}

// SAFETY: CUDA events may be used from any thread, one at a time.
unsafe impl Send for Event {}

impl Event {
    /// An event that can be waited for; with `timing` also one that times can be read from.
    pub fn new(device: usize, timing: bool) -> Result<Self, CudaError> {
        let mut raw = ptr::null_mut();
        // SAFETY: `raw` is a valid place for the result.
        unsafe { shim()?.event_new(c_int::from(timing), &mut raw)? };
        Ok(Self { raw, device })
    }

    /// Marks the end of what is on the current stream now.
    pub fn record(&self) -> Result<(), CudaError> {
        // SAFETY: the event lives.
        unsafe { shim()?.event_record(self.raw, self.device as c_int) }
    }

    /// Waits until what was recorded is done.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: the event lives.
        unsafe { shim()?.event_synchronize(self.raw) }
    }

    /// Milliseconds from `start` to this event. Both need timing, and must have happened.
    pub fn since(&self, start: &Event) -> Result<f32, CudaError> {
        let mut ms = 0.0;
        // SAFETY: both events live, `ms` is a valid place for the result.
        unsafe { shim()?.event_elapsed(start.raw, self.raw, &mut ms)? };
        Ok(ms)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(shim) = shim() {
            // SAFETY: created by `new`, destroyed once. An error here has nobody to hear it.
            let _ = unsafe { shim.event_free(self.raw) };
        }
    }
}

/// A pinned host tensor beside a device tensor of the same shape, with the event that says when
/// the last copy between them was done.
#[derive(Debug)]
pub struct PinnedCopy {
    /// Pinned host memory.
    pub host: Tensor,
    /// Device memory.
    pub device: Tensor,
    done: Event,
    pending: bool,
}

impl PinnedCopy {
    /// Both sides of `[len]` elements of `kind`, zeroed.
    pub fn new(len: usize, kind: tch::Kind, device: usize) -> Result<Self, CudaError> {
        let failed = |e: tch::TchError| CudaError(e.to_string());
        let on = Device::Cuda(device);
        let host = Tensor::f_zeros([len as i64], (kind, Device::Cpu)).map_err(failed)?;
        Ok(Self {
            host: host.f_pin_memory(on).map_err(failed)?,
            device: Tensor::f_zeros([len as i64], (kind, on)).map_err(failed)?,
            done: Event::new(device, false)?,
            pending: false,
        })
    }

    /// Waits until the host side may be read (after [`PinnedCopy::download`]) or written (after
    /// [`PinnedCopy::upload`]).
    pub fn wait(&mut self) -> Result<(), CudaError> {
        if std::mem::take(&mut self.pending) {
            self.done.synchronize()?;
        }
        Ok(())
    }

    /// Writes `values` at the front of the host side (waiting for an earlier copy of it) and
    /// starts their copy to the device.
    pub fn upload<T: tch::kind::Element + Copy>(&mut self, values: &[T]) -> Result<(), CudaError> {
        if values.is_empty() {
            return Ok(());
        }
        self.wait()?;
        let len = values.len() as i64;
        if len > self.host.size()[0] {
            let room = self.host.size()[0];
            return Err(CudaError(format!("upload of {len} values into {room}")));
        }
        let mut host = self.host.narrow(0, 0, len);
        host.f_copy_(&Tensor::from_slice(values))
            .map_err(|e| CudaError(e.to_string()))?;
        copy_async(&self.device.narrow(0, 0, len), &host)?;
        self.mark()
    }

    /// Starts the copy of the first `len` elements of the device side to the host side.
    pub fn download(&mut self, len: usize) -> Result<(), CudaError> {
        self.wait()?;
        let len = len as i64;
        copy_async(&self.host.narrow(0, 0, len), &self.device.narrow(0, 0, len))?;
        self.mark()
    }

    fn mark(&mut self) -> Result<(), CudaError> {
        self.done.record()?;
        self.pending = true;
        Ok(())
    }
}
