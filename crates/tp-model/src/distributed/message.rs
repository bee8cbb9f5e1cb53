//! What rank 0 tells the others of a step: the plan as plain numbers.

use std::sync::Arc;

use batch_scheduler::{AdmittedSeq, Row, SampleRow, SlotId, StepPlan};
use paged_kv::{BlockCopy, BlockId, TokenId};
use sampler::SamplingParams;

use crate::runner::SeqParams;

/// A step for ranks that do not sample: the plan, less sampling parameters, and what only rank 0
/// knows.
#[derive(Clone, Debug)]
pub(crate) struct StepMessage {
    /// Tokens that earlier steps sampled since the last message.
    pub(crate) sampled: Vec<(SlotId, TokenId)>,
    /// Admitted sequences whose parameters rank 0 refused.
    pub(crate) refused: Vec<SlotId>,
    /// The plan. Of a sequence's parameters only `prompt_logprobs` means anything, and of that
    /// only whether it is set.
    pub(crate) plan: StepPlan<Arc<SeqParams>>,
}

impl StepMessage {
    /// As little-endian 32-bit words; lists after their length.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let plan = &self.plan;
        let mut words = Writer(Vec::new());
        words.put(plan.step as u32);
        words.put((plan.step >> 32) as u32);
        words.list(&self.sampled, |w, (slot, token)| w.all([slot.0, *token]));
        words.list(&self.refused, |w, slot| w.put(slot.0));
        words.list(&plan.released, |w, slot| w.put(slot.0));
        words.list(&plan.admitted, |w, seq| {
            let prompt_logprobs = seq.params.sampling.prompt_logprobs.is_some();
            let (prompt, computed) = (seq.num_prompt, seq.num_computed);
            w.all([
                seq.slot.0,
                prompt,
                computed,
                seq.index,
                prompt_logprobs.into(),
            ]);
            w.list(&seq.tokens, |w, token| w.put(*token));
            w.list(&seq.blocks, |w, block| w.put(block.get()));
        });
        words.list(&plan.copies, |w, c| w.all([c.src.get(), c.dst.get()]));
        words.list(&plan.new_blocks, |w, block| w.put(block.get()));
        words.list(&plan.drafts, |w, token| w.put(*token));
        words.list(&plan.rows, |w, row| {
            let (new, drafts) = (&row.new_blocks, &row.drafts);
            w.all([row.slot.0, row.start, row.len, row.table_at]);
            w.all([new.start, new.end, drafts.start, drafts.end]);
        });
        words.list(&plan.samples, |w, sample| {
            w.all([sample.slot.0, sample.row])
        });
        words.0
    }

    /// What [`StepMessage::encode`] wrote.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let mut words = Reader(bytes);
        let message = words.message();
        match (message, words.0) {
            (Some(message), []) => Ok(message),
            _ => Err(format!(
                "a step of {} bytes that cannot be read: rank 0 runs another version",
                bytes.len()
            )),
        }
    }
}

struct Writer(Vec<u8>);

impl Writer {
    fn put(&mut self, word: u32) {
        self.0.extend_from_slice(&word.to_le_bytes());
    }

    fn all<const N: usize>(&mut self, words: [u32; N]) {
        words.into_iter().for_each(|word| self.put(word));
    }

