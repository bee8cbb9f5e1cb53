//! Rotary position embedding: which angle each dimension turns by at each position.
//!
//! Formulas and float32 arithmetic follow `transformers` 5 (`modeling_rope_utils.py`), so that
//! angles agree to the last bit even at positions where they are thousands of radians.

use std::f64::consts::PI;

use tch::{Device, Kind, Tensor};

use crate::config::{RopeConfig, RopeScaling};

/// Rows of the table that are added at a time.
const GROWTH: usize = 1024;

/// Cos and sin for the tokens of one step.
#[derive(Debug)]
pub struct RopeRows {
    /// `[rows, rotary_dim / 2]` float32: cos of each frequency's angle.
    pub cos: Tensor,
    /// As `cos`: sin.
    pub sin: Tensor,
    /// `[tokens]` int64: the row for each token.
    pub index: Tensor,
}

/// Computes rotary angles. The table grows with the longest position seen, so a model made for
/// long contexts costs nothing until they are used; a row never changes once computed.
#[derive(Debug)]
pub struct Rotary {
    config: RopeConfig,
    device: Device,
    /// Frequencies of every position; with dynamic NTK, of sequences within the original context.
    inv_freq: Vec<f32>,
    /// Factor on cos and sin (YaRN).
    amplitude: f32,
    host: Table,
    cos: Tensor,
    sin: Tensor,
}

impl Rotary {
    /// Prepares the frequencies of `config`.
    pub fn new(config: &RopeConfig, device: Device) -> Self {
        let amplitude = match config.scaling {
            RopeScaling::Yarn {
                attention_factor, ..
            } => attention_factor as f32,
            _ => 1.0,
        };
        Self {
            inv_freq: inverse_frequencies(config, 0),
            amplitude,
            host: Table::default(),
            cos: Tensor::zeros([0, config.rotary_dim as i64 / 2], (Kind::Float, device)),
            sin: Tensor::zeros([0, config.rotary_dim as i64 / 2], (Kind::Float, device)),
            config: config.clone(),
            device,
        }
    }

    /// Rows for the tokens of a step. `sequences` gives each sequence's range of positions and
    /// the length of its prompt, in the order of the tokens; `positions` are the same tokens'.
    ///
    /// With dynamic NTK a token's frequencies depend on the longest position in the forward pass
    /// that `transformers` computes it in: the whole prompt's for a token of the prompt, its own
    /// for a generated one. Hence the prompt's length, and the same result however the prompt
    /// is cut into chunks.
    pub fn rows(&mut self, sequences: &[RopeSpan], positions: &[i64]) -> RopeRows {
        if let RopeScaling::Dynamic { original, .. } = self.config.scaling {
            return self.dynamic_rows(sequences, original);
        }
        let longest = positions.iter().max().map_or(0, |p| *p as usize + 1);
        self.grow(longest);
        RopeRows {
            cos: self.cos.shallow_clone(),
            sin: self.sin.shallow_clone(),
            index: Tensor::from_slice(positions).to_device(self.device),
        }
    }

    fn grow(&mut self, rows: usize) {
        let have = self.host.cos.len() / self.inv_freq.len();
        if rows <= have {
            return;
        }
        for position in have..rows.next_multiple_of(GROWTH) {
            self.host.push(&self.inv_freq, position, self.amplitude);
        }
        (self.cos, self.sin) = self.host.upload(self.inv_freq.len(), self.device);
    }

