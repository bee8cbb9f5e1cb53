//! Small types that keep blocks, sizes, tokens and salts apart.

use std::fmt;
use std::num::NonZeroU32;

use xxhash_rust::xxh3::xxh3_128;

use crate::ConfigError;

/// A token id of the model's vocabulary.
pub type TokenId = u32;

/// Index of a block in the KV buffers, `0..num_blocks` of the [`Config`](crate::Config).
///
/// Block 0 is [`BlockId::NULL`]: the manager never hands it out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub(crate) u32);

impl BlockId {
    /// The placeholder for a block that was given back while its table lives on. It is a real
    /// block of the buffers that no sequence owns, so padding may be read from and written to it.
    pub const NULL: BlockId = BlockId(0);

    /// The block at `index` of the KV buffers. Allocators name blocks; this is for plans made
    /// by hand and for whoever stores plain indices.
    #[inline]
    pub const fn new(index: u32) -> Self {
        Self(index)
    }

    /// The index.
    #[inline]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The index, for use with slices.
    #[inline]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// Whether this is [`BlockId::NULL`].
    #[inline]
    pub const fn is_null(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Tokens in a block: any number from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockSize(NonZeroU32);

impl BlockSize {
    /// A block of `tokens` tokens, or [`ConfigError::ZeroBlockSize`].
    pub const fn new(tokens: u32) -> Result<Self, ConfigError> {
        match NonZeroU32::new(tokens) {
            Some(tokens) => Ok(Self(tokens)),
            None => Err(ConfigError::ZeroBlockSize),
        }
    }

    /// The number of tokens.
    #[inline]
    pub const fn get(self) -> usize {
        self.0.get() as usize
    }

    /// Blocks that hold `tokens` tokens.
    #[inline]
    pub const fn blocks_for(self, tokens: usize) -> usize {
        tokens.div_ceil(self.get())
    }
}

impl Default for BlockSize {
    /// 16 tokens, as in vLLM.
    fn default() -> Self {
        Self(NonZeroU32::new(16).expect("16 is not zero"))
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Copy the keys and values of block `src` over those of block `dst`, in every layer.
///
/// Carry copies out in the order in which they were pushed, and before anything else of the step
/// is written: a later copy may read what an earlier one wrote, or overwrite what it read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockCopy {
    /// Where to read.
    pub src: BlockId,
    /// Where to write.
    pub dst: BlockId,
}

/// Keeps the prefixes of one tenant, adapter or image apart from equal tokens of another: blocks
/// are shared only under equal salts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Salt(pub(crate) [u64; 2]);

impl Salt {
    /// The salt of everything that may be shared by all.
    pub const NONE: Salt = Salt([0; 2]);

    /// A salt given as a number.
    pub const fn new(salt: u128) -> Self {
        Self([salt as u64, (salt >> 64) as u64])
    }

    /// A salt given as a string or another run of bytes, by its 128-bit hash. Without bytes:
    /// [`Salt::NONE`].
    pub fn from_bytes(bytes: &[u8]) -> Self {
        match bytes {
            [] => Self::NONE,
            _ => Self::new(xxh3_128(bytes)),
        }
    }

    /// The number.
    pub const fn get(self) -> u128 {
        (self.0[1] as u128) << 64 | self.0[0] as u128
    }
}

/// The chained hash of a full block: a function of the pool's key, the salt, and every token from
/// the start of the sequence to the end of this block.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockHash(pub(crate) [u64; 2]);

impl BlockHash {
    /// The hash as a number.
    pub const fn get(self) -> u128 {
        (self.0[1] as u128) << 64 | self.0[0] as u128
    }

    pub(crate) const fn new(hash: u128) -> Self {
        Self([hash as u64, (hash >> 64) as u64])
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockHash({:032x})", self.get())
    }
}
