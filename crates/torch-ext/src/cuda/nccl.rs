//! NCCL: exchanges between the GPUs of a group, in stream order, also inside captured graphs.

use std::ffi::c_int;
use std::fmt;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::nccl::sys;
use tch::{Device, Kind, Tensor};

use super::CudaError;
use super::nccl_api::{Api, Stream, api};
use super::stream::{current_stream, make_device_current, synchronize};

/// What the ranks of a group have in common before they meet: rank 0 makes it, and it travels to
/// the others as bytes.
#[derive(Clone, Copy)]
pub struct NcclId(sys::ncclUniqueId);

impl NcclId {
    /// A new one. Fails if NCCL cannot be loaded.
    pub fn new() -> Result<Self, CudaError> {
        let mut id = sys::ncclUniqueId { internal: [0; 128] };
        // SAFETY: a valid place for the result.
        unsafe { api()?.get_unique_id(&mut id)? };
        Ok(Self(id))
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
    /// Joins a group; waits until all of its ranks do, and have exchanged something. Makes `device` the
    /// current one of the calling thread. Captured graphs that hold exchanges must be dropped before this is.
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
        unsafe { api()?.comm_init_rank(&mut raw, ranks, id.0, at)? };
        let joined = Self::from_raw(raw, rank, world_size, device);
        joined.meet()?;
        Ok(joined)
    }

    /// A group of GPUs of this process: rank `r` has `devices[r]`. NCCL takes no GPU twice. If one
    /// cannot join, this is an error, and nobody waits. Makes the first device the current one of
    /// the calling thread.
    pub fn local_group(devices: &[usize]) -> Result<Vec<Self>, CudaError> {
        let (api, id) = (api()?, NcclId::new()?);
        let world_size = devices.len();
        let mut raws = vec![ptr::null_mut(); world_size];
        // SAFETY: no pointers.
        unsafe { api.group_start()? };
        let ranks = raws.iter_mut().zip(devices).zip(0..);
        let mut joined = Ok(());
        for ((raw, &device), rank) in ranks {
            joined = joined.and_then(|()| {
                make_device_current(device)?;
                // SAFETY: a valid place for the result until the group has ended.
                unsafe { api.comm_init_rank(raw, world_size as c_int, id.0, rank) }
            });
        }
        // SAFETY: the group was started, and is ended whatever came of it.
        let ended = unsafe { api.group_end() };
        if let Some(&first) = devices.first() {
            make_device_current(first)?;
        }
        let ranks = raws.into_iter().zip(devices).enumerate();
        let ranks = ranks.filter(|(_, (raw, _))| !raw.is_null());
        // What has joined is ended by its drop if the others have not.
        let ranks =
            ranks.map(|(rank, (raw, device))| Self::from_raw(raw, rank, world_size, *device));
        let ranks: Vec<Self> = ranks.collect();
        joined.and(ended)?;
        std::thread::scope(|scope| {
            let meet = |rank| scope.spawn(move || Self::meet(rank));
            let meeting: Vec<_> = ranks.iter().map(meet).collect();
            let met = meeting.into_iter().map(|thread| match thread.join() {
                Ok(met) => met,
                Err(_) => Err(CudaError(
                    "NCCL: a rank panicked as it met others".to_owned(),
                )),
            });
            met.collect::<Result<(), _>>()
        })?;
        Ok(ranks)
    }

    /// Each exchange once, and waits for them. NCCL connects ranks when they first exchange something of a
    /// kind and size, in a call that nothing can end while another rank does not come: that is to happen
    /// where the group is joined, a wait which callers bound, not in the middle of a step.
    fn meet(&self) -> Result<(), CudaError> {
        if self.world_size == 1 {
            return Ok(());
        }
        make_device_current(self.device)?;
        let zeros = |count: i64| Tensor::zeros([count], (Kind::Half, Device::Cuda(self.device)));
        // NCCL has a tree for little and a ring for much.
        for count in [1, 1 << 20] {
            self.all_reduce_sum(&mut zeros(count))?;
            let _ = self.all_gather(&zeros(count))?;
            self.broadcast(&mut zeros(count), 0)?;
        }
        // As pipeline stages do.
        let (out, mut into) = (zeros(1), zeros(1));
        // SAFETY: no pointers.
        unsafe { api()?.group_start()? };
        let given = match self.rank + 1 < self.world_size {
            true => self.send(&out, self.rank + 1),
            false => Ok(()),
        };
        let taken = match self.rank > 0 {
            true => self.recv(&mut into, self.rank - 1),
            false => Ok(()),
        };
        // SAFETY: the group was started, and is ended whatever came of it.
        let ended = unsafe { api()?.group_end() };
        given.and(taken).and(ended)?;
        synchronize(self.device)
    }

    fn from_raw(raw: sys::ncclComm_t, rank: usize, world_size: usize, device: usize) -> Self {
        Self {
            handle: Handle(Arc::new(Mutex::new(Some(Raw(raw))))),
            rank,
            world_size,
            device,
        }
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
        self.enqueue(|api, comm, stream| {
            // SAFETY: a live, contiguous tensor of this device, written in stream order.
            unsafe { api.all_reduce(data, data, count, kind, sum, comm, stream) }
        })
    }

    /// All ranks' tensors one after the other, `[world_size, ...]`.
    pub fn all_gather(&self, tensor: &Tensor) -> Result<Tensor, CudaError> {
        let (data, count, kind) = self.operand(tensor)?;
        let mut size = vec![self.world_size as i64];
        size.extend(tensor.size());
        let all = Tensor::empty(size, (tensor.kind(), tensor.device()));
        let (out, _, _) = self.operand(&all)?;
        self.enqueue(|api, comm, stream| {
            // SAFETY: as above; `all` has room for every rank's tensor.
            unsafe { api.all_gather(data, out, count, kind, comm, stream) }
        })?;
        Ok(all)
    }

    /// Replaces `tensor` by rank `root`'s.
    pub fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<(), CudaError> {
        let (data, count, kind) = self.operand(tensor)?;
        let root = self.peer(root)?;
        self.enqueue(|api, comm, stream| {
            // SAFETY: as above.
            unsafe { api.broadcast(data, data, count, kind, root, comm, stream) }
        })
    }

    /// Gives a tensor to another rank.
    pub fn send(&self, tensor: &Tensor, to: usize) -> Result<(), CudaError> {
        let (data, count, kind) = self.operand(tensor)?;
        let to = self.peer(to)?;
        // SAFETY: as above; it is only read.
        self.enqueue(|api, comm, stream| unsafe { api.send(data, count, kind, to, comm, stream) })
    }

    /// Fills a tensor with what another rank sends.
    pub fn recv(&self, tensor: &mut Tensor, from: usize) -> Result<(), CudaError> {
        let (data, count, kind) = self.operand(tensor)?;
        let from = self.peer(from)?;
        // SAFETY: as above.
        self.enqueue(|api, comm, stream| unsafe { api.recv(data, count, kind, from, comm, stream) })
    }

    fn enqueue(
        &self,
        call: impl FnOnce(&Api, sys::ncclComm_t, Stream) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let (api, stream) = (api()?, current_stream(self.device)?);
        match *self.handle.lock() {
            Some(Raw(comm)) => call(api, comm, stream),
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
        if let (Some(Raw(comm)), Ok(api)) = (taken, api()) {
            // SAFETY: taken out, so nobody else uses or destroys it. It is gone either way.
            let _ = unsafe { api.comm_abort(comm) };
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
