//! What this machine can do at most, to hold measurements against: the kernels' figures mean
//! little on a shared or unknown CPU without these two, measured in the same run.

use std::time::Instant;

use super::{ffi, threads};

/// Read bandwidth in bytes/s: the best of `rounds` passes over `buffer` (make it far larger than
/// the last-level cache).
pub fn read_bandwidth(buffer: &[f32], rounds: usize) -> f64 {
    let pass = || {
        let start = Instant::now();
        // SAFETY: the slice is valid for its length.
        let sum = unsafe { (ffi::kernels().roof_read)(buffer.as_ptr(), buffer.len(), threads()) };
        std::hint::black_box(sum);
        size_of_val(buffer) as f64 / start.elapsed().as_secs_f64()
    };
    (0..rounds).map(|_| pass()).fold(0.0, f64::max)
}

/// Float32 operations/s of independent fused multiply-adds in registers (two operations each):
/// the best of `rounds` short runs.
pub fn fma_peak(rounds: usize) -> f64 {
    const STEPS: usize = 2_000_000;
    let lanes = match ffi::InstructionSet::detect() {
        ffi::InstructionSet::Baseline => 4,
        ffi::InstructionSet::Avx2 => 8,
        ffi::InstructionSet::Avx512 => 16,
    };
    let run = || {
        let threads = threads();
        let start = Instant::now();
        // SAFETY: takes no memory.
        std::hint::black_box(unsafe { (ffi::kernels().roof_fma)(STEPS, threads) });
        (STEPS * 12 * lanes * 2 * threads as usize) as f64 / start.elapsed().as_secs_f64()
    };
    (0..rounds).map(|_| run()).fold(0.0, f64::max)
}
