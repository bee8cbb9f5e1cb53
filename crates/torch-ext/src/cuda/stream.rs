//! Streams, events and copies that do not wait.

use std::ffi::{c_int, c_void};
use std::ptr;

use tch::{Device, Kind, Tensor};

use super::CudaError;
use super::shim::shim;

/// A stream of libtorch's pool. CUDA graphs can be captured on it, unlike on the default stream.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    raw: *mut c_void,
    device: usize,
}

// SAFETY: CUDA streams may be used from any thread; the pool keeps them until the process ends.
unsafe impl Send for Stream {}

impl Stream {
    /// The next stream of the pool.
    pub fn new(device: usize) -> Result<Self, CudaError> {
        let mut raw = ptr::null_mut();
        // SAFETY: `raw` is a valid place for the result.
        unsafe { shim()?.stream_new(device as c_int, &mut raw)? };
        Ok(Self { raw, device })
    }

    /// Makes it, and its device, the current one of the calling thread: what libtorch and our
    /// kernels do from then on is put there. Cheap.
    pub fn make_current(&self) -> Result<(), CudaError> {
        // SAFETY: a stream of this device.
        unsafe { shim()?.stream_set(self.device as c_int, self.raw) }
    }
}

/// libtorch's current stream of this thread.
pub(crate) fn current_stream(device: usize) -> Result<*mut c_void, CudaError> {
    let mut stream = ptr::null_mut();
    // SAFETY: `stream` is a valid place for the result.
    unsafe { shim()?.stream_current(device as c_int, &mut stream)? };
    Ok(stream)
}

/// Makes a device the current one of the calling thread, with the stream that it had there.
pub fn make_device_current(device: usize) -> Result<(), CudaError> {
    let stream = current_stream(device)?;
    // SAFETY: a stream of this device.
    unsafe { shim()?.stream_set(device as c_int, stream) }
}

/// Waits for everything on this thread's current stream.
pub fn synchronize(device: usize) -> Result<(), CudaError> {
    // SAFETY: no pointers.
    unsafe { shim()?.stream_synchronize(device as c_int) }
}