    fn dynamic_rows(&self, sequences: &[RopeSpan], original: usize) -> RopeRows {
        let mut table = Table::default();
        let mut tokens = 0;
        for span in sequences {
            let mut scaled: Option<(usize, Vec<f32>)> = None;
            for position in span.start..span.start + span.len {
                let length = span.num_prompt.max(position + 1);
                let inv_freq = if length <= original {
                    &self.inv_freq
                } else {
                    if scaled
                        .as_ref()
                        .is_none_or(|(made_for, _)| *made_for != length)
                    {
                        scaled = Some((length, inverse_frequencies(&self.config, length)));
                    }
                    scaled.as_ref().map_or(&self.inv_freq, |(_, freq)| freq)
                };
                table.push(inv_freq, position, self.amplitude);
                tokens += 1;
            }
        }
        let (cos, sin) = table.upload(self.inv_freq.len(), self.device);
        RopeRows {
            cos,
            sin,
            index: Tensor::arange(tokens, (Kind::Int64, self.device)),
        }
    }
}

/// The tokens of one sequence in a step.
#[derive(Clone, Copy, Debug)]
pub struct RopeSpan {
    /// Position of the first token.
    pub start: usize,
    /// Number of tokens.
    pub len: usize,
    /// Length of the sequence's prompt.
    pub num_prompt: usize,
}

/// Cos and sin by row, on the host.
#[derive(Debug, Default)]
struct Table {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Table {
    fn push(&mut self, inv_freq: &[f32], position: usize, amplitude: f32) {
        for f in inv_freq {
            let (sin, cos) = (position as f32 * f).sin_cos();
            self.cos.push(cos * amplitude);
            self.sin.push(sin * amplitude);
        }
    }

    fn upload(&self, width: usize, device: Device) -> (Tensor, Tensor) {
        let tensor = |values: &[f32]| {
            let rows = Tensor::from_slice(values).view([-1, width as i64]);
            rows.to_device(device)
        };
        (tensor(&self.cos), tensor(&self.sin))
    }
}

/// One frequency for each pair of dimensions, in radians a position. `length` is the length of
/// the sequence, used by dynamic NTK alone.
fn inverse_frequencies(config: &RopeConfig, length: usize) -> Vec<f32> {
    let dim = config.rotary_dim as f64;
    let exponents =
        Tensor::arange_start_step(0, config.rotary_dim as i64, 2, (Kind::Float, Device::Cpu)) / dim;
    let power = |base: f64| Tensor::pow_scalar(base, &exponents);
    let plain = || power(config.theta).reciprocal();
    let result = match config.scaling {
        RopeScaling::Default => plain(),
        RopeScaling::Linear { factor } => plain() / factor,
        RopeScaling::Dynamic { factor, original } => {
            let ratio = length.max(original) as f64 / original as f64;
            let growth = factor * ratio - (factor - 1.0);
            power(config.theta * growth.powf(dim / (dim - 2.0))).reciprocal()
        }
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original,
        } => {
            let original = original as f64;
            let freq = plain();
            let wavelength = freq.reciprocal() * (2.0 * PI);
            let is_low = wavelength.gt(original / low);
            let is_high = wavelength.lt(original / high);
            let smooth = (wavelength.reciprocal() * original - low) / (high - low);
            let blended = (1.0 - &smooth) * &freq / factor + &smooth * &freq;
            let scaled = (&freq / factor).where_self(&is_low, &blended);
            freq.where_self(&is_high, &scaled)
        }
        RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            truncate,
            original,
            ..
        } => {
            let dim_of = |rotations: f64| {
                dim * (original as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * config.theta.ln())
            };
            let (mut low, mut high) = (dim_of(beta_fast), dim_of(beta_slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
            if low == high {
                high += 0.001;
            }
            let pairs = Tensor::arange(config.rotary_dim as i64 / 2, (Kind::Float, Device::Cpu));
            let ramp = ((pairs - low) / (high - low)).clamp(0.0, 1.0);
            let kept = 1.0 - ramp;
            let frequencies = power(config.theta);
            let interpolated = (&frequencies * factor).reciprocal();
            interpolated * (1.0 - &kept) + frequencies.reciprocal() * kept
        }
    };
    let mut values = vec![0.0; config.rotary_dim / 2];
    let count = values.len();
    result.copy_data(&mut values, count);
    values
}
