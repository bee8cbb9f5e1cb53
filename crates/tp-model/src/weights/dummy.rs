//! Random weights for measuring without a checkpoint.

use tch::Kind;

use super::matrix::Matrix;

/// Standard deviation of the weights, as most models are initialized.
const STD: f32 = 0.02;
const POOL: usize = 1 << 20;

/// Weights from N(0, 0.02^2), a function of seed, tensor name and row. All of them are windows
/// into one pool of random numbers, so that filling a model costs no more than copying it.
#[derive(Debug)]
pub(crate) struct Dummy {
    seed: u64,
    pool: Vec<u8>,
}

impl Dummy {
    pub(crate) fn new(seed: u64) -> Self {
        let mut state = seed;
        let mut uniform = move || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            // 24 bits, never zero.
            ((mix(state) >> 40) as f32 + 0.5) / (1u32 << 24) as f32
        };
        let mut pool = Vec::with_capacity(POOL * 4);
        while pool.len() < POOL * 4 {
            // Box-Muller: two uniform numbers make two normal ones.
            let radius = STD * (-2.0 * uniform().ln()).sqrt();
            let (sin, cos) = (std::f32::consts::TAU * uniform()).sin_cos();
            pool.extend((radius * sin).to_le_bytes());
            pool.extend((radius * cos).to_le_bytes());
        }
        Self { seed, pool }
    }

    /// How many rows of `cols` columns [`Dummy::rows`] can give at once.
    pub(crate) fn max_rows(cols: usize) -> usize {
        POOL / 2 / cols
    }

    /// Rows of a tensor, beginning at `first`. `cols` is at most half the pool.
    pub(crate) fn rows(&self, name: &str, first: usize, rows: usize, cols: usize) -> Matrix<'_> {
        let name = name
            .bytes()
            .fold(self.seed, |hash, byte| mix(hash ^ u64::from(byte)));
        let offset = mix(name ^ first as u64) as usize % (POOL - rows * cols);
        let bytes = &self.pool[offset * 4..(offset + rows * cols) * 4];
        Matrix::new(bytes, Kind::Float, cols)
    }
}

/// The finalizer of SplitMix64.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
