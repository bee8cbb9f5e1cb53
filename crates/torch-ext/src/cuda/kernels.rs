//! The project's own kernels on one device. Each topic adds its functions to [`Kernels`] in a file
//! of its own; this one finds the code and starts it.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::sys;
use tch::{Device, Tensor};

use super::ahead::{Ahead, Program};
use super::compile::{Source, architecture, compiled};
use super::stream::current_stream;
use super::tensor_map::TensorMap;
use super::{CudaError, load};
use crate::Error;

/// Kernels for one device, compiled when they are first needed or, before that, by a rehearsal. All run on libtorch's current
/// stream of the calling thread, and may be captured in a graph once they were compiled.
#[derive(Debug)]
pub struct Kernels {
    device: usize,
    arch: String,
    capability: (i32, i32),
    num_sms: usize,
    functions: Mutex<HashMap<Key, Function>>,
    modules: Mutex<HashMap<Program, Module>>,
    ahead: Ahead,
    rehearsing: AtomicBool,
}

type Key = (&'static str, &'static str, Defines);
/// `NAME=VALUE` pairs, in a form that is cheap to look up.
pub(crate) type Defines = smallvec::SmallVec<[(&'static str, i64); 6]>;

#[derive(Clone, Copy, Debug)]
struct Module(sys::CUmodule);
/// A kernel that can be launched; null in a rehearsal.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Function(sys::CUfunction);

// SAFETY: handles of the driver, valid in every thread that has the device's context.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Send for Function {}

/// How to launch a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launch {
    pub(crate) grid: [u32; 3],
    pub(crate) block: u32,
    /// Dynamic shared memory, in bytes.
    pub(crate) shared: u32,
    /// Programmatic dependent launch: the kernel may start while the one before it drains, and
    /// calls `pdl_wait()` before it reads what that one wrote. Ignored before compute capability
    /// 9.0, where the macros do nothing.
    pub(crate) pdl: bool,
    /// Blocks of a thread block cluster along x (1 for none).
    pub(crate) cluster: u32,
}

impl Launch {
    /// A plain launch.
    pub(crate) fn new(grid: [u32; 3], block: u32) -> Self {
        Self {
            grid,
            block,
            shared: 0,
            pdl: false,
            cluster: 1,
        }
    }

    pub(crate) fn shared(self, bytes: u32) -> Self {
        Self {
            shared: bytes,
            ..self
        }
    }

    pub(crate) fn pdl(self) -> Self {
        Self { pdl: true, ..self }
    }
}

/// One kernel argument.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Arg<'a> {
    /// Its bits. A kernel reads as many of the eight bytes as its type has.
    Bits(u64),
    /// A `const __grid_constant__ TensorMap`.
    Map(&'a TensorMap),
}

impl From<&Tensor> for Arg<'_> {
    fn from(tensor: &Tensor) -> Self {
        Arg::Bits(tensor.data_ptr() as u64)
    }
}

impl From<Option<&Tensor>> for Arg<'_> {
    fn from(tensor: Option<&Tensor>) -> Self {
        tensor.map_or(Arg::Bits(0), Arg::from)
    }
}

impl From<i32> for Arg<'_> {
    fn from(value: i32) -> Self {
        Arg::Bits(u64::from(value as u32))
    }
}

impl From<i64> for Arg<'_> {
    fn from(value: i64) -> Self {
        Arg::Bits(value as u64)
    }
}

impl From<f32> for Arg<'_> {
    fn from(value: f32) -> Self {
        Arg::Bits(u64::from(value.to_bits()))
    }
}

impl<'a> From<&'a TensorMap> for Arg<'a> {
    fn from(map: &'a TensorMap) -> Self {
        Arg::Map(map)
    }
}

