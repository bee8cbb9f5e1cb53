//! The shape of a model, from the `config.json` of a Hugging Face checkpoint.

mod fields;
mod rope;

use std::path::Path;

use fields::Fields;
pub use rope::{RopeConfig, RopeScaling};
use tch::Kind;

use crate::error::ModelError;

/// More than any model has: what a broken file must not make us allocate for.
const MAX_LAYERS: usize = 10_000;

/// The architectures that are implemented, all of them one decoder with small differences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `LlamaForCausalLM`: Llama 2 and 3.
    Llama,
    /// `MistralForCausalLM`: Llama with a sliding window.
    Mistral,
    /// `Qwen2ForCausalLM`: bias on Q, K and V.
    Qwen2,
    /// `Qwen3ForCausalLM`: an RMS norm on every head of Q and K.
    Qwen3,
}

impl Family {
    const ALL: [(&'static str, Family); 4] = [
        ("LlamaForCausalLM", Family::Llama),
        ("MistralForCausalLM", Family::Mistral),
        ("Qwen2ForCausalLM", Family::Qwen2),
        ("Qwen3ForCausalLM", Family::Qwen3),
    ];

    /// Name of the architecture in `config.json`.
    pub fn architecture(self) -> &'static str {
        Self::ALL
            .iter()
            .find(|(_, family)| *family == self)
            .map_or("", |(name, _)| name)
    }
}

/// Everything that determines the shapes and the arithmetic of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Which family the checkpoint names.
    pub family: Family,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Dimensions of a head; need not be `hidden_size / num_heads`.
    pub head_dim: usize,
    /// Added to the mean square in every RMS norm.
    pub rms_norm_eps: f64,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// `max_position_embeddings` of the checkpoint.
    pub max_position_embeddings: usize,
    /// The output projection is the embedding.
    pub tie_word_embeddings: bool,
    /// Bias on the Q, K and V projections.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub o_bias: bool,
    /// Bias on the MLP's projections.
    pub mlp_bias: bool,
    /// RMS norm on each head of Q and K before rotation.
    pub qk_norm: bool,
    /// Per layer, how many of the latest tokens a query attends to (itself included); `None` for
    /// all.
    pub windows: Vec<Option<usize>>,
    /// Dtype that the checkpoint declares; float32 if it declares none.
    pub dtype: Kind,
    /// End-of-sequence tokens that `config.json` names (`generation_config.json` may name more).
    pub eos_token_ids: Vec<u32>,
    /// Beginning-of-sequence token, if named.
    pub bos_token_id: Option<u32>,
}

impl ModelConfig {
    /// Reads `config.json` in a checkpoint's directory.
    pub fn from_dir(dir: &Path) -> Result<Self, ModelError> {
        Self::from_file(&dir.join("config.json"))
    }

    /// Reads a `config.json`. What is missing, impossible or not implemented is an error that
    /// names the field.
    pub fn from_file(path: &Path) -> Result<Self, ModelError> {
        let config = Fields::read(path)?;
        let family = parse_family(&config)?;
        refuse_unimplemented(&config)?;

        let hidden_size = config.count("hidden_size")?;
        let num_heads = config.count("num_attention_heads")?;
        let num_kv_heads = match config.get("num_key_value_heads") {
            Some(_) => config.count("num_key_value_heads")?,
            None => num_heads,
        };
        if num_heads % num_kv_heads != 0 {
            let expected = format!("a divisor of num_attention_heads ({num_heads})");
            return Err(config.wrong("num_key_value_heads", expected));
        }
        let head_dim = parse_head_dim(&config, family, hidden_size, num_heads)?;
        let num_layers = match config.count("num_hidden_layers")? {
            n if n <= MAX_LAYERS => n,
            _ => {
                let expected = format!("an integer of 1 to {MAX_LAYERS}");
                return Err(config.wrong("num_hidden_layers", expected));
            }
        };
        let max_position_embeddings = config.count("max_position_embeddings")?;
        let bias = |name: &str| Ok::<_, ModelError>(config.bool(name)?.unwrap_or(false));
        // Qwen2 has its bias whatever the file says; Mistral has none.
        let (qkv_bias, o_bias) = match family {
            Family::Llama | Family::Qwen3 => {
                let both = bias("attention_bias")?;
                (both, both)
            }
            Family::Mistral => (false, false),
            Family::Qwen2 => (true, false),
        };
        Ok(Self {
            family,
            vocab_size: config.count("vocab_size")?,
            hidden_size,
            intermediate_size: config.count("intermediate_size")?,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            rms_norm_eps: config.positive("rms_norm_eps", Some(1e-6))?,
            rope: RopeConfig::parse(&config, head_dim, max_position_embeddings)?,
            max_position_embeddings,
            tie_word_embeddings: bias("tie_word_embeddings")?,
            qkv_bias,
            o_bias,
            mlp_bias: family == Family::Llama && bias("mlp_bias")?,
            qk_norm: family == Family::Qwen3,
            windows: parse_windows(&config, family, num_layers)?,
            dtype: parse_dtype(&config)?,
            eos_token_ids: config.token_ids("eos_token_id")?,
            bos_token_id: config.token_ids("bos_token_id")?.first().copied(),
        })
    }

    /// Longest context that the model is made for: `max_position_embeddings`, times the factor
    /// of a rope scaling that extends it.
    pub fn max_context(&self) -> usize {
        self.rope.max_context(self.max_position_embeddings)
    }

