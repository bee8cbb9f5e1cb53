//! The C interface of `csrc/cpu/api.h`, field by field, and the choice of the instruction set.

use std::ffi::c_void;

#[repr(C)]
pub(super) struct Pack {
    pub panels: *mut c_void,
    pub dtype: i32,
    pub k: usize,
    pub row: usize,
    pub rows: usize,
    pub src: *const c_void,
    pub src_dtype: i32,
    pub src_stride: usize,
    pub threads: i32,
}

#[repr(C)]
pub(super) struct Linear {
    pub panels: *const c_void,
    pub dtype: i32,
    pub n: usize,
    pub k: usize,
    pub x: *const f32,
    pub m: usize,
    pub bias: *const f32,
    pub y: *mut f32,
    pub accumulate: i32,
    pub threads: i32,
}

#[repr(C)]
pub(super) struct Embedding {
    pub panels: *const c_void,
    pub dtype: i32,
    pub k: usize,
    pub ids: *const i64,
    pub t: usize,
    pub y: *mut f32,
    pub threads: i32,
}

#[repr(C)]
pub(super) struct RmsNorm {
    pub residual: *mut f32,
    pub x: *const f32,
    pub weight: *const f32,
    pub y: *mut f32,
    pub rows: usize,
    pub dim: usize,
    pub eps: f32,
    pub threads: i32,
}

#[repr(C)]
pub(super) struct SiluMul {
    pub gate_up: *const f32,
    pub y: *mut f32,
    pub rows: usize,
    pub dim: usize,
    pub threads: i32,
}

#[repr(C)]
pub(super) struct Rope {
    pub qkv: *const f32,
    pub q_norm: *const f32,
    pub k_norm: *const f32,
    pub eps: f32,
    pub cos: *const f32,
    pub sin: *const f32,
    pub rotary: usize,
    pub positions: *const i64,
    pub slots: *const i64,
    pub q: *mut f32,
    pub k_cache: *mut c_void,
    pub v_cache: *mut c_void,
    pub kv_dtype: i32,
    pub t: usize,
    pub hq: usize,
    pub hkv: usize,
    pub d: usize,
    pub block_size: usize,
    pub threads: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AttentionTask {
    pub seq: u32,
    pub token: u32,
    pub position: u32,
    pub count: u32,
}

#[repr(C)]
pub(super) struct Attention {
    pub q: *const f32,
    pub k_cache: *const c_void,
    pub v_cache: *const c_void,
    pub kv_dtype: i32,
    pub block_tables: *const i32,
    pub max_blocks: usize,
    pub tasks: *const AttentionTask,
    pub num_tasks: usize,
    pub max_count: usize,
    pub hq: usize,
    pub hkv: usize,
    pub d: usize,
    pub block_size: usize,
    pub scale: f32,
    pub window: usize,
    pub soft_cap: f32,
    pub out: *mut f32,
    pub scratch: *mut f32,
    pub scratch_stride: usize,
    pub threads: i32,
}

#[repr(C)]
pub(super) struct Kernels {
    pub pack: unsafe extern "C" fn(*const Pack),
    pub linear: unsafe extern "C" fn(*const Linear),
    pub embedding: unsafe extern "C" fn(*const Embedding),
    pub rms_norm: unsafe extern "C" fn(*const RmsNorm),
    pub silu_mul: unsafe extern "C" fn(*const SiluMul),
    pub rope: unsafe extern "C" fn(*const Rope),
    pub attention_scratch: unsafe extern "C" fn(rows: usize, d: usize) -> usize,
    pub attention: unsafe extern "C" fn(*const Attention),
    pub exp: unsafe extern "C" fn(*const f32, *mut f32, usize),
    pub roof_read: unsafe extern "C" fn(*const f32, usize, i32) -> f32,
    pub roof_fma: unsafe extern "C" fn(usize, i32) -> f32,
}

unsafe extern "C" {
    static te_kernels_baseline: Kernels;
    #[cfg(target_arch = "x86_64")]
    static te_kernels_avx2: Kernels;
    #[cfg(target_arch = "x86_64")]
    static te_kernels_avx512: Kernels;
}

/// Instruction sets that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstructionSet {
    /// What every CPU of the architecture has (SSE2; NEON on aarch64).
    Baseline,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL and DQ.
    Avx512,
}

impl InstructionSet {
    /// The widest one that this CPU has. Results of two instruction sets may differ in the last
    /// bits; on one CPU it is always the same one.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx2") && has!("fma") && has!("f16c") {
                let wide = has!("avx512f") && has!("avx512bw") && has!("avx512vl");
                return if wide && has!("avx512dq") {
                    Self::Avx512
                } else {
                    Self::Avx2
                };
            }
        }
        Self::Baseline
    }

    /// The kernels. Not public: a set that this CPU lacks would be an illegal instruction.
    pub(super) fn kernels(self) -> &'static Kernels {
        // SAFETY: the tables are constants defined in `csrc/cpu/table.cpp`, with the layout of
        // `Kernels`.
        unsafe {
            match self {
                Self::Baseline => &te_kernels_baseline,
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 => &te_kernels_avx2,
                #[cfg(target_arch = "x86_64")]
                Self::Avx512 => &te_kernels_avx512,
                #[cfg(not(target_arch = "x86_64"))]
                _ => &te_kernels_baseline,
            }
        }
    }
}

/// The kernels for this CPU. Feature detection is cached by the standard library.
#[cfg(not(test))]
pub(super) fn kernels() -> &'static Kernels {
    InstructionSet::detect().kernels()
}

#[cfg(test)]
pub(super) use under_test::kernels;

/// Unit tests choose among the sets that the CPU has.
#[cfg(test)]
pub(super) mod under_test {
    use std::cell::Cell;

    use super::{InstructionSet, Kernels};

    thread_local! {
        static CHOSEN: Cell<Option<InstructionSet>> = const { Cell::new(None) };
    }

    pub(in super::super) fn kernels() -> &'static Kernels {
        CHOSEN
            .get()
            .unwrap_or_else(InstructionSet::detect)
            .kernels()
    }

    /// Runs `f` with the kernels of each set that this CPU has, narrowest first.
    pub(in super::super) fn with_each_set<R>(f: impl Fn() -> R) -> Vec<(InstructionSet, R)> {
        use InstructionSet::{Avx2, Avx512, Baseline};
        let widest = InstructionSet::detect();
        let sets = [Baseline, Avx2, Avx512].into_iter();
        let count = 1 + sets
            .clone()
            .position(|s| s == widest)
            .expect("one of the three");
        sets.take(count)
            .map(|set| {
                CHOSEN.set(Some(set));
                let result = f();
                CHOSEN.set(None);
                (set, result)
            })
            .collect()
    }
}
