//! Compiles `csrc/cuda/*.cu` with NVRTC, and keeps the machine code on disk.
//!
//! The kernels include nothing but `common.cuh`, which is handed over from memory: a machine that
//! runs them needs the NVRTC library and no CUDA headers.

use std::ffi::{CStr, CString, c_char};
use std::fs;
use std::path::PathBuf;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::nvrtc::sys;
use xxhash_rust::xxh3::xxh3_128;

use super::CudaError;

/// One `.cu` file.
#[derive(Debug)]
pub struct Source {
    /// Its name, for messages.
    pub name: &'static str,
    /// What it says.
    pub text: &'static str,
    /// Definitions that it is compiled with somewhere: what [`compile_all`] tries. An entry is a
    /// list of `NAME` or `NAME=VALUE`.
    pub variants: &'static [&'static [&'static str]],
}

/// What `#include "common.cuh"` means.
const COMMON: &str = include_str!("../../csrc/cuda/common.cuh");

/// Architectures that the kernels are checked for: `sm_` yields machine code, `compute_` yields
/// PTX, which the driver of a later one translates.
pub const ARCHITECTURES: &[&str] = &["sm_80", "sm_89", "sm_90a", "compute_80"];

/// The name of NVRTC's target for a device of this compute capability.
pub(super) fn architecture(major: i32, minor: i32) -> String {
    match (major, minor) {
        // Only the `a` target has wgmma.
        (9, 0) => "sm_90a".to_owned(),
        _ => format!("sm_{major}{minor}"),
    }
}

/// Machine code (or PTX, for a `compute_` architecture) of `source` with `defines`, from the cache
/// if it is there.
pub(super) fn compiled(
    source: &Source,
    defines: &[String],
    arch: &str,
) -> Result<Vec<u8>, CudaError> {
    let version = nvrtc_version()?;
    let mut key = format!("{version:?} {arch} {defines:?}\n{COMMON}\n").into_bytes();
    key.extend_from_slice(source.text.as_bytes());
    let key = xxh3_128(&key);
    let file =
        cache_folder().map(|folder| folder.join(format!("{}-{key:032x}.cubin", source.name)));
    if let Some(code) = file.as_ref().and_then(|file| fs::read(file).ok())
        && let Some(code) = unseal(&code)
    {
        return Ok(code.to_vec());
    }
    let code = compile(source, defines, arch)?;
    if let Some(file) = file
        && let Err(e) = store(&file, &code)
    {
        // The next start compiles again: slower, not wrong.
        eprintln!("kernel cache: cannot write {}: {e}", file.display());
    }
    Ok(code)
}

/// `$NANO_VLLM_CACHE`, or the user's cache folder.
fn cache_folder() -> Option<PathBuf> {
    let set = |name: &str| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    set("NANO_VLLM_CACHE")
        .or_else(|| Some(set("XDG_CACHE_HOME")?.join("nano-vllm")))
        .or_else(|| Some(set("HOME")?.join(".cache/nano-vllm")))
        .map(|folder| folder.join("kernels"))
}

/// Whoever reads the file meanwhile sees the old one or the new one, never half of it.
fn store(file: &std::path::Path, code: &[u8]) -> std::io::Result<()> {
    let folder = file.parent().unwrap_or(file);
    fs::create_dir_all(folder)?;
    let mut sealed = xxh3_128(code).to_le_bytes().to_vec();
    sealed.extend_from_slice(code);
    // Ranks that are threads of one process compile the same programs.
    static DRAFTS: AtomicU64 = AtomicU64::new(0);
    let (process, draft) = (std::process::id(), DRAFTS.fetch_add(1, Ordering::Relaxed));
    let draft = file.with_extension(format!("{process}-{draft}.tmp"));
    fs::write(&draft, sealed)?;
    fs::rename(&draft, file)
}

/// The code of a cached file, unless it was cut short or changed.
fn unseal(sealed: &[u8]) -> Option<&[u8]> {
    let (hash, code) = sealed.split_at_checked(16)?;
    (xxh3_128(code).to_le_bytes() == hash).then_some(code)
}

/// Compiles every variant of `sources` for every one of [`ARCHITECTURES`], past the cache. Needs
/// NVRTC, but no GPU. Returns how many programs were compiled.
pub fn compile_all(sources: &[&Source]) -> Result<usize, CudaError> {
    let mut count = 0;
    for source in sources {
        for variant in source.variants {
            let defines: Vec<String> = variant.iter().map(|d| (*d).to_owned()).collect();
            for arch in ARCHITECTURES {
                compile(source, &defines, arch)?;
                count += 1;
            }
        }
    }
    Ok(count)
}

fn nvrtc_version() -> Result<(i32, i32), CudaError> {
    // SAFETY: looks for the library, no more.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError(
            "NVRTC (libnvrtc.so.13) was not found; install the full CUDA set beside libtorch"
                .into(),
        ));
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: valid places for the results.
    let result = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    check(result, "nvrtcVersion")?;
    Ok((major, minor))
}

