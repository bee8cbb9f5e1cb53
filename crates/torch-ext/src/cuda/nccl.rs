//! NCCL: exchanges between the GPUs of a group, in stream order, also inside captured graphs.

use std::ffi::c_int;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::nccl::result::{self, NcclError, NcclStatus};
use cudarc::nccl::sys;
use tch::{Device, Kind, Tensor};

use super::CudaError;
use super::stream::{current_stream, make_device_current};

/// What the ranks of a group have in common before they meet: rank 0 makes it, and it travels to
/// the others as bytes.
#[derive(Clone, Copy)]
pub struct NcclId(sys::ncclUniqueId);

impl NcclId {
    /// A new one. Fails if NCCL cannot be loaded.
    pub fn new() -> Result<Self, CudaError> {
        loaded(result::get_uniqueid)?.map(Self).map_err(error)
    }

    /// Its bytes.
    pub fn bytes(&self) -> [u8; 128] {
        self.0.internal.map(|byte| byte as u8)
    }

    /// The one with these bytes.
    pub fn from_bytes(bytes: [u8; 128]) -> Self {
        Self(sys::ncclUniqueId {
            internal: bytes.map(|byte| byte as std::ffi::c_char),
        })
    }
}

impl fmt::Debug for NcclId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Whoever knows it can join.
        f.write_str("NcclId")
    }
}

/// One rank of a group, on one GPU. Everything is put on libtorch's current stream of the calling
/// thread, and nothing waits.
///
/// It may move between threads but not be shared: NCCL wants one call at a time.
#[derive(Debug)]
pub struct Nccl {
    handle: Handle,
    rank: usize,
    world_size: usize,
    device: usize,
}

/// The communicator, until it is aborted or destroyed.
#[derive(Clone, Debug)]
struct Handle(Arc<Mutex<Option<Raw>>>);

#[derive(Clone, Copy, Debug)]
struct Raw(sys::ncclComm_t);

// SAFETY: a communicator may be used from any thread as long as calls do not overlap, and the mutex
// around the only copy sees to that.
unsafe impl Send for Raw {}

/// Ends a group from another thread.
#[derive(Clone, Debug)]
pub struct NcclAbort(Handle);

