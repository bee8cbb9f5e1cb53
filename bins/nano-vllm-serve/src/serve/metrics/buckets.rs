//! Upper bounds of the histograms' buckets: vLLM's.

pub(super) const LATENCY: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
pub(super) const FIRST_TOKEN: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// vLLM's buckets begin at 10 ms; the four before them are for small models.
pub(super) const INTER_TOKEN: [f64; 23] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
pub(super) const ITERATION: [f64; 13] = [
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
];
pub(super) const HTTP: [f64; 3] = [0.1, 0.5, 1.0];
pub(super) const HTTP_FINE: [f64; 21] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0,
    7.5, 10.0, 30.0, 60.0,
];
pub(super) const PARAMS_N: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];
pub(super) const PREEMPTIONS: [f64; 7] = [1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0];

/// 1, 2, 5, 10, ... up to `most`.
pub(super) fn token_buckets(most: usize) -> Vec<f64> {
    let powers = std::iter::successors(Some(1usize), |p| p.checked_mul(10));
    powers
        .flat_map(|p| [1, 2, 5].map(|m| m * p))
        .take_while(|bucket| *bucket <= most)
        .map(|bucket| bucket as f64)
        .collect()
}