    /// Number of weights, without biases and norms.
    pub fn num_parameters(&self) -> u64 {
        let [vocab, hidden, width, layers, heads, kv_heads, head_dim] = [
            self.vocab_size,
            self.hidden_size,
            self.intermediate_size,
            self.num_layers,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
        ]
        .map(|n| n as u64);
        let attention = hidden * head_dim * 2 * (heads + kv_heads);
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        layers * (attention + 3 * hidden * width) + tables * vocab * hidden
    }

    /// The window of every layer, if all layers have the same: only then may blocks that lie
    /// before the window be freed.
    pub fn sliding_window(&self) -> Option<usize> {
        let first = *self.windows.first()?;
        self.windows.iter().all(|w| *w == first).then_some(first)?
    }

    /// Whether keys of a token depend on the tokens before it alone, so that two prompts with a
    /// common beginning may share its blocks. Not so with dynamic NTK, where the rotation of a
    /// prompt's keys depends on the whole prompt's length.
    pub fn prefix_cacheable(&self) -> bool {
        !matches!(self.rope.scaling, RopeScaling::Dynamic { .. })
    }
}

fn parse_family(config: &Fields) -> Result<Family, ModelError> {
    let names = Family::ALL.map(|(name, _)| name).join(", ");
    let found = config
        .strings("architectures")?
        .ok_or_else(|| config.wrong("architectures", format!("one of {names}")))?;
    match found.as_slice() {
        [one] => Family::ALL
            .iter()
            .find(|(name, _)| name == one)
            .map(|(_, family)| *family),
        _ => None,
    }
    .ok_or_else(|| config.unsupported("architectures", names))
}

fn refuse_unimplemented(config: &Fields) -> Result<(), ModelError> {
    if !matches!(config.string("hidden_act")?, None | Some("silu" | "swish")) {
        return Err(config.unsupported("hidden_act", "\"silu\""));
    }
    if config.get("quantization_config").is_some() {
        return Err(config.unsupported(
            "quantization_config",
            "unquantized checkpoints in float32, bfloat16 or float16",
        ));
    }
    Ok(())
}

fn parse_head_dim(
    config: &Fields,
    family: Family,
    hidden_size: usize,
    num_heads: usize,
) -> Result<usize, ModelError> {
    let head_dim = if config.get("head_dim").is_some() {
        config.count("head_dim")?
    } else if family == Family::Qwen3 {
        128 // transformers' default for this family, whatever the hidden size.
    } else if hidden_size.is_multiple_of(num_heads) {
        hidden_size / num_heads
    } else {
        let expected = format!("a multiple of num_attention_heads ({num_heads}), or `head_dim`");
        return Err(config.wrong("hidden_size", expected));
    };
    if head_dim % 2 != 0 {
        return Err(config.wrong(
            "head_dim",
            format!("an even number, and {head_dim} results"),
        ));
    }
    Ok(head_dim)
}

/// Mistral slides in every layer, over 4096 tokens if its file does not say (`null` says: not at
/// all), as in `transformers`' `MistralConfig`. Qwen slides only with `use_sliding_window`, in the layers that
/// `layer_types` names or, without it, in those from `max_window_layers` on.
fn parse_windows(
    config: &Fields,
    family: Family,
    num_layers: usize,
) -> Result<Vec<Option<usize>>, ModelError> {
    let window = match config.get("sliding_window") {
        Some(_) => Some(config.count("sliding_window")?),
        None => None,
    };
    let window = match family {
        Family::Llama => None,
        Family::Mistral if !config.names("sliding_window") => Some(4096),
        Family::Mistral => window,
        Family::Qwen2 | Family::Qwen3 => {
            window.filter(|_| matches!(config.bool("use_sliding_window"), Ok(Some(true))))
        }
    };
    let mut windows = vec![window; num_layers];
    if !matches!(family, Family::Qwen2 | Family::Qwen3) {
        return Ok(windows);
    }
    config.bool("use_sliding_window")?;
    if let Some(types) = config.strings("layer_types")? {
        if types.len() != num_layers {
            let expected = format!("{num_layers} entries, one for each layer");
            return Err(config.wrong("layer_types", expected));
        }
        for (slot, kind) in windows.iter_mut().zip(&types) {
            match kind.as_str() {
                "full_attention" => *slot = None,
                "sliding_attention" if slot.is_some() => {}
                "sliding_attention" => {
                    let expected = "a `sliding_window` and `use_sliding_window` for sliding layers";
                    return Err(config.wrong("layer_types", expected));
                }
                _ => {
                    let supported = "\"full_attention\" and \"sliding_attention\"";
                    return Err(config.unsupported("layer_types", supported));
                }
            }
        }
    } else if window.is_some() {
        let first = config.usize("max_window_layers")?.unwrap_or(28);
        windows.iter_mut().take(first).for_each(|slot| *slot = None);
    }
    Ok(windows)
}

/// `dtype` since transformers 5, `torch_dtype` before.
fn parse_dtype(config: &Fields) -> Result<Kind, ModelError> {
    let name = match config.get("dtype") {
        Some(_) => "dtype",
        None => "torch_dtype",
    };
    match config.string(name)? {
        None | Some("float32") => Ok(Kind::Float),
        Some("bfloat16") => Ok(Kind::BFloat16),
        Some("float16") => Ok(Kind::Half),
        Some(_) => Err(config.unsupported(name, "float32, bfloat16, float16")),
    }
}