impl Nccl {
    /// Joins a group; waits until all of its ranks do. Makes `device` the current one of the
    /// calling thread. Captured graphs that hold exchanges must be dropped before this is.
    pub fn new(
        id: NcclId,
        rank: usize,
        world_size: usize,
        device: usize,
    ) -> Result<Self, CudaError> {
        if rank >= world_size {
            return Err(CudaError(format!("NCCL: rank {rank} of {world_size}")));
        }
        // What NCCL looks at.
        make_device_current(device)?;
        let mut raw = ptr::null_mut();
        let (ranks, at) = (world_size as c_int, rank as c_int);
        // SAFETY: `raw` is a valid place for the result.
        loaded(|| unsafe { result::comm_init_rank(&mut raw, ranks, id.0, at) })?.map_err(error)?;
        Ok(Self {
            handle: Handle(Arc::new(Mutex::new(Some(Raw(raw))))),
            rank,
            world_size,
            device,
        })
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many ranks there are.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// A way to end what waits for a rank that is gone.
    pub fn abort_handle(&self) -> NcclAbort {
        NcclAbort(self.handle.clone())
    }

    /// Sums `tensor` over all ranks, in place.
    pub fn all_reduce_sum(&self, tensor: &mut Tensor) -> Result<(), CudaError> {
        let (data, count, kind) = self.operand(tensor)?;
        let sum = sys::ncclRedOp_t::ncclSum;
        self.enqueue(|comm, stream| {
            // SAFETY: a live, contiguous tensor of this device, written in stream order.
            unsafe { result::all_reduce(data, data, count, kind, sum, comm, stream) }
        })
    }

    /// All ranks' tensors one after the other, `[world_size, ...]`.
    pub fn all_gather(&self, tensor: &Tensor) -> Result<Tensor, CudaError> {
        let (data, count, kind) = self.operand(tensor)?;
        let mut size = vec![self.world_size as i64];
        size.extend(tensor.size());
        let all = Tensor::empty(size, (tensor.kind(), tensor.device()));
        let (out, _, _) = self.operand(&all)?;
        self.enqueue(|comm, stream| {
            // SAFETY: as above; `all` has room for every rank's tensor.
            unsafe { result::all_gather(data, out, count, kind, comm, stream) }
        })?;
        Ok(all)
    }

    /// Replaces `tensor` by rank `root`'s.
    pub fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<(), CudaError> {
        let (data, count, kind) = self.operand(tensor)?;
        let root = self.peer(root)?;
        self.enqueue(|comm, stream| {
            // SAFETY: as above.
            unsafe { result::broadcast(data, data, count, kind, root, comm, stream) }
        })
    }

    /// Gives a tensor to another rank.
    pub fn send(&self, tensor: &Tensor, to: usize) -> Result<(), CudaError> {
        let (data, count, kind) = self.operand(tensor)?;
        let to = self.peer(to)?;
        // SAFETY: as above; it is only read.
        self.enqueue(|comm, stream| unsafe { result::send(data, count, kind, to, comm, stream) })
    }

    /// Fills a tensor with what another rank sends.
    pub fn recv(&self, tensor: &mut Tensor, from: usize) -> Result<(), CudaError> {
        let (data, count, kind) = self.operand(tensor)?;
        let from = self.peer(from)?;
        // SAFETY: as above.
        self.enqueue(|comm, stream| unsafe { result::recv(data, count, kind, from, comm, stream) })
    }

    fn enqueue(
        &self,
        call: impl FnOnce(sys::ncclComm_t, sys::cudaStream_t) -> Result<NcclStatus, NcclError>,
    ) -> Result<(), CudaError> {
        let stream = current_stream(self.device)?;
        match *self.handle.lock() {
            Some(Raw(comm)) => call(comm, stream.cast()).map(|_| ()).map_err(error),
            None => Err(CudaError("NCCL: the group was aborted".to_owned())),
        }
    }

    fn peer(&self, rank: usize) -> Result<c_int, CudaError> {
        match rank < self.world_size {
            true => Ok(rank as c_int),
            false => Err(CudaError(format!(
                "NCCL: rank {rank} in a group of {}",
                self.world_size
            ))),
        }
    }

    /// Where a tensor's elements are, how many, and of which type.
    fn operand(
        &self,
        tensor: &Tensor,
    ) -> Result<(*mut std::ffi::c_void, usize, sys::ncclDataType_t), CudaError> {
        let refuse = |what: String| Err(CudaError(format!("NCCL: {what}")));
        if tensor.device() != Device::Cuda(self.device) {
            let device = self.device;
            return refuse(format!(
                "a tensor on {:?}, not cuda:{device}",
                tensor.device()
            ));
        }
        if !tensor.is_contiguous() {
            return refuse(format!("a strided view of {:?}", tensor.size()));
        }
        let kind = match tensor.kind() {
            Kind::Float => sys::ncclDataType_t::ncclFloat32,
            Kind::Half => sys::ncclDataType_t::ncclFloat16,
            Kind::BFloat16 => sys::ncclDataType_t::ncclBfloat16,
            Kind::Int64 => sys::ncclDataType_t::ncclInt64,
            Kind::Int => sys::ncclDataType_t::ncclInt32,
            other => return refuse(format!("a tensor of {other:?}")),
        };
        Ok((tensor.data_ptr(), tensor.numel(), kind))
    }
}

impl NcclAbort {
    /// Ends all exchanges of this rank that are under way; later ones are errors. May wait until
    /// captured graphs that hold exchanges are dropped, though exchanges end before.
    pub fn abort(&self) {
        // Not under the lock: NCCL waits here for graphs that hold exchanges, and whoever has one
        // must hear that the group is gone.
        let taken = self.0.lock().take();
        if let Some(Raw(comm)) = taken {
            // SAFETY: taken out, so nobody else uses or destroys it. It is gone either way.
            let _ = unsafe { result::comm_abort(comm) };
        }
    }
}

impl Handle {
    fn lock(&self) -> MutexGuard<'_, Option<Raw>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // Not `destroy`, which waits for ranks that may be gone.
        self.abort_handle().abort();
    }
}

/// cudarc panics if it cannot load the library.
fn loaded<T>(call: impl FnOnce() -> T) -> Result<T, CudaError> {
    catch_unwind(AssertUnwindSafe(call))
        .map_err(|_| CudaError("NCCL: libnccl cannot be loaded; is it installed?".to_owned()))
}

fn error(error: NcclError) -> CudaError {
    CudaError(format!("NCCL: {:?}", error.0))
}
