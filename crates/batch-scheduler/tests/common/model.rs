//! The model: position `p` holds a digest of its token and of the digests of all positions it
//! attends to, and what is sampled there is a hash of that digest and the sequence's seed.

use batch_scheduler::StopCriteria;
use paged_kv::TokenId;

/// Sampling parameters of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    pub seed: u64,
    pub vocab: u32,
    /// Sampling fails once the sequence has this many tokens.
    pub fails_at: Option<u32>,
}

pub fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.rotate_left(23) ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 32)
}

/// First position that `position` attends to.
pub fn window_start(position: u32, window: Option<u32>) -> u32 {
    window.map_or(0, |w| (position + 1).saturating_sub(w))
}

/// Digest of a position from the digests of the earlier ones that it attends to.
pub fn digest(token: TokenId, position: u32, seen: impl Iterator<Item = u64>) -> u64 {
    seen.fold(mix(token.into(), position.into()), mix)
}

pub fn sample(digest: u64, position: u32, params: &Params) -> TokenId {
    (mix(mix(digest, params.seed), position.into()) % u64::from(params.vocab)) as TokenId
}

/// How a sequence ends, as far as the model alone decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    Eos,
    Stop(TokenId),
    Length,
    Failed,
}

/// One sequence computed without blocks, batches or steps, from `tokens` on, of which `num_prompt`
/// are the prompt. Returns the whole output.
pub fn sequential(
    tokens: &[TokenId],
    num_prompt: usize,
    stop: &StopCriteria,
    params: &Params,
    window: Option<u32>,
    max_len: usize,
) -> (Vec<TokenId>, End) {
    let mut tokens = tokens.to_vec();
    let mut digests: Vec<u64> = Vec::new();
    loop {
        while digests.len() < tokens.len() {
            let p = digests.len() as u32;
            let seen = digests[window_start(p, window) as usize..].iter().copied();
            let d = digest(tokens[p as usize], p, seen);
            digests.push(d);
        }
        let last = tokens.len() as u32 - 1;
        if params.fails_at.is_some_and(|at| last + 1 >= at) {
            return (tokens.split_off(num_prompt), End::Failed);
        }
        let token = sample(digests[last as usize], last, params);
        tokens.push(token);
        let output = (tokens.len() - num_prompt) as u32;
        let end =
            if output >= stop.min_tokens && !stop.ignore_eos && stop.eos_token_ids.contains(&token)
            {
                End::Eos
            } else if output >= stop.min_tokens && stop.stop_token_ids.contains(&token) {
                End::Stop(token)
            } else if output >= stop.max_tokens || tokens.len() >= max_len {
                End::Length
            } else {
                continue;
            };
        return (tokens.split_off(num_prompt), end);
    }
}
