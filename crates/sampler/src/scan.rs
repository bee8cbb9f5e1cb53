//! One vectorizable pass over a row that everything else starts from.

use crate::error::SampleError;

/// Tokens a chunk; equal to the groups that race.
pub(crate) const CHUNK: usize = crate::noise::GROUP;
const LANES: usize = 16;

/// Largest logit of each chunk of [`CHUNK`] tokens, and of the row.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    /// Largest logit a chunk.
    pub chunk_max: Vec<f32>,
    /// Largest logit.
    pub max: f32,
    /// Smallest logit, -inf included.
    pub min: f32,
}

impl Scan {
    /// Scans a row. NaN, +inf, and a row of nothing but -inf are errors.
    pub fn run(&mut self, row: &[f32]) -> Result<(), SampleError> {
        self.chunk_max.clear();
        (self.max, self.min) = (f32::NEG_INFINITY, f32::INFINITY);
        let mut usable = true;
        for chunk in row.chunks(CHUNK) {
            let (max, min, ok) = match chunk.try_into() {
                Ok(full) => scan_chunk(full),
                // Repeating a token changes neither of the three.
                Err(_) => {
                    let mut padded = [chunk[0]; CHUNK];
                    padded[..chunk.len()].copy_from_slice(chunk);
                    scan_chunk(&padded)
                }
            };
            usable &= ok;
            self.max = larger(max, self.max);
            self.min = smaller(min, self.min);
            self.chunk_max.push(max);
        }
        if !usable {
            let token = row.iter().position(|&x| !is_usable(x)).unwrap_or(0) as u32;
            return Err(SampleError::NotFinite { token });
        }
        if self.max == f32::NEG_INFINITY {
            return Err(SampleError::AllMasked);
        }
        Ok(())
    }

    /// The first token with the largest logit.
    pub fn argmax(&self, row: &[f32]) -> u32 {
        let chunk = self
            .chunk_max
            .iter()
            .position(|&x| x == self.max)
            .unwrap_or(0);
        let tokens = &row[chunk * CHUNK..];
        let offset = tokens.iter().position(|&x| x == self.max).unwrap_or(0);
        (chunk * CHUNK + offset) as u32
    }

    /// The chunks that have a logit of at least `threshold`: first token, and the logits.
    pub fn chunks_from<'a>(
        &'a self,
        row: &'a [f32],
        threshold: f32,
    ) -> impl Iterator<Item = (usize, &'a [f32])> {
        let chunks = self.chunk_max.iter().zip(row.chunks(CHUNK)).enumerate();
        chunks
            .filter(move |(_, (max, _))| **max >= threshold)
            .map(|(index, (_, chunk))| (index * CHUNK, chunk))
    }
}

fn is_usable(x: f32) -> bool {
    x < f32::INFINITY
}

// `f32::max` treats NaN with care that costs three instructions; NaN is found by other means.
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

fn smaller(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

/// Largest, smallest, and whether none is NaN or +inf.
fn scan_chunk(chunk: &[f32; CHUNK]) -> (f32, f32, bool) {
    let mut max = [f32::NEG_INFINITY; LANES];
    let mut min = [f32::INFINITY; LANES];
    let mut bad = [0u32; LANES];
    for part in chunk.chunks_exact(LANES) {
        for lane in 0..LANES {
            max[lane] = larger(part[lane], max[lane]);
            min[lane] = smaller(part[lane], min[lane]);
            bad[lane] |= u32::from(!is_usable(part[lane]));
        }
    }
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            max[lane] = larger(max[lane], max[lane + width]);
            min[lane] = smaller(min[lane], min[lane + width]);
            bad[lane] |= bad[lane + width];
        }
    }
    (max[0], min[0], bad[0] == 0)
}
