//! How decode attention's work is cut, as far as the host must know, and memory for the pieces:
//! the counterpart of `attention_decode_work.cuh`.

use tch::{Kind, Tensor};

use super::CudaError;
use super::attention::{Heads, check_heads};
use super::kernels::Kernels;
use crate::Error;

/// Tokens of a decode tile: TILE in the source.
pub(super) const TILE: usize = 16;
/// ONE_SPLIT and MIN_SPLIT in the source, in tiles.
const ONE_SPLIT: usize = 24;
const MIN_SPLIT: usize = 16;
/// One long sequence is cut into about as many items as keep a GPU busy.
const ITEMS: usize = 256;
/// Most thread blocks of a multiprocessor.
pub(super) const MOST_BLOCKS: usize = 4;
/// Sequences of one decode launch, whose list is in shared memory: MOST_SEQS in the source.
pub(super) const LAUNCH_SEQS: usize = 256;

/// How the heads that share a KV head are laid on the tensor cores' 16 rows in decode.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    /// Groups of one KV head: more than one if its heads are more than the rows.
    pub(super) groups: usize,
    /// Heads in a group.
    pub(super) rows: usize,
    /// Most splits of a context.
    pub(super) max_splits: usize,
}

impl Heads {
    pub(super) fn rows(&self) -> Rows {
        let ratio = self.heads / self.kv_heads;
        // The registers hold 16 rows of up to 128 dimensions.
        let most = if self.head_dim > 128 { 8 } else { 16 };
        let groups = ratio.div_ceil(most);
        Rows {
            groups,
            rows: ratio.div_ceil(groups),
            max_splits: (ITEMS / (self.kv_heads * groups)).max(8),
        }
    }

    /// Lists of partial results: one for each sequence and this many.
    pub(super) fn lists(&self) -> usize {
        self.kv_heads * self.rows().groups
    }

    /// Most splits that a context of up to `max_context` tokens has.
    pub(super) fn splits(&self, max_context: usize) -> usize {
        // One more: a window may begin within a tile.
        let tiles = max_context.div_ceil(TILE) + 1;
        if tiles <= ONE_SPLIT {
            return 1;
        }
        tiles.div_ceil(MIN_SPLIT).min(self.rows().max_splits)
    }
}

/// Memory that [`Kernels::attention_decode`] keeps its partial results in. One is enough for all
/// layers and all graphs of a stream; kernels that may run at the same time need one each.
#[derive(Debug)]
pub struct DecodeWorkspace {
    pub(super) heads: Heads,
    pub(super) max_seqs: usize,
    pub(super) max_context: usize,
    pub(super) invariant: bool,
    pub(super) part: Tensor,
    pub(super) part_max: Tensor,
    pub(super) counters: Tensor,
}

impl DecodeWorkspace {
    /// Another handle on the same memory.
    pub fn shallow_clone(&self) -> Self {
        Self {
            part: self.part.shallow_clone(),
            part_max: self.part_max.shallow_clone(),
            counters: self.counters.shallow_clone(),
            ..*self
        }
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        4 * [&self.part, &self.part_max, &self.counters]
            .map(Tensor::numel)
            .iter()
            .sum::<usize>()
    }
}

impl Kernels {
    /// A workspace for up to `max_seqs` sequences of up to `max_context` tokens. With `invariant` a
    /// sequence's result does not depend on the others, to the last bit; that takes more memory, and more
    /// time where there are many or long sequences.
    pub fn decode_workspace(
        &self,
        heads: Heads,
        max_seqs: usize,
        max_context: usize,
        invariant: bool,
    ) -> Result<DecodeWorkspace, Error> {
        check_heads("decode_workspace", &heads)?;
        let seqs = max_seqs.clamp(1, LAUNCH_SEQS);
        let lists = seqs * heads.lists();
        let items = match invariant {
            true => lists * heads.splits(max_context),
            // Two parts for each thread block of the largest grid.
            false => 2 * MOST_BLOCKS * self.num_sms(),
        };
        let rows = items * heads.rows().rows;
        let make = |len: usize, kind| {
            Tensor::f_zeros([len as i64], (kind, self.device()))
                .map_err(|e| Error::from(CudaError(e.to_string())))
        };
        Ok(DecodeWorkspace {
            heads,
            max_seqs,
            max_context,
            invariant,
            part: make(rows * heads.head_dim, Kind::Float)?,
            part_max: make(rows * 2, Kind::Float)?,
            counters: make(lists, Kind::Int)?,
        })
    }
}
