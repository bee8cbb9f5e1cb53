//! The keyed hash that finds a prefix.

use std::hash::{BuildHasher, Hasher, RandomState};

use xxhash_rust::xxh3::{xxh3_128_with_secret, xxh3_128_with_seed};

use crate::ids::{BlockHash, Salt, TokenId};

/// XXH3 asks for at least 136 bytes of secret; its own default has 192.
const SECRET_BYTES: usize = 192;
/// Words of the parent's hash in front of the tokens.
const PARENT_WORDS: usize = 4;

/// XXH3-128 over (hash of the parent, tokens of the block), under a secret drawn from a key.
///
/// The hash only finds candidates: [`Prefixes`](crate::prefix::Prefixes) compares the tokens and
/// the parent. The key keeps an attacker from filling one bucket, not from a wrong hit.
pub(crate) struct ChainHasher {
    secret: [u8; SECRET_BYTES],
    /// Parent and tokens side by side: hashing in one run is several times faster than streaming.
    input: Vec<u32>,
}

impl ChainHasher {
    pub(crate) fn new(key: u128, block_size: usize) -> Self {
        let mut secret = [0; SECRET_BYTES];
        for (i, chunk) in secret.chunks_exact_mut(16).enumerate() {
            let word = xxh3_128_with_seed(&key.to_le_bytes(), (key >> 64) as u64 ^ i as u64);
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        Self {
            secret,
            input: vec![0; PARENT_WORDS + block_size],
        }
    }

    /// The hash that stands for "no block yet" under a salt.
    pub(crate) fn root(&self, salt: Salt) -> BlockHash {
        BlockHash::new(xxh3_128_with_secret(
            &salt.get().to_le_bytes(),
            &self.secret,
        ))
    }

    /// The hash of a full block behind `parent`.
    #[inline]
    pub(crate) fn next(&mut self, parent: BlockHash, tokens: &[TokenId]) -> BlockHash {
        let [lo, hi] = parent.0;
        let (head, tail) = self.input.split_at_mut(PARENT_WORDS);
        head.copy_from_slice(&[lo as u32, (lo >> 32) as u32, hi as u32, (hi >> 32) as u32]);
        tail.copy_from_slice(tokens);
        let bytes: &[u8] = bytemuck::cast_slice(&self.input);
        BlockHash::new(xxh3_128_with_secret(bytes, &self.secret))
    }
}

/// A number that no other call returns, from the standard library's source of hash keys.
pub(crate) fn random_u64() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// A key of 128 bits from the same source.
pub(crate) fn random_key() -> u128 {
    u128::from(random_u64()) << 64 | u128::from(random_u64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_input_matters() {
        let mut h = ChainHasher::new(7, 4);
        let root = h.root(Salt::NONE);
        let base = h.next(root, &[1, 2, 3, 4]);
        assert_eq!(base, h.next(root, &[1, 2, 3, 4]));
        for other in [[0, 2, 3, 4], [1, 2, 3, 5], [2, 1, 3, 4]] {
            assert_ne!(base, h.next(root, &other));
        }
        assert_ne!(base, h.next(base, &[1, 2, 3, 4]));
        let salted = h.root(Salt::new(1));
        assert_ne!(base, h.next(salted, &[1, 2, 3, 4]));
        let mut keyed = ChainHasher::new(8, 4);
        let root = keyed.root(Salt::NONE);
        assert_ne!(base, keyed.next(root, &[1, 2, 3, 4]));
        assert_ne!(random_u64(), random_u64());
        // Each bit of the parent's hash.
        for bit in 0..128 {
            let bit = 1u128 << bit;
            let [one, two] = [[0, 0], [bit as u64, (bit >> 64) as u64]].map(BlockHash);
            assert_ne!(h.next(one, &[1, 2, 3, 4]), h.next(two, &[1, 2, 3, 4]));
        }
    }

    #[test]
    fn both_halves_of_a_key_are_random() {
        let (a, b) = (random_key(), random_key());
        assert_ne!(a >> 64, b >> 64);
        assert_ne!(a as u64, b as u64);
    }
}
