//! Counter-based noise: a pure function of seed, position, and token or group of tokens.
//!
//! The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw: *Parallel random numbers: as easy
//! as 1, 2, 3*, SC'11). The token at `position` of a sequence with `seed` uses
//!
//! - key `[seed mod 2^32, seed div 2^32]`,
//! - for each group of 64 tokens, `group = token div 64`, counter `[group div 4, position, 1, 0]`,
//!   output word `r` number `group mod 4`,
//! - for each token counter `[token div 4, position, 0, 0]`, output word `r` number `token mod 4`,
//! - `u = (r + 1/2) / 2^32`, `e = -ln(1 - u)`, which is exponentially distributed, and
//! - `g = -ln(e)`, which has the Gumbel distribution.
//!
//! With weights `w_i = exp(x_i)` the one with the largest `x_i + g_i`, which is the one with the
//! smallest `e_i / w_i`, is `i` with probability `w_i / sum(w)` (the Gumbel-max trick; the
//! exponential race), so no normalisation and no sort is needed. First the groups race, each with
//! the sum of its tokens' weights, then the tokens of the group that has won: token `i` of group
//! `G` comes with probability `w_G / sum(w) * w_i / w_G` (top-down sampling of a Gumbel process:
//! Maddison, Tarlow, Minka: *A\* sampling*, NIPS'14). So a row takes one random word for every 64
//! tokens, and not one for each. Small `e` decide, and they come from small `r`, where `u` has its
//! full precision; hence `1 - u` and not `u`.

const MUL: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const LOW: u64 = 0xFFFF_FFFF;
const ROUNDS: usize = 10;

/// Tokens of a group.
pub(crate) const GROUP: usize = 64;

/// No `g` is larger: the smallest `u` is `2^-33`.
pub(crate) const MAX_GUMBEL: f64 = 22.875;

/// Philox4x32-10.
///
/// ```
/// let words = sampler::philox4x32([0; 4], [0; 2]);
/// assert_eq!(words, [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
/// ```
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut x0, mut x1, mut x2, mut x3] = counter.map(u64::from);
    let mut key = key;
    for _ in 0..ROUNDS {
        let (a, b) = (MUL[0] * x0, MUL[1] * x2);
        (x0, x1, x2, x3) = (
            (b >> 32) ^ x1 ^ u64::from(key[0]),
            b & LOW,
            (a >> 32) ^ x3 ^ u64::from(key[1]),
            a & LOW,
        );
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    [x0 as u32, x1 as u32, x2 as u32, x3 as u32]
}

/// The seed of sequence `index` of a request that asked for several (`n`): the request's own
/// for the first, and for the others one that no position of any of them shares.
pub fn sequence_seed(seed: u64, index: u32) -> u64 {
    if index == 0 {
        return seed;
    }
    let words = philox4x32([index, 0, 0, 1], split(seed));
    u64::from(words[1]) << 32 | u64::from(words[0])
}

/// The key of a seed.
pub(crate) fn split(seed: u64) -> [u32; 2] {
    [seed as u32, (seed >> 32) as u32]
}

/// The noise of one position of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Noise {
    key: [u32; 2],
    position: u32,
}

impl Noise {
    /// The noise for the token at `position` (counted from 0, prompt included).
    pub fn new(seed: u64, position: u32) -> Self {
        Self {
            key: split(seed),
            position,
        }
    }

    /// The random word of a token.
    pub fn word(&self, token: u32) -> u32 {
        let words = philox4x32([token / 4, self.position, 0, 0], self.key);
        words[(token % 4) as usize]
    }

    /// The Gumbel noise of a token.
    pub fn gumbel(&self, token: u32) -> f64 {
        gumbel(self.word(token))
    }

    /// The random words of groups `first..first + 4`; `first` is a multiple of 4.
    pub(crate) fn group_words(&self, first: u32) -> [u32; 4] {
        philox4x32([first / 4, self.position, 1, 0], self.key)
    }

    /// The Gumbel noise of a group of 64 tokens.
    pub fn group_gumbel(&self, group: u32) -> f64 {
        gumbel(self.group_words(group)[(group % 4) as usize])
    }
}

/// The Gumbel noise that a random word stands for.
pub(crate) fn gumbel(word: u32) -> f64 {
    let u = (f64::from(word) + 0.5) / 4_294_967_296.0;
    -(-(-u).ln_1p()).ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random123's `kat_vectors`, philox4x32 with 10 rounds.
    #[test]
    fn published_vectors() {
        assert_eq!(
            philox4x32([0; 4], [0; 2]),
            [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]
        );
        assert_eq!(
            philox4x32([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]
        );
        assert_eq!(
            philox4x32(
                [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
                [0xa4093822, 0x299f31d0]
            ),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn groups_have_words_of_their_own() {
        let noise = Noise::new(5, 7);
        let tokens = [0, 1, 2, 3].map(|token| noise.word(token));
        assert!(
            !noise
                .group_words(0)
                .iter()
                .any(|word| tokens.contains(word))
        );
        assert_eq!(noise.group_gumbel(6), gumbel(noise.group_words(4)[2]));
    }

    #[test]
    fn extremes_of_the_noise() {
        assert!(gumbel(0) <= MAX_GUMBEL && gumbel(0) > MAX_GUMBEL - 0.01);
        assert!(gumbel(u32::MAX).is_finite() && gumbel(u32::MAX) < -3.0);
    }

    #[test]
    fn sequences_of_a_request_differ() {
        let seeds: Vec<u64> = (0..100).map(|index| sequence_seed(5, index)).collect();
        let distinct: std::collections::HashSet<_> = seeds.iter().collect();
        assert_eq!((seeds[0], distinct.len()), (5, 100));
    }
}
