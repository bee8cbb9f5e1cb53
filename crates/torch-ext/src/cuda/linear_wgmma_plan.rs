//! How `linear_wgmma.cu` is built and launched for a problem.

/// Columns of K in a stage of the ring: CHUNK in the source.
const CHUNK: usize = 64;
/// Most bytes of shared memory for the ring: what Hopper gives a thread block, less the barriers, room
/// to turn results around (for each warpgroup), and what it takes to begin at a multiple of 1024.
const fn ring(wgs: usize) -> usize {
    (227 - 2 - 4 * wgs) << 10
}
/// Most stages: barriers are cheap, but so deep a ring of small stages brings nothing more.
const MOST_STAGES: usize = 12;
/// Of a multiprocessor.
const REGISTERS: usize = 65_536;
/// Most thread blocks of a cluster on every GPU that has them.
const MOST_CLUSTER: usize = 8;
/// Groups of eight tokens that the kernel is built for. Each is compiled once for each weight shape,
/// so there are few.
const GROUPS: [usize; 7] = [4, 8, 16, 20, 24, 28, 32];

/// Rows of x that a block can take.
const SPAN: usize = 8 * GROUPS[GROUPS.len() - 1];

/// Most rows of x that the kernel takes.
pub(super) const MAX_ROWS: usize = 2 * SPAN;

/// What is asked of the kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Problem {
    /// Rows of x.
    pub(super) tokens: usize,
    /// Rows of w.
    pub(super) n: usize,
    /// Columns of w.
    pub(super) k: usize,
    /// w is gate rows, then up rows.
    pub(super) gated: bool,
    /// A norm is divided between this product and another, whose squares are of all rows.
    pub(super) normed: bool,
}

/// One way to build and launch the kernel for a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WgmmaPlan {
    /// Groups of eight tokens.
    pub(super) nt: usize,
    /// Warpgroups, of 64 rows of w each.
    pub(super) wgs: usize,
    /// Thread blocks of a cluster that share out K.
    pub(super) split: usize,
    /// Thread blocks of a cluster that share what they read of x.
    pub(super) share: usize,
    /// Clusters that share out the rows of x: one, or two.
    pub(super) spans: usize,
    /// Of the ring.
    pub(super) stages: usize,
    /// Rows of w in units of what a thread block takes.
    pub(super) tiles: usize,
    /// In the grid, for each span.
    pub(super) clusters: usize,
}

/// Warpgroups, split, share, spans.
type Way = (usize, usize, usize, usize);

impl WgmmaPlan {
    pub(super) fn cluster(&self) -> usize {
        self.split * self.share
    }

    pub(super) fn threads(&self) -> usize {
        128 * self.wgs + 32
    }

    /// In the grid.
    pub(super) fn blocks(&self) -> usize {
        self.clusters * self.spans * self.cluster()
    }

    /// Whether results can be added to a residual: shared memory beside the ring is for 64 rows, and a
    /// block must finish whole columns of them, and registers for the residual and the gain of 128.
    pub(super) fn adds(&self) -> bool {
        self.wgs == 1 && self.spans == 1 && self.nt <= 16 && self.nt.is_multiple_of(self.split)
    }

    /// Rows of x that each of the blocks that share a span fetches, in whole groups of eight.
    pub(super) fn x_rows(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.spans * self.share).next_multiple_of(8)
    }

    fn stage_bytes(&self) -> usize {
        (64 * self.wgs + 8 * self.nt) * CHUNK * 2
    }

    /// Dynamic shared memory, in bytes.
    pub(super) fn shared(&self) -> usize {
        self.stages * self.stage_bytes() + 1024
    }

    /// Bytes of sums that the blocks of a split send each other.
    fn sums(&self) -> usize {
        match self.split {
            1 => 0,
            _ => 64 * self.wgs * 8 * self.nt * 4,
        }
    }

    /// The plan of these shapes, if there is one.
    fn of(problem: Problem, (wgs, split, share, spans): Way, num_sms: usize) -> Option<Self> {
        let span = problem.tokens.div_ceil(spans * share).next_multiple_of(8) * share;
        let nt = GROUPS.into_iter().find(|nt| 8 * nt >= span)?;
        let chunks = problem.k.div_ceil(CHUNK);
        let tiles = problem.n.div_ceil(64 * wgs);
        let groups = tiles.div_ceil(share);
        // Sums, and at least 36 others a thread; four warps at a time get registers.
        let registers = (4 * nt + 36) * (128 * wgs + 32).next_multiple_of(128);
        if !nt.is_multiple_of(share) || share > tiles || split > chunks || registers > REGISTERS {
            return None;
        }
        // Every span has a token.
        if (spans - 1) * span >= problem.tokens || (problem.normed && spans > 1) {
            return None;
        }
        let resident = (resident(split * share, num_sms) / spans).max(1);
        let mut plan = Self {
            nt,
            wgs,
            split,
            share,
            spans,
            stages: 0,
            tiles,
            // A block adds up in its ring, so it has one tile; otherwise the ring runs on from tile
            // to tile.
            clusters: if split > 1 {
                groups
            } else {
                groups.min(resident)
            },
        };
        plan.stages = (ring(wgs) / plan.stage_bytes()).min(MOST_STAGES);
        (plan.stages >= 2 && plan.sums() <= plan.stages * plan.stage_bytes()).then_some(plan)
    }
}

