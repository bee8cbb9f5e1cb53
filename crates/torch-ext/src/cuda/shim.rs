//! The C functions of `csrc/cuda/shim.cpp`, opened at run time.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LOCAL, RTLD_NOW};

use super::{CudaError, LoadError};

/// The shared object that `build.rs` made of `csrc/cuda/shim.cpp`.
const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/libtorch_ext_cuda.so"));

/// A message, or null.
type Message = *mut c_char;

macro_rules! functions {
    ($($name:ident ( $($arg:ident : $type:ty),* );)*) => {
        /// Entry points, one for each function of the shim.
        #[derive(Debug)]
        pub(super) struct Shim {
            free: unsafe extern "C" fn(Message),
            $($name: unsafe extern "C" fn($($type),*) -> Message,)*
        }

        impl Shim {
            /// # Safety
            /// `library` must be the shim.
            unsafe fn resolve(library: &Library) -> Result<Self, libloading::Error> {
                // SAFETY: the types are those of the C++ file.
                unsafe {
                    Ok(Self {
                        free: *library.get(b"te_free\0")?,
                        $($name: *library.get(concat!("te_", stringify!($name), "\0").as_bytes())?,)*
                    })
                }
            }

            $(
                /// # Safety
                /// As the C++ function demands: pointers must be valid for what it does with them.
                pub(super) unsafe fn $name(&self, $($arg: $type),*) -> Result<(), CudaError> {
                    // SAFETY: the caller's.
                    self.check(unsafe { (self.$name)($($arg),*) })
                }
            )*
        }
    };
}

functions! {
    stream_new(device: c_int, out: *mut *mut c_void);
    stream_set(device: c_int, stream: *mut c_void);
    stream_current(device: c_int, out: *mut *mut c_void);
    stream_synchronize(device: c_int);
    device_synchronize(device: c_int);
    copy_async(dst: *const c_void, src: *const c_void);
    pin(tensor: *mut c_void, keep: c_int);
    memory(device: c_int, free: *mut u64, total: *mut u64, allocated: *mut u64, reserved: *mut u64);
    memory_release();
    graph_pool(pool: *mut u64);
    graph_begin(pool: *const u64, out: *mut *mut c_void);
    graph_end(graph: *mut c_void);
    graph_replay(graph: *mut c_void);
    graph_free(graph: *mut c_void);
    event_new(device: c_int, timing: c_int, out: *mut *mut c_void);
    event_free(event: *mut c_void);
    event_record(event: *mut c_void, device: c_int);
    event_wait(event: *mut c_void, device: c_int);
    event_synchronize(event: *mut c_void);
    event_query(event: *mut c_void, done: *mut c_int);
    event_elapsed(start: *mut c_void, end: *mut c_void, ms: *mut f32);
}

impl Shim {
    fn check(&self, message: Message) -> Result<(), CudaError> {
        if message.is_null() {
            return Ok(());
        }
        // SAFETY: the shim returns null or a C string that we free.
        let text = unsafe { CStr::from_ptr(message) }
            .to_string_lossy()
            .into_owned();
        // SAFETY: made by the shim, freed once.
        unsafe { (self.free)(message) };
        Err(CudaError(text))
    }
}

/// The shim, with libtorch's CUDA half loaded before it. Opened once in a process.
pub(super) fn shim() -> Result<&'static Shim, LoadError> {
    static SHIM: OnceLock<Result<Shim, LoadError>> = OnceLock::new();
    SHIM.get_or_init(open).as_ref().map_err(Clone::clone)
}

fn open() -> Result<Shim, LoadError> {
    let failed = |e: &dyn std::fmt::Display| LoadError::Library(e.to_string());
    // SAFETY: the library's initialisers register kernels with the libtorch of this process,
    // which is what loading it is for; it comes from the folder of that same libtorch.
    let torch = unsafe { Library::open(Some("libtorch_cuda.so"), RTLD_NOW | RTLD_GLOBAL) };
    let torch = torch.map_err(|e| failed(&e))?;
    // SAFETY: plain system call with a C string.
    let fd = unsafe { libc::memfd_create(c"libtorch_ext_cuda".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(failed(&std::io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is ours and open.
    let mut file = unsafe { std::fs::File::from_raw_fd(fd) };
    file.write_all(IMAGE).map_err(|e| failed(&e))?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    // SAFETY: our own code, which has no initialiser.
    let library =
        unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(|e| failed(&e))?;
    // SAFETY: it is the shim.
    let shim = unsafe { Shim::resolve(&library) }.map_err(|e| failed(&e))?;
    // Both stay mapped until the process ends: kernels are registered, functions are in use.
    let _ = (torch.into_raw(), library.into_raw());
    Ok(shim)
}
