//! CUDA graphs: a sequence of kernels, recorded once and started with one call.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use super::CudaError;
use super::shim::shim;

/// Memory that graphs which never run at the same time may share.
#[derive(Clone, Copy, Debug)]
pub struct GraphPool([u64; 2]);

impl GraphPool {
    /// A pool of its own.
    pub fn new() -> Result<Self, CudaError> {
        let mut id = [0; 2];
        // SAFETY: room for two numbers.
        unsafe { shim()?.graph_pool(id.as_mut_ptr())? };
        Ok(Self(id))
    }
}

/// A captured graph.
///
/// Tensors that are made during the capture live in the pool: a later replay, of this graph or of
/// another one with the same pool, overwrites them. Tensors that existed before are read and
/// written in place: keep them for as long as the graph.
#[derive(Debug)]
pub struct Graph {
    raw: *mut c_void,
    /// Of its device.
    turn: Arc<Mutex<()>>,
}

// SAFETY: the graph is not bound to a thread; `&mut` and ownership keep uses one at a time.
unsafe impl Send for Graph {}

impl Graph {
    /// Captures what `record` puts on the current stream (not the default one: see
    /// [`super::Stream`]). Nothing runs. `record` must not wait for the device.
    pub fn capture<T>(pool: GraphPool, record: impl FnOnce() -> T) -> Result<(Self, T), CudaError> {
        let (shim, turn) = (shim()?, turn()?);
        let mine = turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut raw = ptr::null_mut();
        // SAFETY: valid pool id and place for the result.
        unsafe { shim.graph_begin(pool.0.as_ptr(), &mut raw)? };
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(record));
        // SAFETY: the capture was begun by this thread. It is ended whatever `record` did: the
        // stream is of no use before.
        let ended = unsafe { shim.graph_end(raw) };
        // Before the graph may be dropped, which takes a turn.
        drop(mine);
        let graph = Self { raw, turn };
        match caught {
            Ok(value) => ended.map(|()| (graph, value)),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Starts the kernels on the current stream, in stream order.
    pub fn replay(&mut self) -> Result<(), CudaError> {
        // SAFETY: captured and not freed.
        unsafe { shim()?.graph_replay(self.raw) }
    }
}

/// Threads that capture or drop graphs on the same device take turns: libtorch's random generator of a
/// device takes part in one capture at a time, and has a list of its graphs without a lock, which two
/// threads at once corrupt. Those of different devices must not, since NCCL may want all ranks of a
/// group to capture at once.
fn turn() -> Result<Arc<Mutex<()>>, CudaError> {
    static TURNS: Mutex<BTreeMap<i32, Arc<Mutex<()>>>> = Mutex::new(BTreeMap::new());
    let mut device = 0;
    // SAFETY: a valid place for the result.
    let result = unsafe { cudarc::driver::sys::cuCtxGetDevice(&mut device) };
    super::kernels::check(result, "cuCtxGetDevice")?;
    let mut turns = TURNS.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(turns.entry(device).or_default().clone())
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _mine = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok(shim) = shim() {
            // SAFETY: freed once. An error here has nobody to hear it.
            let _ = unsafe { shim.graph_free(self.raw) };
        }
    }
}
