//! What a runner remembers of each running sequence, by slot: a plan carries only what changed.

use std::sync::Arc;

use batch_scheduler::{AdmittedSeq, Row, SlotId};
use paged_kv::{BlockId, TokenId};

use crate::runner::SeqParams;
use crate::step_input::SequenceInput;

/// A running sequence.
#[derive(Debug)]
pub(crate) struct Slot {
    /// All tokens so far, generated ones included.
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) num_prompt: usize,
    pub(crate) params: Arc<SeqParams>,
    /// Why this sequence cannot be sampled, if it cannot: its parameters do not fit the model.
    /// It is computed like any other, on tokens that do no harm, so that the rest of the batch
    /// goes on until the scheduler hears of it.
    pub(crate) refused: Option<String>,
    blocks: Vec<i32>,
}

#[cfg(feature = "cuda")]
impl Slot {
    /// The block table.
    pub(crate) fn blocks(&self) -> &[i32] {
        &self.blocks
    }

    pub(crate) fn num_blocks(&self) -> usize {
        self.blocks.len()
    }
}

/// The slots.
#[derive(Debug)]
pub(crate) struct InputBatch {
    slots: Vec<Option<Slot>>,
    num_blocks: usize,
}

impl InputBatch {
    pub(crate) fn new(max_num_seqs: usize, num_blocks: usize) -> Self {
        Self {
            slots: (0..max_num_seqs).map(|_| None).collect(),
            num_blocks,
        }
    }

    pub(crate) fn release(&mut self, id: SlotId) -> Result<(), String> {
        match self.slots.get_mut(id.0 as usize).and_then(Option::take) {
            Some(_) => Ok(()),
            None => Err(format!("slot {} is released but holds no sequence", id.0)),
        }
    }

    pub(crate) fn admit(
        &mut self,
        seq: AdmittedSeq<Arc<SeqParams>>,
        refused: Option<String>,
    ) -> Result<(), String> {
        let blocks = self.block_ids(&seq.blocks)?;
        let (id, count) = (seq.slot.0, self.slots.len());
        let Some(slot) = self.slots.get_mut(id as usize) else {
            return Err(format!(
                "slot {id} is admitted, but there are {count} slots"
            ));
        };
        if slot.is_some() {
            return Err(format!("slot {id} is admitted but holds a sequence"));
        }
        let mut tokens = seq.tokens;
        if refused.is_some() {
            tokens.fill(0);
        }
        *slot = Some(Slot {
            tokens,
            num_prompt: seq.num_prompt as usize,
            params: seq.params,
            refused,
            blocks,
        });
        Ok(())
    }

    pub(crate) fn get(&self, id: SlotId) -> Result<&Slot, String> {
        self.slots
            .get(id.0 as usize)
            .and_then(Option::as_ref)
            .ok_or_else(|| format!("slot {} holds no sequence", id.0))
    }

    pub(crate) fn get_mut(&mut self, id: SlotId) -> Result<&mut Slot, String> {
        self.slots
            .get_mut(id.0 as usize)
            .and_then(Option::as_mut)
            .ok_or_else(|| format!("slot {} holds no sequence", id.0))
    }

    /// Applies a row's new blocks to its sequence's table.
    pub(crate) fn extend(&mut self, row: &Row, new_blocks: &[BlockId]) -> Result<(), String> {
        let range = row.new_blocks.start as usize..row.new_blocks.end as usize;
        let Some(new) = new_blocks.get(range) else {
            return Err(format!(
                "a row points at new blocks {:?} of {}",
                row.new_blocks,
                new_blocks.len()
            ));
        };
        if new.is_empty() {
            return Ok(());
        }
        let new = self.block_ids(new)?;
        let table = &mut self.get_mut(row.slot)?.blocks;
        let at = row.table_at as usize;
        if at > table.len() {
            let (slot, len) = (row.slot.0, table.len());
            return Err(format!(
                "slot {slot} gets blocks at {at}, but its table has {len}"
            ));
        }
        table.truncate(at);
        table.extend(new);
        Ok(())
    }

    /// The tokens of a row with what the model must know of their sequence.
    pub(crate) fn sequence(
        &self,
        row: &Row,
        block_size: usize,
    ) -> Result<SequenceInput<'_>, String> {
        let slot = self.get(row.slot)?;
        let (start, end) = (row.start as usize, row.start as usize + row.len as usize);
        let (tokens, blocks) = (slot.tokens.len(), slot.blocks.len());
        if row.len == 0 || end > tokens || end > blocks * block_size {
            return Err(format!(
                "slot {} computes tokens {start}..{end}, but has {tokens} tokens and {blocks} \
                 blocks of {block_size}",
                row.slot.0
            ));
        }
        Ok(SequenceInput {
            tokens: &slot.tokens[start..end],
            start,
            num_prompt: slot.num_prompt,
            blocks: &slot.blocks,
        })
    }

    fn block_ids(&self, blocks: &[BlockId]) -> Result<Vec<i32>, String> {
        let id = |block: &BlockId| match block.index() < self.num_blocks {
            true => Ok(block.get() as i32),
            false => Err(format!(
                "block {block} is not among {} blocks",
                self.num_blocks
            )),
        };
        blocks.iter().map(id).collect()
    }
}
