//! What rank 0 tells the others of a step: the plan as plain numbers.

use std::sync::Arc;

use batch_scheduler::{AdmittedSeq, Row, SampleMask, SampleRow, SlotId, StepPlan};
use paged_kv::{BlockCopy, BlockId, TokenId};
use sampler::SamplingParams;

use super::words::{Reader, Writer};
use crate::runner::SeqParams;

/// A step for the other ranks: the plan, and what only rank 0 knows. Sampling parameters travel
/// only if another rank samples.
#[derive(Clone, Debug)]
pub(crate) struct StepMessage {
    /// Tokens that earlier steps sampled since the last message.
    pub(crate) sampled: Vec<(SlotId, TokenId)>,
    /// Admitted sequences whose parameters rank 0 refused.
    pub(crate) refused: Vec<SlotId>,
    /// The plan. If rank 0 samples, of a sequence's parameters only `prompt_logprobs` means anything
    /// to the others, and of that only whether it is set.
    pub(crate) plan: StepPlan<Arc<SeqParams>>,
}

impl StepMessage {
    /// As little-endian 32-bit words; lists after their length. `sampled` says whether another rank
    /// samples.
    pub(crate) fn encode(&self, sampled: bool) -> Vec<u8> {
        let plan = &self.plan;
        let mut words = Writer::default();
        words.put_u64(plan.step);
        words.list(&self.sampled, |w, (slot, token)| w.all([slot.0, *token]));
        words.list(&self.refused, |w, slot| w.put(slot.0));
        words.list(&plan.released, |w, slot| w.put(slot.0));
        words.list(&plan.admitted, |w, seq| {
            w.all([seq.slot.0, seq.num_prompt, seq.num_computed, seq.index]);
            put_params(w, &seq.params, sampled);
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
        let masks = if sampled { &plan.masks[..] } else { &[] };
        words.list(masks, |w, mask| {
            w.put(mask.sample);
            w.list(&mask.allowed, |w, word| w.put(*word));
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

/// How much of a sequence's parameters travels.
const UNSAMPLED: u32 = 0;
const UNSAMPLED_WITH_PROMPT_LOGPROBS: u32 = 1;
const SAMPLED: u32 = 2;

fn put_params(words: &mut Writer, params: &SeqParams, sampled: bool) {
    if !sampled {
        let prompt_logprobs = params.sampling.prompt_logprobs.is_some();
        return words.put(match prompt_logprobs {
            true => UNSAMPLED_WITH_PROMPT_LOGPROBS,
            false => UNSAMPLED,
        });
    }
    words.put(SAMPLED);
    words.put_u64(params.seed);
    words.list(&params.eos_token_ids, |w, token| w.put(*token));
    // What JSON cannot say (NaN) is refused before it gets here.
    let sampling = serde_json::to_vec(&*params.sampling).unwrap_or_default();
    words.bytes(&sampling);
}

fn get_params(words: &mut Reader<'_>) -> Option<Arc<SeqParams>> {
    Some(match words.get()? {
        UNSAMPLED => unsampled(false),
        UNSAMPLED_WITH_PROMPT_LOGPROBS => unsampled(true),
        SAMPLED => {
            let seed = words.get_u64()?;
            let eos_token_ids = words.list(Reader::get)?;
            let sampling = words.bytes()?;
            Arc::new(SeqParams {
                sampling: Arc::new(serde_json::from_slice(sampling).ok()?),
                seed,
                eos_token_ids,
            })
        }
        _ => return None,
    })
}

impl Reader<'_> {
    fn message(&mut self) -> Option<StepMessage> {
        let step = self.get_u64()?;
        let slot = |w: &mut Self| w.get().map(SlotId);
        let block = |w: &mut Self| w.get().map(BlockId::new);
        let sampled = self.list(|w| w.all().map(|[slot, token]| (SlotId(slot), token)))?;
        let refused = self.list(slot)?;
        let plan = StepPlan {
            step,
            released: self.list(slot)?,
            admitted: self.list(|w| {
                let [slot, num_prompt, num_computed, index] = w.all()?;
                let params = get_params(w)?;
                Some(AdmittedSeq {
                    slot: SlotId(slot),
                    tokens: w.list(Self::get)?,
                    num_prompt,
                    num_computed,
                    blocks: w.list(block)?,
                    index,
                    params,
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
            masks: self.list(|w| {
                Some(SampleMask {
                    sample: w.get()?,
                    allowed: w.list(Self::get)?,
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

/// Parameters of a sequence on a rank that does not sample it.
pub(crate) fn unsampled(prompt_logprobs: bool) -> Arc<SeqParams> {
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
                masks: Vec::new(),
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
            let sampled = rng.random();
            // Masks travel only to a rank that samples.
            message.plan.masks = (0..if sampled { count } else { 0 })
                .map(|sample| SampleMask {
                    sample,
                    allowed: (0..sample).map(|_| rng.random()).collect(),
                })
                .collect();
            let bytes = message.encode(sampled);
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

    #[test]
    fn a_rank_that_samples_gets_all_parameters() {
        let params = SeqParams {
            sampling: Arc::new(SamplingParams {
                temperature: 0.1 + 0.2,
                top_p: f32::MIN_POSITIVE,
                logit_bias: [(7, -1.0e-30), (9, 3.3)].into(),
                bad_words_token_ids: vec![vec![1, 2], vec![3]],
                stop: vec!["é\n".to_owned()],
                seed: Some(u64::MAX),
                prompt_logprobs: Some(-1),
                ..SamplingParams::default()
            }),
            seed: u64::MAX - 1,
            eos_token_ids: vec![4, 5],
        };
        let mut rng = StdRng::seed_from_u64(7);
        let mut message = random(&mut rng);
        message.plan.admitted.push(AdmittedSeq {
            slot: SlotId(3),
            tokens: vec![1],
            num_prompt: 1,
            num_computed: 0,
            blocks: Vec::new(),
            index: 0,
            params: Arc::new(params),
        });
        let read = StepMessage::decode(&message.encode(true)).unwrap();
        assert_eq!(format!("{read:?}"), format!("{message:?}"));
    }
}
