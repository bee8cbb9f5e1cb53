//! min-p, top-k and top-p as one number: the smallest logit that is kept.
//!
//! All three keep the most likely tokens, so each is a threshold on the logit and together they
//! are the largest threshold. Tokens with equal logits are kept or dropped together. With
//! `w = exp((logit - max) / temperature)` and in vLLM's order:
//!
//! - min-p (Nguyen et al. 2024, arXiv:2407.01082) keeps `w >= min_p`, the largest `w` being 1;
//! - top-k (Fan et al. 2018, arXiv:1805.04833) keeps logits that at most `k - 1` others exceed;
//! - top-p (Holtzman et al. 2020, arXiv:1904.09751) keeps, of what the other two leave, tokens
//!   for which the sum of all larger `w` is less than `top_p` times the sum of all `w`.
//!
//! Nothing here sorts the vocabulary. The maxima of [`CHUNK`]s bound top-k from below; top-p
//! sums `w` into [`BUCKETS`] by size, then searches the one bucket where the sum is reached.

use crate::exp::exp_chunk;
use crate::params::SamplingParams;
use crate::scan::{CHUNK, Scan};

/// Buckets of the top-p histogram.
const BUCKETS: usize = 1024;
/// `exp(-40)` = 4e-18: whatever is less likely than that, relative to the most likely token, can
/// neither be in a nucleus (`1 - top_p` is at least 6e-8) nor count in its sum.
const DEEPEST: f64 = 40.0;
/// Candidates of top-p that are sorted rather than halved further.
const SORTED: usize = 32;

/// Room that is reused from row to row.
#[derive(Debug, Default)]
pub(crate) struct FilterRoom {
    values: Vec<f32>,
    weighted: Vec<(f32, f64)>,
    histogram: Vec<[f64; 2]>,
}

/// `w`'s exponent. All implementations compute it by these operations, in float64.
pub(crate) fn scaled(logit: f32, max: f32, temperature: f64) -> f64 {
    (f64::from(logit) - f64::from(max)) / temperature
}

/// The smallest logit that is kept; -inf if all are.
pub(crate) fn threshold(
    params: &SamplingParams,
    row: &[f32],
    scan: &Scan,
    room: &mut FilterRoom,
) -> f32 {
    let temperature = f64::from(params.effective_temperature());
    let mut threshold = f32::NEG_INFINITY;
    if params.min_p > 0.0 {
        threshold = min_p(params.min_p, scan.max, temperature);
    }
    if params.top_k > 0 && (params.top_k as usize) < row.len() {
        threshold = threshold.max(top_k(params.top_k as usize, row, scan, &mut room.values));
    }
    if params.top_p < 1.0 {
        let nucleus = Nucleus::new(row, scan, threshold, temperature);
        threshold = threshold.max(nucleus.threshold(f64::from(params.top_p), room));
    }
    threshold
}

/// The smallest float with `scaled(x) >= ln(min_p)`.
fn min_p(min_p: f32, max: f32, temperature: f64) -> f32 {
    let bound = f64::from(min_p).ln();
    let kept = |x: f32| scaled(x, max, temperature) >= bound;
    let mut x = (f64::from(max) + bound * temperature) as f32;
    while x > f32::NEG_INFINITY && kept(x) {
        x = x.next_down();
    }
    while !kept(x) {
        x = x.next_up();
    }
    x
}

/// The k-th largest logit.
fn top_k(k: usize, row: &[f32], scan: &Scan, values: &mut Vec<f32>) -> f32 {
    values.clear();
    if k <= scan.chunk_max.len() {
        // k chunks hold at least one logit of at least this each, so no others matter.
        values.extend_from_slice(&scan.chunk_max);
        let bound = kth_largest(values, k);
        values.clear();
        for (_, chunk) in scan.chunks_from(row, bound) {
            values.extend(chunk.iter().filter(|&&x| x >= bound));
        }
    } else {
        values.extend_from_slice(row);
    }
    kth_largest(values, k)
}

fn kth_largest(values: &mut [f32], k: usize) -> f32 {
    *values
        .select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a))
        .1
}