    fn list<T>(&mut self, items: &[T], mut put: impl FnMut(&mut Self, &T)) {
        // A step has fewer of anything than there are 32-bit numbers.
        self.put(items.len() as u32);
        items.iter().for_each(|item| put(self, item));
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn get(&mut self) -> Option<u32> {
        let (word, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_le_bytes(*word))
    }

    fn all<const N: usize>(&mut self) -> Option<[u32; N]> {
        let mut words = [0; N];
        for word in &mut words {
            *word = self.get()?;
        }
        Some(words)
    }

    fn list<T>(&mut self, mut get: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let len = self.get()? as usize;
        // Every item is at least a word: a length that lies allocates nothing.
        if len > self.0.len() / 4 {
            return None;
        }
        (0..len).map(|_| get(self)).collect()
    }

    fn message(&mut self) -> Option<StepMessage> {
        let [low, high] = self.all()?;
        let slot = |w: &mut Self| w.get().map(SlotId);
        let block = |w: &mut Self| w.get().map(BlockId::new);
        let sampled = self.list(|w| w.all().map(|[slot, token]| (SlotId(slot), token)))?;
        let refused = self.list(slot)?;
        let plan = StepPlan {
            step: u64::from(low) | u64::from(high) << 32,
            released: self.list(slot)?,
            admitted: self.list(|w| {
                let [slot, num_prompt, num_computed, index, prompt_logprobs] = w.all()?;
                Some(AdmittedSeq {
                    slot: SlotId(slot),
                    tokens: w.list(Self::get)?,
                    num_prompt,
                    num_computed,
                    blocks: w.list(block)?,
                    index,
                    params: unsampled(prompt_logprobs != 0),
                })
            })?,
            // Every rank's runner refuses a plan that swaps before it gets here.
            swap_outs: Vec::new(),
            swap_ins: Vec::new(),
            copies: self.list(|w| {
                let [src, dst] = w.all()?;
                Some(BlockCopy {
                    src: BlockId::new(src),
                    dst: BlockId::new(dst),
                })
            })?,
            new_blocks: self.list(block)?,
            drafts: self.list(Self::get)?,
            rows: self.list(|w| {
                let [slot, start, len, table_at] = w.all()?;
                let [new, new_end, drafts, drafts_end] = w.all()?;
                Some(Row {
                    slot: SlotId(slot),
                    start,
                    len,
                    table_at,
                    new_blocks: new..new_end,
                    drafts: drafts..drafts_end,
                })
            })?,
            samples: self.list(|w| {
                let [slot, row] = w.all()?;
                Some(SampleRow {
                    slot: SlotId(slot),
                    row,
                })
            })?,
        };
        Some(StepMessage {
            sampled,
            refused,
            plan,
        })
    }
}

/// Parameters of a sequence on a rank that does not sample.
fn unsampled(prompt_logprobs: bool) -> Arc<SeqParams> {
    Arc::new(SeqParams {
        sampling: Arc::new(SamplingParams {
            prompt_logprobs: prompt_logprobs.then_some(0),
            ..SamplingParams::default()
        }),
        seed: 0,
        eos_token_ids: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn random(rng: &mut StdRng) -> StepMessage {
        let list = |rng: &mut StdRng| -> Vec<u32> {
            let len = rng.random_range(0..20);
            (0..len).map(|_| rng.random()).collect()
        };
        let blocks = |list: Vec<u32>| -> Vec<BlockId> {
            list.into_iter().map(|b| BlockId::new(b | 1)).collect()
        };
        let admitted = (0..rng.random_range(0..4))
            .map(|_| AdmittedSeq {
                slot: SlotId(rng.random()),
                tokens: list(rng),
                num_prompt: rng.random(),
                num_computed: rng.random(),
                blocks: blocks(list(rng)),
                index: rng.random(),
                params: unsampled(rng.random()),
            })
            .collect();
        let rows = list(rng).into_iter().map(|slot| Row {
            slot: SlotId(slot),
            start: slot ^ 1,
            len: slot ^ 2,
            table_at: slot ^ 3,
            new_blocks: slot / 2..slot,
            drafts: slot / 3..slot / 2,
        });
        StepMessage {
            sampled: list(rng).into_iter().map(|t| (SlotId(t), t ^ 5)).collect(),
            refused: list(rng).into_iter().map(SlotId).collect(),
            plan: StepPlan {
                step: 0,
                released: list(rng).into_iter().map(SlotId).collect(),
                admitted,
                swap_outs: Vec::new(),
                copies: Vec::new(),
                swap_ins: Vec::new(),
                new_blocks: blocks(list(rng)),
                drafts: list(rng),
                rows: rows.collect(),
                samples: Vec::new(),
            },
        }
    }

    #[test]
    fn what_is_read_is_what_was_written() {
        let mut rng = StdRng::seed_from_u64(5);
        for _ in 0..500 {
            let mut message = random(&mut rng);
            message.plan.step = rng.random();
            let count = rng.random_range(0..9);
            message.plan.copies = (0..count)
                .map(|_| BlockCopy {
                    src: BlockId::new(rng.random::<u32>() | 1),
                    dst: BlockId::new(rng.random::<u32>() | 1),
                })
                .collect();
            message.plan.samples = (0..count)
                .map(|row| SampleRow {
                    slot: SlotId(rng.random()),
                    row,
                })
                .collect();
            let bytes = message.encode();
            let read = StepMessage::decode(&bytes).unwrap();
            assert_eq!(format!("{read:?}"), format!("{message:?}"));
            // No part of it and nothing longer is a message, whatever its lengths say.
            let cut = rng.random_range(0..bytes.len());
            assert!(StepMessage::decode(&bytes[..cut]).is_err());
            assert!(StepMessage::decode(&[&bytes[..], &[0; 4]].concat()).is_err());
            let mut broken = bytes;
            let at = rng.random_range(0..broken.len());
            broken[at] ^= rng.random_range(1..=255u8);
            let _ = StepMessage::decode(&broken);
        }
    }
}