impl Kernels {
    /// Kernels for a device. Fails if there is no such device or CUDA cannot be used.
    pub fn new(device: usize) -> Result<Self, CudaError> {
        load()?;
        let count = super::device_count();
        if device >= count {
            return Err(CudaError(format!(
                "there is no device {device}: {count} were found"
            )));
        }
        // Makes the device's context the current one of this thread.
        let _ = Tensor::f_zeros([1], (tch::Kind::Float, Device::Cuda(device)))
            .map_err(|e| CudaError(e.to_string()))?;
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: a valid place for the result.
            let result = unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device as i32) };
            check(result, "cuDeviceGetAttribute").map(|()| value)
        };
        use sys::CUdevice_attribute_enum as attr;
        let major = attribute(attr::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(attr::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if major < 8 {
            return Err(CudaError(format!(
                "the GPU has compute capability {major}.{minor}; at least 8.0 (Ampere) is needed"
            )));
        }
        Ok(Self {
            device,
            arch: architecture(major, minor),
            capability: (major, minor),
            num_sms: attribute(attr::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
            functions: Mutex::default(),
            modules: Mutex::default(),
            ahead: Ahead::default(),
            rehearsing: AtomicBool::new(false),
        })
    }

    /// The device.
    pub fn device(&self) -> Device {
        Device::Cuda(self.device)
    }

    /// Its number.
    pub fn device_index(&self) -> usize {
        self.device
    }

    /// How many multiprocessors it has.
    pub fn num_sms(&self) -> usize {
        self.num_sms
    }

    /// Its compute capability, major and minor.
    pub fn capability(&self) -> (i32, i32) {
        self.capability
    }

    /// Waits for all that a rehearsal has begun.
    pub fn finish_rehearsal(&self) {
        self.ahead.finish();
    }

    /// The entry point `entry` of `source`, compiled with `defines`.
    pub(crate) fn function(
        &self,
        source: &'static Source,
        entry: &'static str,
        defines: &[(&'static str, i64)],
    ) -> Result<Function, Error> {
        let key: Key = (source.name, entry, defines.into());
        // A panic while the lock was held cannot leave half an entry: keep going.
        let mut functions = self.functions.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(function) = functions.get(&key) {
            return Ok(*function);
        }
        if self.rehearsing.load(Ordering::Relaxed) {
            self.ahead.start(source, named(defines), &self.arch);
            return Ok(Function(ptr::null_mut()));
        }
        let function = self.resolve(source, entry, defines)?;
        functions.insert(key, function);
        Ok(function)
    }

    /// Does `work` without our kernels: those that it would launch for the first time are compiled
    /// meanwhile, on other threads, and nothing is launched in their place. So all kernels of a
    /// program can be compiled at a time, in as long as it takes for one after the other to be asked
    /// for. What `work` computes is worth nothing; it must bear any values. For kernels that have launched
    /// nothing yet: those that are known already run, on what the others did not write. Whoever launches a kernel
    /// afterwards waits for it; [`finish_rehearsal`](Self::finish_rehearsal) waits for all.
    pub fn rehearse<T>(&self, work: impl FnOnce() -> T) -> T {
        /// Ends the rehearsal, also by a panic.
        struct End<'a>(&'a AtomicBool);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.store(false, Ordering::Relaxed);
            }
        }
        self.rehearsing.store(true, Ordering::Relaxed);
        let _end = End(&self.rehearsing);
        work()
    }

    fn resolve(
        &self,
        source: &'static Source,
        entry: &str,
        defines: &[(&'static str, i64)],
    ) -> Result<Function, CudaError> {
        let program = (source.name, named(defines));
        let mut modules = self.modules.lock().unwrap_or_else(|e| e.into_inner());
        let module = match modules.get(&program) {
            Some(module) => *module,
            None => {
                let code = match self.ahead.take(&program) {
                    Some(code) => code?,
                    None => compiled(source, &program.1, &self.arch)?,
                };
                let mut module = ptr::null_mut();
                // SAFETY: an image that NVRTC made for this device.
                let result = unsafe { sys::cuModuleLoadData(&mut module, code.as_ptr().cast()) };
                check(result, "cuModuleLoadData")?;
                modules.insert(program, Module(module));
                Module(module)
            }
        };
        let name = CString::new(entry).map_err(|e| CudaError(e.to_string()))?;
        let mut function = ptr::null_mut();
        // SAFETY: the module is loaded and never unloaded.
        let result = unsafe { sys::cuModuleGetFunction(&mut function, module.0, name.as_ptr()) };
        check(result, entry)?;
        // Allows all the shared memory that the device has; what a launch takes is its business.
        let mut most = 0;
        // SAFETY: valid places and handles.
        unsafe {
            use sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as MOST;
            use sys::CUfunction_attribute_enum as attr;
            check(
                sys::cuDeviceGetAttribute(&mut most, MOST, self.device as i32),
                entry,
            )?;
            let mut fixed = 0;
            let shared = attr::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
            check(sys::cuFuncGetAttribute(&mut fixed, shared, function), entry)?;
            let dynamic = attr::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            check(
                sys::cuFuncSetAttribute(function, dynamic, most - fixed),
                entry,
            )?;
        }
        Ok(Function(function))
    }

    /// Starts a kernel on the current stream.
    ///
    /// # Safety
    /// `args` must be what the kernel takes, in number, order and type, and it must stay within
    /// the tensors that they point to.
    pub(crate) unsafe fn launch(
        &self,
        function: Function,
        launch: &Launch,
        args: &[Arg<'_>],
    ) -> Result<(), Error> {
        if function.0.is_null() {
            return Ok(());
        }
        // The driver reads the arguments through these pointers, and writes nothing.
        let mut pointers: smallvec::SmallVec<[*mut c_void; 32]> = args
            .iter()
            .map(|arg| match arg {
                Arg::Bits(bits) => ptr::from_ref(bits).cast_mut().cast(),
                Arg::Map(map) => map.as_ptr().cast_mut().cast(),
            })
            .collect();
        let mut attributes: smallvec::SmallVec<[sys::CUlaunchAttribute; 2]> = smallvec::smallvec![];
        if launch.pdl && self.capability.0 >= 9 {
            attributes.push(attribute(
                sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                |value| value.programmaticStreamSerializationAllowed = 1,
            ));
        }
        if launch.cluster > 1 {
            attributes.push(attribute(
                sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
                |value| {
                    // SAFETY: plain numbers in a union.
                    let dim = unsafe { &mut value.clusterDim };
                    (dim.x, dim.y, dim.z) = (launch.cluster, 1, 1);
                },
            ));
        }
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared,
            hStream: current_stream(self.device)?.cast(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        // SAFETY: the configuration and the arguments live until the call returns (the driver
        // copies them); what the kernel does with them is the caller's promise.
        let result = unsafe {
            sys::cuLaunchKernelEx(&config, function.0, pointers.as_mut_ptr(), ptr::null_mut())
        };
        check(result, "cuLaunchKernelEx").map_err(Error::from)
    }
}

fn named(defines: &[(&'static str, i64)]) -> Vec<String> {
    defines.iter().map(|(n, v)| format!("{n}={v}")).collect()
}

fn attribute(
    id: sys::CUlaunchAttributeID,
    set: impl FnOnce(&mut sys::CUlaunchAttributeValue),
) -> sys::CUlaunchAttribute {
    // SAFETY: a C structure of numbers and pointers, for which zero is a value.
    let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = id;
    set(&mut attribute.value);
    attribute
}

pub(super) fn check(result: sys::CUresult, what: &str) -> Result<(), CudaError> {
    match result {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        other => Err(CudaError(format!("{what}: {other:?}"))),
    }
}