/// Clusters that run at the same time, one block a multiprocessor. Graphics processing clusters have
/// 16 or 18 multiprocessors, some fewer, so not all can be used by large clusters.
fn resident(cluster: usize, num_sms: usize) -> usize {
    match cluster {
        1 | 2 => num_sms / cluster,
        4 => num_sms / 4 - num_sms / 128,
        _ => (num_sms / 8).saturating_sub(num_sms / 64),
    }
    .max(1)
}

/// What the kernel takes.
fn takes(problem: Problem) -> bool {
    let Problem {
        tokens,
        n,
        k,
        gated,
        normed: _,
    } = problem;
    (1..=MAX_ROWS).contains(&tokens)
        && n > 0
        && k > 0
        && k.is_multiple_of(8)
        // Eight rows of the gate go with eight of up.
        && (!gated || n.is_multiple_of(16))
        && n.max(k) <= (i32::MAX as usize) - 512
}

/// Every plan for a problem.
pub(super) fn plans(problem: Problem, num_sms: usize) -> Vec<WgmmaPlan> {
    let ways = [1, 2, 3, 4]
        .into_iter()
        .flat_map(|wgs| [1, 2, 4, 8].map(|split| (wgs, split)))
        .flat_map(|(wgs, split)| [1, 2, 4].map(|share| (wgs, split, share)))
        .flat_map(|(wgs, split, share)| [1, 2].map(|spans| (wgs, split, share, spans)))
        .filter(|(_, split, share, _)| takes(problem) && split * share <= MOST_CLUSTER);
    ways.filter_map(|way| WgmmaPlan::of(problem, way, num_sms))
        .collect()
}

/// The plan that is taken; `None` if the kernel does not take the problem. The rules are what was
/// fastest of all plans for the weights of 0.6B and 8B models on an H200 (`cuda_bench_wgmma plans`);
/// the first that fits is taken.
pub(super) fn best(problem: Problem, num_sms: usize) -> Option<WgmmaPlan> {
    if !takes(problem) {
        return None;
    }
    let chunks = problem.k.div_ceil(CHUNK);
    let tiles = |wgs: usize| problem.n.div_ceil(64 * wgs);
    // K is divided only where that leaves a block much of it.
    let long = chunks >= LONG;
    // As many warpgroups as there are registers for.
    let most = match problem.tokens {
        0..=128 => 4,
        129..=160 => 3,
        _ => 2,
    };
    let one_round = (1..=most).find(|wgs| tiles(*wgs) <= num_sms);
    let (half, quarter) = (2 * tiles(1) <= num_sms, 4 * tiles(1) <= num_sms);
    // Sums of many rows take longer to exchange than a weight that L2 has takes to be read twice, the
    // later, the longer it is.
    let most_summed = match (quarter, chunks) {
        (true, _) => 160,
        (false, ..VERY_LONG) => 128,
        (false, _) => 224,
    };
    let halved = |above: usize| !problem.normed && problem.tokens > above;
    let wanted = match one_round {
        Some(1) if quarter && chunks >= SHARED && halved(most_summed) => (1, 2, 1, 2),
        Some(1) if half && halved(most_summed) => (1, 1, 1, 2),
        // Each reads half of x and writes half of the results, which is most of what there is to do.
        Some(1) if half && !long && halved(64) => (2, 1, 1, 2),
        Some(1) if long && quarter => (1, 4, 1, 1),
        Some(1) if long && half => (1, 2, 1, 1),
        // All tiles at once, few blocks that read x.
        Some(wgs) if long => (wgs, 1, 4, 1),
        Some(wgs) => (wgs, 1, 1, 1),
        None if long && problem.tokens > 128 => (2, 1, 4, 1),
        None if long => (2, 1, 2, 1),
        None => (1, 1, 2, 1),
    };
    let simple = [1, 2].map(|spans| (wanted.0, 1, 1, spans));
    [wanted, simple[0], (1, 1, 1, 1), simple[1]]
        .into_iter()
        .find_map(|way| WgmmaPlan::of(problem, way, num_sms))
}

