//! How `gemv.cu` is built and launched for a problem.

// As in the source.
const WARPS: usize = 8;
pub(super) const THREADS: usize = 32 * WARPS;
const CHUNK: usize = 64;
const ITEM_BYTES: usize = 4 * THREADS * 16;

/// Most rows of x that the kernel takes.
pub(super) const MAX_ROWS: usize = 32;
/// Most elements of x that every thread block normalizes for itself. For more, a kernel of its own
/// does it once.
const MAX_NORM: usize = 8192;
/// Most bytes of x that stay in shared memory where a thread block needs each once; a third of that memory, if it is more,
/// where it needs them again for every group of its tiles. Otherwise they go through the pipeline with the weights.
const MAX_X: usize = 40 << 10;

/// What is asked of the kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Problem {
    pub(super) tokens: usize,
    /// Columns of the result.
    pub(super) outputs: usize,
    pub(super) k: usize,
    pub(super) norm: bool,
    pub(super) silu: bool,
}

/// How the kernel is built and launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Tiles that a thread block works on at a time.
    pub(super) r: usize,
    /// Groups of eight tokens.
    pub(super) nt: usize,
    pub(super) stages: usize,
    pub(super) x_stream: bool,
    pub(super) blocks: usize,
    pub(super) shared: usize,
}

/// Bytes of shared memory that a thread block may have, and that a multiprocessor has.
fn shared_memory(capability: (i32, i32)) -> (usize, usize) {
    let kib = |block: usize, all: usize| (block << 10, all << 10);
    match capability {
        (8, 0) | (8, 7) => kib(163, 164),
        (8, _) | (12, _) => kib(99, 100),
        _ => kib(227, 228),
    }
}

/// How to compute `problem`, unless it does not fit. The figures were chosen by measurement on an
/// H100 (`examples/cuda_bench_gemv.rs`).
pub(super) fn plan(problem: Problem, num_sms: usize, capability: (i32, i32)) -> Option<Plan> {
    let Problem {
        tokens,
        outputs,
        k,
        norm,
        silu,
    } = problem;
    let nt = match tokens {
        0..=8 => 1,
        9..=16 => 2,
        17..=MAX_ROWS => 4,
        _ => return None,
    };
    let tiles = outputs.div_ceil(if silu { 8 } else { 16 });
    // One wave where that takes up to three tiles; beyond, as many as share x well.
    let r = match tiles.div_ceil(num_sms) {
        n @ ..=3 => n.max(1),
        _ => nt.min(2),
    };
    let chunks = k.div_ceil(CHUNK);
    let x_resident = tokens * (chunks * CHUNK + 32) * 2;
    let blocks = tiles.div_ceil(r).min(num_sms);
    let rounds = tiles.div_ceil(r).div_ceil(blocks);
    let (block_limit, all) = shared_memory(capability);
    let x_stream = match rounds {
        1 => x_resident > MAX_X,
        _ => x_resident > MAX_X.max(block_limit / 3),
    };
    if norm && (x_stream || tokens * k > MAX_NORM) {
        return None;
    }
    let items = chunks.div_ceil(WARPS) * r * rounds;
    let shared = |stages: usize| {
        let x_slots = (r + stages - 2) / r + 1;
        let x = match x_stream {
            true => x_slots * nt * 2 * THREADS * 16,
            false => x_resident,
        };
        let norm = if norm { k * 2 + tokens * WARPS * 4 } else { 0 };
        stages * ITEM_BYTES + x + (r * nt).min(8) * THREADS * 16 + norm
    };
    // Weights that fit into the pipeline as a whole are all on their way before this kernel's turn
    // comes, and two thread blocks on a multiprocessor let the kernel after this one begin as
    // well. With longer streams that does harm: thread blocks end up unevenly on multiprocessors,
    // and 8B steps took an eighth longer. So each of those gets a multiprocessor of its own.
    let long = items > 8;
    let most = match nt {
        1 if long => 8,
        1 | 2 => 6,
        _ => 5,
    };
    let most = (items + 1).clamp(3, most);
    let stages = (3..=most).rev().find(|s| shared(*s) <= block_limit)?;
    let alone = if long { all / 2 } else { 0 };
    Some(Plan {
        r,
        nt,
        stages,
        x_stream,
        blocks,
        shared: shared(stages).max(alone),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_fit_the_device() {
        for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)] {
            for num_sms in [20, 108, 132] {
                for (outputs, k) in [(1024, 2048), (4096, 1024), (151_936, 1024), (4096, 14_336)] {
                    for tokens in 1..=MAX_ROWS {
                        for (norm, silu) in [(false, false), (true, false), (true, true)] {
                            let problem = Problem {
                                tokens,
                                outputs,
                                k,
                                norm,
                                silu,
                            };
                            let Some(plan) = plan(problem, num_sms, capability) else {
                                assert!(norm || tokens > 8, "{problem:?} {capability:?}");
                                continue;
                            };
                            assert!(plan.shared <= shared_memory(capability).0);
                            assert!(plan.nt * 8 >= tokens && plan.blocks >= 1);
                            assert!((3..=8).contains(&plan.stages));
                        }
                    }
                }
            }
        }
    }
}
