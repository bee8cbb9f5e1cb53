//! Text to token ids and back.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::OnceLock;

use serde::Deserialize;

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::detokenizer::DecodePlan;

/// A checkpoint's tokenizer. Share it through an `Arc`.
#[derive(Debug)]
pub struct Tokenizer {
    pub(crate) inner: tokenizers::Tokenizer,
    pub(crate) plan: DecodePlan,
    /// By id: what `plan` makes of a token that is not the first, once it was asked for.
    pieces: Vec<OnceLock<Box<[u8]>>>,
    /// Sorted: there are few, and most ids lie outside of their range.
    special: Vec<u32>,
    /// `bos_token`, `eos_token` and so on: what chat templates may name.
    named: BTreeMap<String, String>,
}

/// A token of `tokenizer_config.json`: a string, or an object with the string inside.
#[derive(Deserialize)]
#[serde(untagged)]
enum NamedToken {
    Text(String),
    Object { content: String },
}

const NAMED_TOKENS: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

impl Tokenizer {
    /// Reads `tokenizer.json`, `special_tokens_map.json` and `tokenizer_config.json`. `None` if
    /// the checkpoint has no `tokenizer.json`: the engine then serves token ids only.
    pub fn load(checkpoint: &Checkpoint) -> Result<Option<Self>, CheckpointError> {
        let Some(json) = checkpoint.read("tokenizer.json")? else {
            return Ok(None);
        };
        let inner = tokenizers::Tokenizer::from_bytes(&json)
            .map_err(|error| checkpoint.error("tokenizer.json", error))?;
        let mut named = BTreeMap::new();
        for file in ["special_tokens_map.json", "tokenizer_config.json"] {
            let config: serde_json::Map<String, serde_json::Value> =
                checkpoint.read_json(file)?.unwrap_or_default();
            for name in NAMED_TOKENS {
                let Some(value) = config.get(name).filter(|value| !value.is_null()) else {
                    continue;
                };
                let token = NamedToken::deserialize(value).map_err(|_| {
                    checkpoint.error(
                        file,
                        format_args!("`{name}` is neither a string nor an object with `content`"),
                    )
                })?;
                let (NamedToken::Text(text) | NamedToken::Object { content: text }) = token;
                named.insert(name.to_string(), text);
            }
        }
        Self::new(inner, named)
            .map(Some)
            .map_err(|error| checkpoint.error("tokenizer.json", error))
    }

    /// A tokenizer with the tokens that templates may name (`bos_token`, `eos_token`, ...).
    pub fn new(
        mut inner: tokenizers::Tokenizer,
        named: BTreeMap<String, String>,
    ) -> Result<Self, String> {
        // Training leftovers that would silently cut or pad prompts.
        inner
            .with_truncation(None)
            .map_err(|error| error.to_string())?
            .with_padding(None);
        let mut special: Vec<u32> = inner
            .get_added_tokens_decoder()
            .into_iter()
            .filter_map(|(id, token)| token.special.then_some(id))
            .collect();
        special.sort_unstable();
        let plan = DecodePlan::of(&inner);
        let pieces = match plan {
            DecodePlan::Pieces { .. } => inner.get_vocab_size(true),
            DecodePlan::Window => 0,
        };
        Ok(Tokenizer {
            plan,
            pieces: vec![OnceLock::new(); pieces],
            inner,
            special,
            named,
        })
    }

    /// Token ids of `text`. `add_special_tokens` adds what the model expects around a plain
    /// prompt (a beginning-of-text token, usually); rendered chats have it already.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
        self.inner
            .encode_fast(text, add_special_tokens)
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|error| error.to_string())
    }

    /// The text of `ids`.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, String> {
        self.inner
            .decode(ids, skip_special_tokens)
            .map_err(|error| error.to_string())
    }

    /// One token on its own, for listings of log-probabilities: its bytes, which may be a part of
    /// a character only. Empty for an id without a token.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        match self.plan.piece(&self.inner, id, false) {
            Some(bytes) => bytes,
            None => self.decode(&[id], false).unwrap_or_default().into_bytes(),
        }
    }

    /// One token as it stands in the vocabulary (`Ġthe`, `▁the`, `<0xC3>`); `None` for an id without a
    /// token.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// As [`Tokenizer::token_bytes`]; `None` if a token's bytes depend on the tokens around it.
    pub(crate) fn exact_bytes(&self, id: u32) -> Option<Vec<u8>> {
        self.plan.piece(&self.inner, id, false)
    }

    /// The bytes of a token in a text, of which it may be the first; none if the decoder cannot tell.
    pub(crate) fn piece(&self, id: u32, first: bool) -> Cow<'_, [u8]> {
        let make = || self.plan.piece(&self.inner, id, first).unwrap_or_default();
        match self.pieces.get(id as usize) {
            Some(known) if !first => Cow::Borrowed(known.get_or_init(|| make().into())),
            _ => Cow::Owned(make()),
        }
    }

    /// Id of a token given as it stands in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether `id` is a special token.
    pub fn is_special(&self, id: u32) -> bool {
        let range = self.special.first()..=self.special.last();
        range.contains(&Some(&id)) && self.special.binary_search(&id).is_ok()
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Tokens that templates may name: `bos_token`, `eos_token` and so on.
    pub fn named_tokens(&self) -> &BTreeMap<String, String> {
        &self.named
    }

    /// Id of the `eos_token` of `tokenizer_config.json`.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.token_to_id(self.named.get("eos_token")?)
    }
}