/// `dst.copy_(src)` in stream order, without waiting. The host side must be pinned, and must
/// neither change nor be freed before the copy is done: [`Upload`] and [`Readback`] see to that.
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
        unsafe { shim()?.event_new(device as c_int, c_int::from(timing), &mut raw)? };
        Ok(Self { raw, device })
    }

    /// Marks the end of what is on the current stream now.
    pub fn record(&self) -> Result<(), CudaError> {
        // SAFETY: the event lives.
        unsafe { shim()?.event_record(self.raw, self.device as c_int) }
    }

    /// What is put on the current stream of `device` from now on waits until what was recorded is
    /// done. The host does not wait.
    pub fn wait(&self, device: usize) -> Result<(), CudaError> {
        // SAFETY: the event lives; the stream keeps what it needs of it.
        unsafe { shim()?.event_wait(self.raw, device as c_int) }
    }

    /// Waits until what was recorded is done.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: the event lives.
        unsafe { shim()?.event_synchronize(self.raw) }
    }

    /// Whether what was recorded is done. Does not wait.
    pub fn query(&self) -> Result<bool, CudaError> {
        let mut done = 0;
        // SAFETY: the event lives, `done` is a valid place for the result.
        unsafe { shim()?.event_query(self.raw, &mut done)? };
        Ok(done != 0)
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

/// Pinned host buffers, filled in turn. Kernels may read them where they are: for the few values of a step
/// a copy would take longer than the kernel that reads them.
#[derive(Debug)]
pub struct HostInts {
    hosts: Vec<(Tensor, Event, bool)>,
    current: usize,
}

impl HostInts {
    /// Room for `capacity` int32 values, with `depth` lists waiting to be read at a time.
    pub fn new(capacity: usize, depth: usize, device: usize) -> Result<Self, CudaError> {
        let host = |_| {
            let event = Event::new(device, false)?;
            Ok((pinned(capacity, Kind::Int)?, event, false))
        };
        Ok(Self {
            hosts: (0..depth.max(1))
                .map(host)
                .collect::<Result<_, CudaError>>()?,
            current: 0,
        })
    }

    /// Puts `values` to the front of the next buffer, once what reads its old values is done.
    pub fn put(&mut self, values: &[i32]) -> Result<(), CudaError> {
        let (len, room) = (values.len() as i64, self.tensor().size()[0]);
        if len > room {
            return Err(CudaError(format!("{len} values for room for {room}")));
        }
        self.current = (self.current + 1) % self.hosts.len();
        let (host, read, pending) = &mut self.hosts[self.current];
        if std::mem::take(pending) {
            read.synchronize()?;
        }
        let mut host = host.narrow(0, 0, len);
        host.f_copy_(&Tensor::from_slice(values)).map_err(torch)
    }

    /// `[capacity]` int32 on the host: what was put last, at the front.
    pub(crate) fn tensor(&self) -> &Tensor {
        &self.hosts[self.current].0
    }

    /// Keeps what was put last until what is on the current stream now is done.
    pub(crate) fn hold(&mut self) -> Result<(), CudaError> {
        let (_, read, pending) = &mut self.hosts[self.current];
        read.record()?;
        *pending = true;
        Ok(())
    }
}

impl Drop for HostInts {
    fn drop(&mut self) {
        for (host, read, _) in &self.hosts {
            keep_while_used(host, read);
        }
    }
}

/// libtorch gives freed pinned memory to others as soon as its own copies are done; it knows nothing of
/// our kernels. What one may still use when its owner goes is never freed.
fn keep_while_used(host: &Tensor, used: &Event) {
    if !matches!(used.query(), Ok(true)) {
        std::mem::forget(host.shallow_clone());
    }
}

/// A device tensor that lists from the host are copied to. While a copy waits for the stream, the next list may be
/// prepared.
#[derive(Debug)]
pub struct Upload {
    host: HostInts,
    /// `[capacity]` int32 on the device.
    pub device: Tensor,
}

impl Upload {
    /// Room for `capacity` int32 values, with `depth` copies under way at a time.
    pub fn new(capacity: usize, depth: usize, device: usize) -> Result<Self, CudaError> {
        let on = (Kind::Int, Device::Cuda(device));
        Ok(Self {
            host: HostInts::new(capacity, depth, device)?,
            device: Tensor::f_zeros([capacity as i64], on).map_err(torch)?,
        })
    }

    /// Starts the copy of `values` to the front of the device tensor, in stream order.
    pub fn send(&mut self, values: &[i32]) -> Result<(), CudaError> {
        if values.is_empty() {
            return Ok(());
        }
        self.host.put(values)?;
        let front = |all: &Tensor| all.narrow(0, 0, values.len() as i64);
        copy_async(&front(&self.device), &front(self.host.tensor()))?;
        self.host.hold()
    }
}

/// A pinned host tensor that results are copied to.
#[derive(Debug)]
pub struct Readback {
    host: Tensor,
    done: Event,
    len: i64,
    /// Whether a kernel is to write that [`Readback::written`] has not been told of.
    promised: bool,
}

impl Readback {
    /// Room for `capacity` values of `kind`.
    pub fn new(capacity: usize, kind: Kind, device: usize) -> Result<Self, CudaError> {
        Ok(Self {
            host: pinned(capacity, kind)?,
            done: Event::new(device, false)?,
            len: 0,
            promised: false,
        })
    }

    /// Starts the copy of a one-dimensional device tensor, in stream order.
    pub fn start(&mut self, from: &Tensor) -> Result<(), CudaError> {
        let (len, room) = (from.size().iter().product(), self.host.size()[0]);
        if len > room {
            return Err(CudaError(format!("readback of {len} values into {room}")));
        }
        copy_async(&self.host.narrow(0, 0, len), &from.view([-1]))?;
        self.len = len;
        self.done.record()
    }

    /// Where a kernel will write the first `len` values itself, if there is room for so many int32.
    pub(crate) fn promise(&mut self, len: usize) -> Result<Tensor, CudaError> {
        let room = self.host.size()[0];
        if self.host.kind() != Kind::Int || len as i64 > room {
            return Err(CudaError(format!(
                "{len} int32 for {room} {:?}",
                self.host.kind()
            )));
        }
        self.promised = true;
        Ok(self.host.shallow_clone())
    }

    /// A kernel that writes `len` values is on the current stream.
    pub fn written(&mut self, len: usize) -> Result<(), CudaError> {
        self.len = len as i64;
        self.promised = false;
        self.done.record()
    }

    /// Whether the copy is done: [`Readback::wait`] will not wait.
    pub fn is_done(&self) -> Result<bool, CudaError> {
        self.done.query()
    }

    /// Waits for the copy; the values, on the host.
    pub fn wait(&self) -> Result<Tensor, CudaError> {
        self.done.synchronize()?;
        Ok(self.host.narrow(0, 0, self.len))
    }
}

impl Drop for Readback {
    fn drop(&mut self) {
        if self.promised {
            std::mem::forget(self.host.shallow_clone());
        }
        keep_while_used(&self.host, &self.done);
    }
}

pub(super) fn pinned(len: usize, kind: Kind) -> Result<Tensor, CudaError> {
    let mut host = Tensor::f_zeros([len as i64], (kind, Device::Cpu)).map_err(torch)?;
    // SAFETY: a live tensor, which the function replaces by a pinned one.
    unsafe { shim()?.pin(host.as_mut_ptr().cast(), 1)? };
    Ok(host)
}

fn torch(error: tch::TchError) -> CudaError {
    CudaError(error.to_string())
}
