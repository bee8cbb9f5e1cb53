//! Plans for sequences that each have blocks of their own.

use std::path::PathBuf;
use std::sync::Arc;

use batch_scheduler::{AdmittedSeq, ModelRunner, Row, SampleRow, Sampled, SlotId, StepPlan};
use paged_kv::BlockId;
use sampler::{SamplingParams, TokenLogprobs};
use tp_model::{Backend, DtypeChoice, LoadOptions, Model, Runner, RunnerConfig, SeqParams};

pub type Plan = StepPlan<Arc<SeqParams>>;

pub const MAX_LEN: usize = 256;

pub fn fixture(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures", name]
        .iter()
        .collect()
}

pub fn load(name: &str, dtype: DtypeChoice) -> Model {
    // Tests run side by side, and the tensors are tiny.
    tch::set_num_threads(1);
    let options = LoadOptions {
        dtype,
        backend: Backend::Cpu,
        ..LoadOptions::default()
    };
    Model::load(&fixture(name), &options).unwrap_or_else(|e| panic!("{e}"))
}

/// A runner with `slots` slots, each with blocks for [`MAX_LEN`] tokens.
pub fn runner(model: Model, slots: usize, block_size: usize) -> Runner {
    let config = RunnerConfig {
        max_num_seqs: slots,
        max_num_batched_tokens: slots * MAX_LEN,
        max_model_len: MAX_LEN,
        block_size,
        num_blocks: 1 + slots * MAX_LEN.div_ceil(block_size),
    };
    Runner::new(model, &config).unwrap_or_else(|e| panic!("{e}"))
}

/// The blocks of a slot, far apart in the pool.
pub fn blocks(runner: &Runner, slot: u32) -> Vec<BlockId> {
    let slots = runner.config().max_num_seqs as u32;
    let count = MAX_LEN.div_ceil(runner.config().block_size) as u32;
    (0..count)
        .map(|at| BlockId::new(1 + at * slots + slot))
        .collect()
}

pub fn params(sampling: SamplingParams) -> Arc<SeqParams> {
    Arc::new(SeqParams {
        seed: sampling.seed.unwrap_or(0),
        sampling: Arc::new(sampling),
        eos_token_ids: Vec::new(),
    })
}

pub fn empty(step: u64) -> Plan {
    StepPlan {
        step,
        ..StepPlan::default()
    }
}

pub fn admit(plan: &mut Plan, runner: &Runner, slot: u32, tokens: &[u32], params: &Arc<SeqParams>) {
    plan.admitted.push(AdmittedSeq {
        slot: SlotId(slot),
        tokens: tokens.to_vec(),
        num_prompt: tokens.len() as u32,
        num_computed: 0,
        blocks: blocks(runner, slot),
        index: 0,
        params: params.clone(),
    });
}

pub fn row(plan: &mut Plan, slot: u32, start: usize, len: usize, sample: bool) {
    if sample {
        plan.samples.push(SampleRow {
            slot: SlotId(slot),
            row: plan.rows.len() as u32,
        });
    }
    plan.rows.push(Row {
        slot: SlotId(slot),
        start: start as u32,
        len: len as u32,
        table_at: 0,
        new_blocks: 0..0,
        drafts: 0..0,
    });
}

pub fn run(runner: &mut Runner, plan: Plan) -> Vec<Sampled<TokenLogprobs>> {
    let ticket = runner.launch(plan).unwrap_or_else(|e| panic!("{e}"));
    runner.collect(ticket).unwrap().samples
}

/// Tokens and the bits of their log-probabilities, of `steps` steps of one prompt alone.
pub fn alone(
    runner: &mut Runner,
    tokens: &[u32],
    params: &Arc<SeqParams>,
    steps: usize,
) -> Vec<(u32, u32)> {
    let mut results = Vec::new();
    for step in 0..steps {
        let mut plan = empty(step as u64);
        match step {
            0 => {
                admit(&mut plan, runner, 0, tokens, params);
                row(&mut plan, 0, 0, tokens.len(), true);
            }
            _ => row(&mut plan, 0, tokens.len() + step - 1, 1, true),
        }
        results.push(bits(&run(runner, plan)[0]));
    }
    let mut plan = empty(steps as u64);
    plan.released.push(SlotId(0));
    run(runner, plan);
    results
}

pub fn bits(sample: &Sampled<TokenLogprobs>) -> (u32, u32) {
    assert_eq!(
        (&sample.error, sample.tokens.len(), sample.extras.len()),
        (&None, 1, 1)
    );
    (sample.tokens[0], sample.extras[0].logprob.to_bits())
}
