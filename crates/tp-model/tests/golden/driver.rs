//! Runs several prompts at once through [`Runner`] with plans made by hand: chunked prefill mixed
//! with decoding, every sequence on blocks scattered over the pool.

use std::sync::Arc;

use batch_scheduler::{AdmittedSeq, ModelRunner, Row, SampleRow, SlotId, StepPlan};
use paged_kv::{BlockId, TokenId};
use rand::seq::SliceRandom;
use rand::{SeedableRng, rngs::StdRng};
use sampler::SamplingParams;
use tp_model::{Model, Runner, RunnerConfig, SeqParams};

struct Sequence {
    tokens: Vec<TokenId>,
    num_prompt: usize,
    /// Tokens to generate.
    count: usize,
    num_computed: usize,
    /// The blocks it will need, in order, and how many of them the runner has been told.
    blocks: Vec<BlockId>,
    told: usize,
}

/// Greedy continuations of `prompts`, of as many tokens as stand beside each. `budget` is the most tokens that a
/// step computes; decoding sequences take theirs first.
pub fn greedy(
    model: Model,
    prompts: &[(&[u32], usize)],
    block_size: usize,
    budget: usize,
) -> Vec<Vec<u32>> {
    let lengths = prompts.iter().map(|(prompt, count)| prompt.len() + count);
    let max_model_len = lengths.clone().max().expect("a prompt");
    let needed: usize = lengths.map(|n| n.div_ceil(block_size)).sum();
    // One more, for the null block.
    let num_blocks = needed + 1;
    let mut runner = Runner::new(
        model,
        &RunnerConfig {
            max_num_seqs: prompts.len(),
            max_num_batched_tokens: budget,
            max_model_len,
            block_size,
            num_blocks,
        },
    )
    .expect("runner");
    let mut sequences = scatter(prompts, block_size, num_blocks);

    let mut step = 0;
    loop {
        let plan = plan(step, &mut sequences, block_size, budget);
        if plan.rows.is_empty() {
            break;
        }
        let sampled: Vec<SlotId> = plan.samples.iter().map(|s| s.slot).collect();
        let ticket = runner.launch(plan).expect("launch");
        let output = runner.collect(ticket).expect("collect");
        assert_eq!((output.step, output.samples.len()), (step, sampled.len()));
        for (slot, sample) in sampled.into_iter().zip(output.samples) {
            assert_eq!((sample.error, sample.tokens.len()), (None, 1));
            sequences[slot.0 as usize].tokens.push(sample.tokens[0]);
        }
        step += 1;
    }
    sequences
        .into_iter()
        .map(|s| s.tokens[s.num_prompt..].to_vec())
        .collect()
}

/// Deals the pool's blocks out at random, so that no table is contiguous or rising.
fn scatter(prompts: &[(&[u32], usize)], block_size: usize, num_blocks: usize) -> Vec<Sequence> {
    // Block 0 is the null block: nobody's.
    let mut free: Vec<BlockId> = (1..num_blocks as u32).map(BlockId::new).collect();
    free.shuffle(&mut StdRng::seed_from_u64(7));
    prompts
        .iter()
        .map(|&(prompt, count)| {
            let blocks = (prompt.len() + count).div_ceil(block_size);
            Sequence {
                tokens: prompt.to_vec(),
                num_prompt: prompt.len(),
                count,
                num_computed: 0,
                blocks: free.split_off(free.len() - blocks),
                told: 0,
            }
        })
        .collect()
}

fn plan(
    step: u64,
    sequences: &mut [Sequence],
    block_size: usize,
    budget: usize,
) -> StepPlan<Arc<SeqParams>> {
    let mut plan = StepPlan {
        step,
        ..StepPlan::default()
    };
    let mut left = budget;
    let decoding = |s: &Sequence| s.num_computed >= s.num_prompt;
    let mut order: Vec<usize> = (0..sequences.len()).collect();
    order.sort_by_key(|&i| !decoding(&sequences[i]));
    for i in order {
        let sequence = &mut sequences[i];
        let slot = SlotId(i as u32);
        let done = sequence.tokens.len() == sequence.num_prompt + sequence.count;
        let len = (sequence.tokens.len() - sequence.num_computed).min(left);
        if done || len == 0 {
            continue;
        }
        if sequence.num_computed == 0 {
            plan.admitted.push(AdmittedSeq {
                slot,
                tokens: sequence.tokens.clone(),
                num_prompt: sequence.num_prompt as u32,
                num_computed: 0,
                blocks: Vec::new(),
                index: 0,
                params: Arc::new(SeqParams {
                    sampling: Arc::new(SamplingParams::greedy()),
                    seed: 0,
                    eos_token_ids: Vec::new(),
                }),
            });
        }
        let start = sequence.num_computed;
        let blocks = (start + len).div_ceil(block_size);
        let first = plan.new_blocks.len() as u32;
        plan.new_blocks
            .extend(&sequence.blocks[sequence.told..blocks]);
        if start + len == sequence.tokens.len() {
            plan.samples.push(SampleRow {
                slot,
                row: plan.rows.len() as u32,
            });
        }
        plan.rows.push(Row {
            slot,
            start: start as u32,
            len: len as u32,
            table_at: sequence.told as u32,
            new_blocks: first..plan.new_blocks.len() as u32,
            drafts: 0..0,
        });
        sequence.told = blocks;
        sequence.num_computed += len;
        left -= len;
    }
    plan
}