/// Whether [`best`] was measured to be faster than cuBLAS for this weight and this many rows.
pub(super) fn wins(tokens: usize, n: usize, num_sms: usize) -> bool {
    // With more rows, a very large weight leaves too many results to write between reads.
    let most = if n <= 4 * 64 * num_sms { SPAN } else { 64 };
    (FEWEST_ROWS..=most).contains(&tokens)
}

/// Most rows for which adding to the residual in one product and leaving a factor of the norm to the next was measured to
/// be faster than a norm between them: with more, the product's end takes longer than the norm.
pub(super) const MOST_ADDED: usize = 64;

/// Below, `linear_small` is faster.
const FEWEST_ROWS: usize = 9;
/// Chunks of K from which it is worth more effort to save reads of x.
const LONG: usize = 32;
/// From which two blocks share out K even where two others have the other half of the rows.
const SHARED: usize = 48;
/// From which sums of up to 224 rows are exchanged sooner than half of it is read.
const VERY_LONG: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(tokens: usize, n: usize, k: usize) -> Problem {
        Problem {
            tokens,
            n,
            k,
            gated: false,
            normed: false,
        }
    }

    #[test]
    fn plans_fit_the_device() {
        for num_sms in [78, 114, 132] {
            for (n, k) in [
                (1, 8),
                (17, 72),
                (1024, 2048),
                (4096, 14_336),
                (151_936, 1024),
            ] {
                for tokens in (1..512)
                    .step_by(17)
                    .chain([32, 64, 128, 129, 160, 256, 512])
                {
                    let plans = plans(problem(tokens, n, k), num_sms);
                    let best = best(problem(tokens, n, k), num_sms).expect("taken");
                    assert!(plans.contains(&best), "{best:?}");
                    for plan in plans {
                        assert!(plan.shared() <= 222 << 10, "{plan:?}");
                        assert!((2..=MOST_STAGES).contains(&plan.stages));
                        assert!(plan.cluster() <= MOST_CLUSTER && plan.threads() <= 1024);
                        assert!(
                            plan.tiles * 64 * plan.wgs >= n && plan.spans * plan.nt * 8 >= tokens
                        );
                        assert!(plan.clusters >= 1);
                        let span = plan.share * plan.x_rows(tokens);
                        assert!(span <= 8 * plan.nt, "{plan:?}");
                        assert!(plan.spans * span >= tokens, "{plan:?}");
                        assert!((plan.spans - 1) * span < tokens, "{plan:?}");
                        // What the source asserts.
                        assert_eq!((plan.wgs * 4 * plan.nt) % plan.split, 0);
                    }
                }
            }
        }
    }

    #[test]
    fn what_the_kernel_does_not_take_has_no_plan() {
        assert!(plans(problem(513, 64, 64), 132).is_empty());
        assert!(plans(problem(0, 64, 64), 132).is_empty());
        assert!(plans(problem(32, 64, 63), 132).is_empty());
        assert_eq!(best(problem(513, 64, 64), 132), None);
        let gated = Problem {
            gated: true,
            ..problem(32, 72, 64)
        };
        assert!(plans(gated, 132).is_empty());
    }

    /// The shapes that the kernel is for use the whole GPU or nearly so.
    #[test]
    fn large_weights_are_read_by_most_of_the_gpu() {
        for (n, k) in [(6144, 4096), (4096, 4096), (28_672, 4096), (4096, 14_336)] {
            for tokens in [32, 64, 128, 160, 192, 256, 512] {
                let best = best(problem(tokens, n, k), 132).expect("taken");
                assert!(best.blocks() >= 80, "{best:?}");
            }
        }
    }
}
