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
    smallest(max, |x| scaled(x, max, temperature) >= bound)
}

/// The smallest float for which `holds`, a condition that `max` and from some point on all floats
/// up to it meet. Bisects the floats in their order, so it takes 32 steps wherever it lies.
fn smallest(max: f32, holds: impl Fn(f32) -> bool) -> f32 {
    // Floats in order as integers in order; its own inverse.
    let flip = |bits: i32| bits ^ ((bits >> 31) as u32 >> 1) as i32;
    let float = |key: i64| f32::from_bits(flip(key as i32) as u32);
    let key = |x: f32| i64::from(flip(x.to_bits() as i32));
    let (mut low, mut high) = (key(f32::NEG_INFINITY), key(max));
    while low < high {
        let middle = (low + high).div_euclid(2);
        if holds(float(middle)) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    float(high)
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
    inverse_temperature: f64,
    /// Buckets a unit of the logit.
    per_bucket: f32,
}

impl<'a> Nucleus<'a> {
    fn new(row: &'a [f32], scan: &'a Scan, threshold: f32, temperature: f64) -> Self {
        let deepest = (f64::from(scan.max) - DEEPEST * temperature) as f32;
        let floor = threshold.max(scan.min).max(deepest);
        // The width is at most 80. Where all logits are equal any scale will do.
        let per_bucket = (BUCKETS - 1) as f32 / (scan.max - floor).max(1e-30);
        Self {
            row,
            scan,
            floor,
            inverse_temperature: 1.0 / temperature,
            per_bucket,
        }
    }

    /// `w`'s exponent. Sums need no exact agreement, so this multiplies where others divide.
    fn exponent(&self, logit: f32) -> f64 {
        (f64::from(logit) - f64::from(self.scan.max)) * self.inverse_temperature
    }

    /// The bucket of a logit that is at least `floor`: 0 for the largest, more for smaller ones.
    fn bucket(&self, logit: f32) -> usize {
        // Floats from 2^23 on are integers, and their low bits count them. Monotone, and unlike
        // a cast it vectorizes.
        const TWO_23: f32 = 8_388_608.0;
        let rounded = (self.scan.max - logit) * self.per_bucket + TWO_23;
        rounded.to_bits() as usize % BUCKETS
    }

    fn chunks(&self) -> impl Iterator<Item = &[f32]> {
        self.scan
            .chunks_from(self.row, self.floor)
            .map(|(_, chunk)| chunk)
    }

    /// Sums of `w` by bucket, in two halves so that neighbours do not wait for each other.
    fn fill(&self, histogram: &mut Vec<[f64; 2]>) {
        histogram.clear();
        histogram.resize(BUCKETS, [0.0; 2]);
        for chunk in self.chunks() {
            let mut logits = [f32::NEG_INFINITY; CHUNK];
            logits[..chunk.len()].copy_from_slice(chunk);
            let exponents = logits.map(|logit| {
                if logit >= self.floor {
                    self.exponent(logit)
                } else {
                    f64::NEG_INFINITY
                }
            });
            let buckets = logits.map(|logit| self.bucket(logit));
            for (i, (&bucket, weight)) in buckets.iter().zip(exp_chunk(&exponents)).enumerate() {
                histogram[bucket][i % 2] += weight;
            }
        }
    }

    /// The smallest logit in the nucleus.
    fn threshold(&self, top_p: f64, room: &mut FilterRoom) -> f32 {
        self.fill(&mut room.histogram);
        let sums = room.histogram.iter().map(|halves| halves[0] + halves[1]);
        let target = top_p * sums.clone().sum::<f64>();
        let mut above = 0.0;
        let mut crossing = 0;
        // Tokens that take no part add less than 1e-300 somewhere; those that do, at least 1e-18.
        for (bucket, sum) in sums.enumerate().filter(|(_, sum)| *sum > 1e-20) {
            crossing = bucket;
            if above + sum >= target {
                break;
            }
            above += sum;
        }
        // The bucket as a range of logits.
        let start = |bucket| smallest(self.scan.max, |x| self.bucket(x.max(self.floor)) <= bucket);
        let low = start(crossing).max(self.floor);
        let high = if crossing == 0 {
            f32::INFINITY
        } else {
            start(crossing - 1)
        };
        room.weighted.clear();
        for (_, chunk) in self.scan.chunks_from(self.row, low) {
            for &logit in chunk.iter().filter(|&&logit| low <= logit && logit < high) {
                room.weighted.push((logit, self.exponent(logit).exp()));
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

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    /// The smallest logit that is kept, by sorting and summing.
    fn by_sorting(row: &[f32], params: &SamplingParams) -> f32 {
        let mut sorted = row.to_vec();
        sorted.sort_unstable_by(|a, b| b.total_cmp(a));
        let temperature = f64::from(params.effective_temperature());
        let weight = |x: f32| ((f64::from(x) - f64::from(sorted[0])) / temperature).exp();
        let mut kept = sorted.clone();
        kept.retain(|&x| weight(x) >= f64::from(params.min_p));
        if params.top_k > 0 {
            let kth = kept[(params.top_k as usize).min(kept.len()) - 1];
            kept.retain(|&x| x >= kth);
        }
        let target = f64::from(params.top_p) * kept.iter().map(|&x| weight(x)).sum::<f64>();
        let mut above = 0.0;
        let mut last = kept[0];
        for &x in kept.iter().take_while(|_| params.top_p < 1.0) {
            if above >= target {
                return last;
            }
            (last, above) = (x, above + weight(x));
        }
        kept[kept.len() - 1]
    }

    /// The border itself: draws rarely fall on the tokens next to it.
    #[test]
    fn threshold_is_exact() {
        let mut rng = StdRng::seed_from_u64(1);
        let (mut scan, mut room) = (Scan::default(), FilterRoom::default());
        for case in 0..2000 {
            let width = [0.01_f32, 1.0, 20.0, 1000.0][case % 4];
            let row: Vec<f32> = (0..rng.random_range(1..3000))
                .map(|_| rng.random::<f32>() * width)
                .collect();
            let top_p = rng.random_range(0.01..0.99);
            let mut or_off = |value: f32, off: f32| if rng.random() { value } else { off };
            let params = SamplingParams {
                temperature: or_off(1.7, 0.2),
                min_p: or_off(0.03, 0.0),
                top_k: or_off(100.0, 0.0) as i32,
                top_p: or_off(top_p, 1.0),
                ..Default::default()
            };
            scan.run(&row).unwrap();
            let found = threshold(&params, &row, &scan, &mut room);
            let kept = row.iter().filter(|&&x| x >= found).count();
            let expected = by_sorting(&row, &params);
            let expected = row.iter().filter(|&&x| x >= expected).count();
            assert_eq!(kept, expected, "case {case}: {params:?}");
        }
    }
}