fn check(result: sys::nvrtcResult, what: &str) -> Result<(), CudaError> {
    match result {
        sys::nvrtcResult::NVRTC_SUCCESS => Ok(()),
        other => Err(CudaError(format!("{what}: {other:?}"))),
    }
}

/// A program that is destroyed whatever happens.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

fn compile(source: &Source, defines: &[String], arch: &str) -> Result<Vec<u8>, CudaError> {
    nvrtc_version()?;
    let c = |text: &str| CString::new(text).map_err(|e| CudaError(e.to_string()));
    let (text, name) = (c(source.text)?, c(&format!("{}.cu", source.name))?);
    let (header, header_name) = (c(COMMON)?, c("common.cuh")?);
    let mut program = Program(ptr::null_mut());
    // SAFETY: all strings live, one header.
    let created = unsafe {
        sys::nvrtcCreateProgram(
            &mut program.0,
            text.as_ptr(),
            name.as_ptr(),
            1,
            [header.as_ptr()].as_ptr(),
            [header_name.as_ptr()].as_ptr(),
        )
    };
    check(created, "nvrtcCreateProgram")?;
    let mut options = vec![
        c("--std=c++17")?,
        c("-default-device")?,
        c(&format!("-arch={arch}"))?,
    ];
    for define in defines {
        options.push(c(&format!("-D{define}"))?);
    }
    let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
    // SAFETY: as many options as said, all alive.
    let result =
        unsafe { sys::nvrtcCompileProgram(program.0, pointers.len() as i32, pointers.as_ptr()) };
    if result != sys::nvrtcResult::NVRTC_SUCCESS {
        let (name, log) = (source.name, log(&program));
        return Err(CudaError(format!(
            "{name}.cu {defines:?} for {arch}: {result:?}\n{log}"
        )));
    }
    let mut size = 0;
    let cubin = arch.starts_with("sm_");
    // SAFETY: valid places; the buffer has the size that NVRTC says.
    unsafe {
        let sized = match cubin {
            true => sys::nvrtcGetCUBINSize(program.0, &mut size),
            false => sys::nvrtcGetPTXSize(program.0, &mut size),
        };
        check(sized, "size of the program")?;
        let mut code = vec![0u8; size];
        let got = match cubin {
            true => sys::nvrtcGetCUBIN(program.0, code.as_mut_ptr().cast()),
            false => sys::nvrtcGetPTX(program.0, code.as_mut_ptr().cast()),
        };
        check(got, "code of the program")?;
        Ok(code)
    }
}

fn log(program: &Program) -> String {
    let mut size = 0;
    // SAFETY: valid places; the buffer has the size that NVRTC says, its end included.
    unsafe {
        if sys::nvrtcGetProgramLogSize(program.0, &mut size) != sys::nvrtcResult::NVRTC_SUCCESS {
            return String::new();
        }
        let mut log = vec![0u8; size.max(1)];
        sys::nvrtcGetProgramLog(program.0, log.as_mut_ptr().cast());
        CStr::from_bytes_until_nul(&log)
            .map(|log| log.to_string_lossy().into_owned())
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_cache_file_is_not_used() {
        let folder = std::env::temp_dir().join(format!("nano-vllm-seal-{}", std::process::id()));
        let file = folder.join("a.cubin");
        store(&file, b"machine code").unwrap();
        let mut sealed = fs::read(&file).unwrap();
        assert_eq!(unseal(&sealed), Some(b"machine code".as_slice()));
        assert_eq!(unseal(&sealed[..sealed.len() - 1]), None);
        assert_eq!(unseal(&sealed[..7]), None);
        sealed[20] ^= 1;
        assert_eq!(unseal(&sealed), None);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn only_hopper_has_a_target_of_its_own() {
        assert_eq!(architecture(9, 0), "sm_90a");
        assert_eq!(architecture(8, 9), "sm_89");
    }
}
