//! Builds the C++ kernels, once per instruction set, and passes libtorch's folder on to the crates
//! that link it.
use std::env;
use std::path::{Path, PathBuf};

const SOURCES: &[&str] = &[
    "attention.cpp",
    "elementwise.cpp",
    "linear.cpp",
    "pack.cpp",
    "rope.cpp",
    "table.cpp",
];

/// Name of an instruction set (see `src/cpu/ffi.rs`) and the flags that select it.
fn instruction_sets(arch: &str) -> &'static [(&'static str, &'static [&'static str])] {
    const AVX2: &[&str] = &["-mavx2", "-mfma", "-mf16c"];
    const AVX512: &[&str] = &[
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
    ];
    match arch {
        "x86_64" => &[("baseline", &[]), ("avx2", AVX2), ("avx512", AVX512)],
        _ => &[("baseline", &[])],
    }
}

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=csrc");
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("set by cargo");
    let os = env::var("CARGO_CFG_TARGET_OS").expect("set by cargo");
    let out = PathBuf::from(env::var("OUT_DIR").expect("set by cargo"));
    for (isa, flags) in instruction_sets(&arch) {
        let mut build = cc::Build::new();
        build
            .cpp(true)
            .std("c++17")
            .cpp_link_stdlib(None)
            .out_dir(out.join(isa))
            .define("TE_ISA", *isa)
            // Whatever the cargo profile: a debug build of the engine must still run a model.
            .opt_level(3)
            .debug(false)
            .warnings(true)
            .flag("-fno-exceptions")
            .flag("-fno-rtti")
            // Results must not depend on where the compiler would fuse; fma is explicit.
            .flag("-ffp-contract=off")
            .flag("-fno-math-errno")
            .flag("-fno-trapping-math");
        if os == "linux" {
            // The runtime is libtorch's own libgomp (same soname, found through the rpath), so
            // both share one pool of threads.
            build.flag("-fopenmp");
        }
        for flag in *flags {
            build.flag(flag);
        }
        for source in SOURCES {
            build.file(format!("csrc/cpu/{source}"));
        }
        build.compile(&format!("torch_ext_{isa}"));
    }
    if let Ok(lib) = env::var("DEP_TCH_LIBTORCH_LIB") {
        if env::var_os("CARGO_FEATURE_CUDA").is_some() {
            build_cuda_shim(&PathBuf::from(&lib), &out);
        }
        println!("cargo:libtorch_lib={lib}");
        println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
        if os == "linux" {
            println!("cargo:rustc-link-search=native={lib}");
            println!("cargo:rustc-link-lib=dylib:+verbatim=libgomp.so.1");
        }
    }
}

/// Builds `csrc/cuda/shim.cpp` into a shared object that the crate embeds. Its symbols are resolved
/// when it is opened, so nothing is linked here.
fn build_cuda_shim(lib: &Path, out: &Path) {
    let torch = lib.parent().expect("libtorch/lib has a parent");
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .debug(false)
        .warnings(false)
        .pic(true)
        .include(torch.join("include"));
    // CUDA's own headers: beside libtorch (scripts/bootstrap, pip) or from a toolkit.
    let beside = torch.parent().map(|site| site.join("nvidia/cu13/include"));
    let toolkit = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("include"));
    let default = PathBuf::from("/usr/local/cuda/include");
    let candidates = beside.into_iter().chain(toolkit).chain([default]);
    for folder in candidates.filter(|folder| folder.join("cuda_runtime_api.h").exists()) {
        build.include(folder);
    }
    let mut command = build.get_compiler().to_command();
    let target = out.join("libtorch_ext_cuda.so");
    command
        .args(["-shared", "csrc/cuda/shim.cpp", "-o"])
        .arg(&target);
    let status = command.status().expect("the C++ compiler starts");
    assert!(
        status.success(),
        "csrc/cuda/shim.cpp does not compile: the `cuda` feature needs libtorch with CUDA and the \
         headers of CUDA 13 beside it (scripts/bootstrap fetches both)"
    );
}
