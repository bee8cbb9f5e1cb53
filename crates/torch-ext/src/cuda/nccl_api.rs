//! NCCL's C functions, from the library that libtorch's CUDA half brings. (cudarc looks for
//! `libnccl.so`, which is not what it is called there.)

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use cudarc::nccl::sys::{ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclResult_t, ncclUniqueId};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use super::CudaError;

/// Names that the library may have: the first is what libtorch has loaded already.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// A stream, as the runtime has it.
pub(super) type Stream = *mut c_void;

macro_rules! functions {
    ($($name:ident = $symbol:literal ( $($arg:ident : $type:ty),* );)*) => {
        /// Entry points.
        #[derive(Debug)]
        pub(super) struct Api {
            error_string: unsafe extern "C" fn(ncclResult_t) -> *const c_char,
            last_error: unsafe extern "C" fn(ncclComm_t) -> *const c_char,
            $($name: unsafe extern "C" fn($($type),*) -> ncclResult_t,)*
        }

        impl Api {
            /// # Safety
            /// `library` must be NCCL 2.
            unsafe fn resolve(library: &Library) -> Result<Self, libloading::Error> {
                // SAFETY: the types are those of nccl.h.
                unsafe {
                    Ok(Self {
                        error_string: *library.get(b"ncclGetErrorString\0")?,
                        last_error: *library.get(b"ncclGetLastError\0")?,
                        $($name: *library.get(concat!($symbol, "\0").as_bytes())?,)*
                    })
                }
            }

            $(
                /// # Safety
                /// As the C function demands.
                #[allow(clippy::too_many_arguments, reason = "as the C function")]
                pub(super) unsafe fn $name(&self, $($arg: $type),*) -> Result<(), CudaError> {
                    // SAFETY: the caller's.
                    self.check($symbol, unsafe { (self.$name)($($arg),*) })
                }
            )*
        }
    };
}

functions! {
    get_unique_id = "ncclGetUniqueId" (id: *mut ncclUniqueId);
    comm_init_rank = "ncclCommInitRank" (comm: *mut ncclComm_t, ranks: c_int, id: ncclUniqueId, rank: c_int);
    comm_abort = "ncclCommAbort" (comm: ncclComm_t);
    group_start = "ncclGroupStart" ();
    group_end = "ncclGroupEnd" ();
    all_reduce = "ncclAllReduce" (
        from: *const c_void, to: *mut c_void, count: usize, kind: ncclDataType_t, op: ncclRedOp_t,
        comm: ncclComm_t, stream: Stream
    );
    all_gather = "ncclAllGather" (
        from: *const c_void, to: *mut c_void, count: usize, kind: ncclDataType_t, comm: ncclComm_t,
        stream: Stream
    );
    broadcast = "ncclBroadcast" (
        from: *const c_void, to: *mut c_void, count: usize, kind: ncclDataType_t, root: c_int,
        comm: ncclComm_t, stream: Stream
    );
    send = "ncclSend" (
        from: *const c_void, count: usize, kind: ncclDataType_t, peer: c_int, comm: ncclComm_t,
        stream: Stream
    );
    recv = "ncclRecv" (
        to: *mut c_void, count: usize, kind: ncclDataType_t, peer: c_int, comm: ncclComm_t,
        stream: Stream
    );
}

impl Api {
    fn check(&self, what: &str, result: ncclResult_t) -> Result<(), CudaError> {
        if result == ncclResult_t::ncclSuccess {
            return Ok(());
        }
        let text = |raw: *const c_char| match raw.is_null() {
            true => String::new(),
            // SAFETY: NCCL's strings live as long as the library.
            false => unsafe { CStr::from_ptr(raw) }
                .to_string_lossy()
                .into_owned(),
        };
        // SAFETY: without a communicator the last error is the one of this thread.
        let (error, last) = unsafe {
            let last = (self.last_error)(std::ptr::null_mut());
            (text((self.error_string)(result)), text(last))
        };
        Err(CudaError(format!("{what}: {error}; {last}")))
    }
}

/// NCCL, with libtorch's CUDA half loaded before it. Opened once in a process.
pub(super) fn api() -> Result<&'static Api, CudaError> {
    static API: OnceLock<Result<Api, String>> = OnceLock::new();
    super::load()?;
    let opened = API.get_or_init(open).as_ref();
    opened.map_err(|why| {
        CudaError(format!(
            "NCCL cannot be loaded ({why}); install the full CUDA set beside libtorch"
        ))
    })
}

fn open() -> Result<Api, String> {
    let mut why = String::new();
    for name in NAMES {
        // SAFETY: NCCL's initialisers do nothing that this process must be prepared for; with
        // libtorch's CUDA half they have run already.
        match unsafe { Library::open(Some(name), RTLD_NOW | RTLD_LOCAL) } {
            Ok(library) => {
                // SAFETY: it is NCCL 2 by its name.
                let api = unsafe { Api::resolve(&library) }.map_err(|e| e.to_string())?;
                // Stays mapped until the process ends: functions are in use.
                let _ = library.into_raw();
                return Ok(api);
            }
            Err(e) if why.is_empty() => why = e.to_string(),
            Err(_) => {}
        }
    }
    Err(why)
}
