//! What a manager is made from.

use crate::ids::BlockSize;

/// Sizes and switches of a [`BlockManager`](crate::BlockManager).
#[derive(Clone, Debug)]
pub struct Config {
    pub(crate) num_blocks: usize,
    pub(crate) block_size: BlockSize,
    pub(crate) prefix_caching: bool,
    pub(crate) host_blocks: u32,
    pub(crate) hash_key: Option<u128>,
}

impl Config {
    /// For KV buffers of `num_blocks` blocks of `block_size` tokens. One of the blocks is
    /// [`BlockId::NULL`](crate::BlockId::NULL), so `num_blocks - 1` are for sequences.
    pub fn new(num_blocks: usize, block_size: BlockSize) -> Self {
        Self {
            num_blocks,
            block_size,
            prefix_caching: true,
            host_blocks: 0,
            hash_key: None,
        }
    }

    /// Without prefix caching nothing is hashed, stored or found. On by default.
    pub fn prefix_caching(mut self, on: bool) -> Self {
        self.prefix_caching = on;
        self
    }

    /// For host buffers of `blocks` blocks, into which
    /// [`swap_out`](crate::KvAllocator::swap_out) moves sequences. None by default.
    pub fn host_blocks(mut self, blocks: u32) -> Self {
        self.host_blocks = blocks;
        self
    }

    /// Fixes the key of the hash, so that hashes repeat from run to run and between processes.
    /// By default it is random: then nobody can prepare prompts that crowd one place of the
    /// index.
    pub fn hash_key(mut self, key: u128) -> Self {
        self.hash_key = Some(key);
        self
    }

    pub(crate) fn check(&self) -> Result<u32, ConfigError> {
        let (num_blocks, block_size) = (self.num_blocks, self.block_size.get());
        if num_blocks < 2 {
            return Err(ConfigError::TooFewBlocks { num_blocks });
        }
        // Positions and indices of token storage are 32-bit for the kernels' sake.
        num_blocks
            .checked_mul(block_size)
            .and_then(|slots| u32::try_from(slots).ok())
            .and_then(|_| u32::try_from(num_blocks).ok())
            .ok_or(ConfigError::TooManySlots {
                num_blocks,
                block_size,
            })
    }
}

/// Sizes that no manager can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A block without tokens.
    #[error("block size is 0; a block holds at least 1 token")]
    ZeroBlockSize,
    /// Nothing left for sequences.
    #[error("{num_blocks} KV blocks; at least 2 are needed, since block 0 serves as padding")]
    TooFewBlocks {
        /// What was asked for.
        num_blocks: usize,
    },
    /// Slot numbers would not fit 32 bits.
    #[error(
        "{num_blocks} KV blocks of {block_size} tokens exceed {} token slots",
        u32::MAX
    )]
    TooManySlots {
        /// What was asked for.
        num_blocks: usize,
        /// What was asked for.
        block_size: usize,
    },
}
