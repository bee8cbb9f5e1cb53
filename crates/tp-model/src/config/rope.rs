//! Rotary position embedding: which variant, and its parameters.

use super::fields::Fields;
use crate::error::ModelError;

const SUPPORTED: &str = "\"default\", \"linear\", \"dynamic\", \"llama3\", \"yarn\"";

/// Rotary embedding of a model, as `transformers` 5 reads it from `rope_parameters`, or from the
/// older `rope_theta` and `rope_scaling`.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// How many dimensions of a head are rotated (all of them unless `partial_rotary_factor`).
    pub rotary_dim: usize,
    /// How frequencies are changed to reach beyond the context of pre-training.
    pub scaling: RopeScaling,
}

/// How the rotary frequencies are scaled.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// `theta^(-2i/d)`, unchanged.
    Default,
    /// All frequencies divided by `factor` (position interpolation).
    Linear {
        /// Divisor, at least 1 in practice.
        factor: f64,
    },
    /// Dynamic NTK: the base grows with the length of the sequence once that exceeds `original`.
    Dynamic {
        /// Growth per original context length.
        factor: f64,
        /// `max_position_embeddings`.
        original: usize,
    },
    /// Llama 3: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// Context length of pre-training.
        original: usize,
    },
    /// YaRN (arXiv 2309.00071): a ramp over dimensions, and a factor on cos and sin.
    Yarn {
        /// Divisor of low frequencies.
        factor: f64,
        /// Rotations within the original context above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which a dimension is interpolated fully.
        beta_slow: f64,
        /// Factor on cos and sin.
        attention_factor: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
        /// Context length of pre-training.
        original: usize,
    },
}

impl RopeConfig {
    /// Longest context that the scaling is made for, given `max_position_embeddings`.
    pub(super) fn max_context(&self, max_position: usize) -> usize {
        let scaled = |length: usize, factor: f64| (length as f64 * factor) as usize;
        match self.scaling {
            RopeScaling::Default | RopeScaling::Llama3 { .. } => max_position,
            RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor, .. } => {
                scaled(max_position, factor).max(max_position)
            }
            RopeScaling::Yarn {
                factor, original, ..
            } => scaled(original, factor).max(max_position),
        }
    }

    pub(super) fn parse(
        config: &Fields,
        head_dim: usize,
        max_position: usize,
    ) -> Result<Self, ModelError> {
        // transformers gives `rope_scaling` precedence when a file holds both.
        let rope = match config.object("rope_scaling")? {
            Some(old) => Some(old),
            None => config.object("rope_parameters")?,
        };
        let from_rope = |name: &str, default: Option<f64>| match &rope {
            Some(fields) if fields.get(name).is_some() => fields.positive(name, None),
            _ => config.positive(name, default),
        };
        let theta = from_rope("rope_theta", Some(10_000.0))?;
        let partial = from_rope("partial_rotary_factor", Some(1.0))?;
        let rotary_dim = (head_dim as f64 * partial) as usize;
        if partial > 1.0 || rotary_dim < 2 || !rotary_dim.is_multiple_of(2) {
            return Err(config.wrong(
                "partial_rotary_factor",
                format!("a fraction that leaves an even number of the {head_dim} head dimensions"),
            ));
        }
        let scaling = match rope {
            Some(rope) => RopeScaling::parse(&rope, config, max_position)?,
            None => RopeScaling::Default,
        };
        Ok(Self {
            theta,
            rotary_dim,
            scaling,
        })
    }
}

impl RopeScaling {
    fn parse(rope: &Fields, config: &Fields, max_position: usize) -> Result<Self, ModelError> {
        let key = match rope.get("rope_type") {
            Some(_) => "rope_type",
            None => "type",
        };
        let per_layer = ["full_attention", "sliding_attention"];
        if let Some(name) = per_layer.into_iter().find(|name| rope.get(name).is_some()) {
            return Err(rope.unsupported(name, "one set of rope parameters for all layers"));
        }
        let original = || -> Result<usize, ModelError> {
            for source in [config, rope] {
                if source.get("original_max_position_embeddings").is_some() {
                    return source.count("original_max_position_embeddings");
                }
            }
            Ok(max_position)
        };
        let factor = || rope.positive("factor", None);
        Ok(match rope.string(key)?.unwrap_or("default") {
            "default" => Self::Default,
            "linear" => Self::Linear { factor: factor()? },
            "dynamic" => Self::Dynamic {
                factor: factor()?,
                original: max_position,
            },
            "llama3" => {
                let low = rope.positive("low_freq_factor", None)?;
                let high = rope.positive("high_freq_factor", None)?;
                if high <= low {
                    let expected = format!("more than low_freq_factor ({low})");
                    return Err(rope.wrong("high_freq_factor", expected));
                }
                Self::Llama3 {
                    factor: factor()?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original: original()?,
                }
            }
            "yarn" => Self::parse_yarn(rope, original()?, max_position)?,
            _ => return Err(rope.unsupported(key, SUPPORTED)),
        })
    }

    fn parse_yarn(rope: &Fields, original: usize, max_position: usize) -> Result<Self, ModelError> {
        let factor = rope.positive("factor", Some(max_position as f64 / original as f64))?;
        let mscale = |weight: f64| match factor <= 1.0 {
            true => 1.0,
            false => 0.1 * weight * factor.ln() + 1.0,
        };
        let attention_factor = match rope.f64("attention_factor")? {
            Some(given) if given > 0.0 => given,
            Some(_) => return Err(rope.wrong("attention_factor", "a number above 0")),
            None => match (rope.f64("mscale")?, rope.f64("mscale_all_dim")?) {
                (Some(m), Some(all)) if m != 0.0 && all != 0.0 => mscale(m) / mscale(all),
                _ => mscale(1.0),
            },
        };
        Ok(Self::Yarn {
            factor,
            beta_fast: rope.positive("beta_fast", Some(32.0))?,
            beta_slow: rope.positive("beta_slow", Some(1.0))?,
            attention_factor,
            truncate: rope.bool("truncate")?.unwrap_or(true),
            original,
        })
    }
}
