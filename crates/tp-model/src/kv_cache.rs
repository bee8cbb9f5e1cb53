//! The tensors that hold keys and values, by block.

use tch::{Device, Kind, Tensor};
use torch_ext::cpu::{self, Dtype};

use crate::error::ModelError;

/// Shape of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Number of layers.
    pub num_layers: usize,
    /// Key and value heads of this rank.
    pub num_kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// Tokens in a block.
    pub block_size: usize,
    /// Dtype of the cache.
    pub kind: Kind,
}

impl KvShape {
    /// Bytes of one block over all layers, keys and values.
    pub fn bytes_per_block(&self) -> usize {
        let token = self.num_kv_heads * self.head_dim * self.kind.elt_size_in_bytes();
        // A block size beyond all memory is refused by whoever sees the result.
        (2 * self.num_layers * token).saturating_mul(self.block_size)
    }
}

/// Keys and values of one layer.
#[derive(Debug)]
pub struct LayerKv {
    /// `[blocks, kv_heads, block_size, head_dim]`: a head's keys of one block are contiguous.
    pub k: Tensor,
    /// As `k`, values.
    pub v: Tensor,
}

impl LayerKv {
    /// Tokens in a block.
    pub fn block_size(&self) -> i64 {
        self.k.size()[2]
    }

    /// Writes one key and value for each token. `slots` (int64) are `block * block_size + offset`.
    pub fn write(&self, slots: &Tensor, k: &Tensor, v: &Tensor) {
        let block_size = self.block_size();
        let block = slots.divide_scalar_mode(block_size, "floor");
        let offset = slots.remainder(block_size);
        for (cache, new) in [(&self.k, k), (&self.v, v)] {
            // Advanced indexing on dimensions 0 and 2 yields [tokens, kv_heads, head_dim].
            let _ = cache.shallow_clone().index_put_(
                &[Some(&block), None::<&Tensor>, Some(&offset)],
                &new.to_kind(cache.kind()),
                false,
            );
        }
    }

    /// The first `len` tokens of the sequence whose blocks (int64) are given: keys and values,
    /// each `[kv_heads, len, head_dim]`.
    pub fn gather(&self, blocks: &Tensor, len: i64) -> (Tensor, Tensor) {
        let gather = |cache: &Tensor| {
            let size = cache.size();
            cache
                .index_select(0, blocks)
                .transpose(0, 1)
                .reshape([size[1], -1, size[3]])
                .narrow(1, 0, len)
        };
        (gather(&self.k), gather(&self.v))
    }
}

/// The whole cache of one rank.
#[derive(Debug)]
pub struct KvCache {
    shape: KvShape,
    num_blocks: usize,
    /// One entry for each layer.
    pub layers: Vec<LayerKv>,
}

impl KvCache {
    /// Allocates `num_blocks` blocks. They are zeroed, because attention may multiply values
    /// beyond a sequence's end with weight zero and must not meet NaN there.
    pub fn new(shape: KvShape, num_blocks: usize, device: Device) -> Result<Self, ModelError> {
        if num_blocks == 0 || shape.block_size == 0 {
            return Err(ModelError::Options(format!(
                "the KV cache needs at least one block of at least one token, \
                 got {num_blocks} blocks of {} tokens",
                shape.block_size
            )));
        }
        let layers = (0..shape.num_layers)
            .map(|_| {
                Ok(LayerKv {
                    k: zeros(&shape, num_blocks, device)?,
                    v: zeros(&shape, num_blocks, device)?,
                })
            })
            .collect::<Result<Vec<_>, ModelError>>()?;
        Ok(Self {
            shape,
            num_blocks,
            layers,
        })
    }

    /// Shape of the blocks.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Number of blocks.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Copies whole blocks `(src, dst)` in all layers, one after the other. A pair that
    /// names a block outside of the cache is an error, and nothing is copied.
    pub fn copy_blocks(&self, pairs: &[(u32, u32)]) -> Result<(), String> {
        self.check_copies(pairs)?;
        for cache in self.tensors() {
            for &(src, dst) in pairs {
                cache.get(i64::from(dst)).copy_(&cache.get(i64::from(src)));
            }
        }
        Ok(())
    }

    /// Keys and values of all layers.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.layers.iter().flat_map(|layer| [&layer.k, &layer.v])
    }

    /// An error if a copy `(src, dst)` names a block outside of the cache.
    pub(crate) fn check_copies(&self, pairs: &[(u32, u32)]) -> Result<(), String> {
        let outside = |(src, dst): &&(u32, u32)| src.max(dst) >= &(self.num_blocks as u32);
        match pairs.iter().find(outside) {
            None => Ok(()),
            Some((src, dst)) => Err(format!(
                "a copy of block {src} to {dst}, but there are {} blocks",
                self.num_blocks
            )),
        }
    }
}

/// One layer's keys or values.
fn zeros(shape: &KvShape, num_blocks: usize, device: Device) -> Result<Tensor, ModelError> {
    let [heads, tokens, dim] = [shape.num_kv_heads, shape.block_size, shape.head_dim];
    Ok(match (device, Dtype::from_kind(shape.kind)) {
        (Device::Cpu, Some(dtype)) => cpu::new_cache(num_blocks, heads, tokens, dim, dtype)?,
        _ => {
            let size = [num_blocks, heads, tokens, dim].map(|n| n as i64);
            Tensor::f_zeros(size, (shape.kind, device))?
        }
    })
}