/// A row, as top-p sees it.
struct Nucleus<'a> {
    row: &'a [f32],
    scan: &'a Scan,
    /// Smallest logit that takes part.
    floor: f32,
    temperature: f64,
    /// Buckets a unit of the exponent.
    per_bucket: f64,
}

impl<'a> Nucleus<'a> {
    fn new(row: &'a [f32], scan: &'a Scan, threshold: f32, temperature: f64) -> Self {
        let lowest = threshold.max(scan.min);
        let depth = (-scaled(lowest, scan.max, temperature)).min(DEEPEST);
        // Slightly below -DEEPEST would do as well; only the cost depends on the exact floor.
        let deepest = (f64::from(scan.max) - DEEPEST * temperature) as f32;
        let per_bucket = (BUCKETS - 1) as f64 / depth.max(1e-9);
        Self {
            row,
            scan,
            floor: lowest.max(deepest),
            temperature,
            per_bucket,
        }
    }

    /// Exponents of a chunk, -inf where a token takes no part.
    fn exponents(&self, chunk: &[f32]) -> [f64; CHUNK] {
        let mut out = [f64::NEG_INFINITY; CHUNK];
        for (out, &x) in out.iter_mut().zip(chunk) {
            let exponent = scaled(x, self.scan.max, self.temperature);
            *out = if x >= self.floor {
                exponent
            } else {
                f64::NEG_INFINITY
            };
        }
        out
    }

    /// Bucket of each exponent: 0 for the largest.
    fn buckets(&self, exponents: &[f64; CHUNK]) -> [usize; CHUNK] {
        exponents.map(|x| (-x * self.per_bucket).min((BUCKETS - 1) as f64) as i32 as usize)
    }

    fn chunks(&self) -> impl Iterator<Item = &[f32]> {
        self.scan
            .chunks_from(self.row, self.floor)
            .map(|(_, chunk)| chunk)
    }

    /// The smallest logit in the nucleus.
    fn threshold(&self, top_p: f64, room: &mut FilterRoom) -> f32 {
        // Two histograms, so that neighbours in one bucket do not wait for each other.
        room.histogram.clear();
        room.histogram.resize(BUCKETS, [0.0; 2]);
        for chunk in self.chunks() {
            let exponents = self.exponents(chunk);
            let weights = exp_chunk(&exponents);
            let buckets = self.buckets(&exponents);
            for (i, (&bucket, weight)) in buckets.iter().zip(weights).enumerate() {
                room.histogram[bucket][i % 2] += weight;
            }
        }
        let sums = room.histogram.iter().map(|halves| halves[0] + halves[1]);
        let target = top_p * sums.clone().sum::<f64>();
        let mut above = 0.0;
        let mut crossing = 0;
        for (bucket, sum) in sums.enumerate().filter(|(_, sum)| *sum > 0.0) {
            crossing = bucket;
            if above + sum >= target {
                break;
            }
            above += sum;
        }
        room.weighted.clear();
        for chunk in self.chunks() {
            let exponents = self.exponents(chunk);
            for (i, bucket) in self.buckets(&exponents).into_iter().enumerate() {
                if bucket == crossing && exponents[i] > f64::NEG_INFINITY {
                    room.weighted.push((chunk[i], exponents[i].exp()));
                }
            }
        }
        last_needed(&mut room.weighted, above, target)
    }
}

/// Of tokens that come after tokens with a sum of `above`: the smallest logit that is needed
/// to reach `target`. Halves the candidates until few are left.
fn last_needed(mut candidates: &mut [(f32, f64)], mut above: f64, target: f64) -> f32 {
    let descending = |a: &(f32, f64), b: &(f32, f64)| b.0.total_cmp(&a.0);
    while candidates.len() > SORTED {
        let middle = candidates.len() / 2;
        candidates.select_nth_unstable_by(middle, descending);
        let (upper, lower) = candidates.split_at_mut(middle);
        let sum: f64 = upper.iter().map(|candidate| candidate.1).sum();
        if above + sum >= target {
            candidates = upper;
        } else {
            above += sum;
            candidates = lower;
        }
    }
    candidates.sort_unstable_by(descending);
    let mut last = f32::INFINITY;
    for &(logit, weight) in &*candidates {
        if above >= target {
            break;
        }
        last = logit;
        above += weight;
    }
    last
}
