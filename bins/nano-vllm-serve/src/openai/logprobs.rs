//! Log-probabilities as the API writes them.

use engine::tokenizer::Tokenizer;
use sampler::TokenLogprobs;
use serde_json::{Map, Value, json};

/// How tokens are written.
pub struct TokenNames<'a> {
    pub tokenizer: Option<&'a Tokenizer>,
    pub as_ids: bool,
}

impl TokenNames<'_> {
    /// A token's text, or `token_id:N` if that was asked for or there is no tokenizer.
    pub fn text(&self, id: u32) -> String {
        match self.tokenizer {
            Some(t) if !self.as_ids => String::from_utf8_lossy(&t.token_bytes(id)).into_owned(),
            _ => format!("token_id:{id}"),
        }
    }

    fn bytes(&self, id: u32) -> Value {
        match self.tokenizer {
            Some(t) => json!(t.token_bytes(id)),
            None => Value::Null,
        }
    }
}

/// JSON has no infinity: vLLM writes -9999.
fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

/// The `logprobs` object of a completion: four parallel lists over `tokens`.
/// `None` entries are tokens without a probability (the first of an echoed prompt). `offset` is
/// the number of characters before the first.
pub fn completion(
    entries: &[(u32, Option<&TokenLogprobs>)],
    mut offset: usize,
    names: &TokenNames<'_>,
) -> Value {
    let (mut offsets, mut texts, mut own, mut tops) = (vec![], vec![], vec![], vec![]);
    for (token, entry) in entries {
        let text = names.text(*token);
        offsets.push(offset);
        offset += text.chars().count();
        own.push(entry.map(|e| finite(e.logprob)));
        tops.push(entry.map(|e| {
            let mut top: Map<String, Value> = e
                .top
                .iter()
                .map(|(id, p)| (names.text(*id), json!(finite(*p))))
                .collect();
            top.insert(text.clone(), json!(finite(e.logprob)));
            top
        }));
        texts.push(text);
    }
    json!({"text_offset": offsets, "token_logprobs": own, "tokens": texts, "top_logprobs": tops})
}

/// The `logprobs` object of a chat choice.
pub fn chat(entries: &[TokenLogprobs], names: &TokenNames<'_>) -> Value {
    let one = |id: u32, p: f32| json!({"token": names.text(id), "logprob": finite(p), "bytes": names.bytes(id)});
    let content: Vec<Value> = entries
        .iter()
        .map(|e| {
            let mut entry = one(e.token, e.logprob);
            entry["top_logprobs"] = e.top.iter().map(|(id, p)| one(*id, *p)).collect();
            entry
        })
        .collect();
    json!({"content": content})
}

/// vLLM's `prompt_logprobs`: a list over the prompt, the first entry null.
pub fn prompt(entries: &[Option<TokenLogprobs>], names: &TokenNames<'_>) -> Value {
    let one = |id: u32, p: f32, rank: u32| json!({"logprob": finite(p), "rank": rank, "decoded_token": names.text(id)});
    entries
        .iter()
        .map(|entry| {
            let e = entry.as_ref()?;
            let mut map: Map<String, Value> = e
                .top
                .iter()
                .zip(1..)
                .map(|((id, p), rank)| (id.to_string(), one(*id, *p, rank)))
                .collect();
            map.entry(e.token.to_string())
                .or_insert_with(|| one(e.token, e.logprob, e.rank));
            Some(map)
        })
        .collect::<Vec<_>>()
        .into()
}
