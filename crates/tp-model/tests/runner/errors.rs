//! One bad sequence fails alone; a plan that contradicts itself ends the run with a reason.

use std::path::{Path, PathBuf};

use batch_scheduler::{ModelRunner, SampleRow, SlotId};
use paged_kv::{BlockCopy, BlockId};
use sampler::SamplingParams;
use tp_model::{Backend, DtypeChoice, LoadOptions, Model, RunnerConfig, RunnerError};

use super::plans::{
    Plan, admit, alone, bits, blocks, empty, fixture, load, params, row, run, runner,
};

const NAME: &str = "llama-linear";
const BAD_TOKEN: u32 = 17;

fn greedy() -> SamplingParams {
    SamplingParams {
        logprobs: Some(0),
        ..SamplingParams::greedy()
    }
}

/// A copy of a checkpoint in which the embedding of one token is not a number.
struct Poisoned(PathBuf);

impl Poisoned {
    fn new() -> Self {
        let name = format!("tp-model-poisoned-{}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::copy(fixture(NAME).join("config.json"), dir.join("config.json")).unwrap();
        let mut bytes = std::fs::read(fixture(NAME).join("model.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let view = tensors.tensor("model.embed_tokens.weight").unwrap();
        let row_bytes = view.data().len() / view.shape()[0];
        let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        let at = start + BAD_TOKEN as usize * row_bytes;
        // All ones is a NaN in every float type.
        bytes[at..at + row_bytes].fill(0xff);
        std::fs::write(dir.join("model.safetensors"), bytes).unwrap();
        Self(dir)
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Poisoned {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn logits_that_are_not_finite_fail_their_sequence_alone() {
    let dir = Poisoned::new();
    let options = LoadOptions {
        backend: Backend::Cpu,
        ..LoadOptions::default()
    };
    let mut poisoned = runner(Model::load(dir.path(), &options).unwrap(), 3, 16);
    let good = [3, 5, 8, 13];
    let bad = [3, BAD_TOKEN, 8, 13];
    let want = alone(&mut poisoned, &good, &params(greedy()), 1);

    let mut plan = empty(0);
    for (slot, prompt) in [&good, &bad, &good].into_iter().enumerate() {
        admit(&mut plan, &poisoned, slot as u32, prompt, &params(greedy()));
        row(&mut plan, slot as u32, 0, 4, true);
    }
    let samples = run(&mut poisoned, plan);
    assert_eq!([bits(&samples[0]), bits(&samples[2])], [want[0], want[0]]);
    assert!(samples[1].tokens.is_empty());
    let error = samples[1].error.as_ref().unwrap();
    assert!(error.contains("NaN"), "{error}");
}

#[test]
fn parameters_and_tokens_that_do_not_fit_fail_their_sequence_alone() {
    let mut runner = runner(load(NAME, DtypeChoice::Float32), 4, 16);
    let vocab = runner.model().config().vocab_size as u32;
    let good = [3, 5, 8, 13];
    let want = alone(&mut runner, &good, &params(greedy()), 2);
    let foreign = SamplingParams {
        allowed_token_ids: Some(vec![vocab]),
        ..greedy()
    };
    let cases = [
        (good, params(greedy())),
        ([3, vocab, 8, 13], params(greedy())),
        (good, params(foreign)),
        ([3, u32::MAX, 8, 13], params(greedy())),
    ];
    for step in 0..2 {
        let mut plan = empty(step);
        for (slot, (prompt, params)) in cases.iter().enumerate() {
            let slot = slot as u32;
            if step == 0 {
                admit(&mut plan, &runner, slot, prompt, params);
                row(&mut plan, slot, 0, 4, true);
            } else if slot == 0 {
                row(&mut plan, slot, 4, 1, true);
            }
        }
        let samples = run(&mut runner, plan);
        assert_eq!(bits(&samples[0]), want[step as usize]);
        for sample in &samples[1..] {
            let error = sample.error.as_ref().expect("refused");
            assert!(error.contains(&vocab.to_string()), "{error}");
        }
    }
}

#[test]
fn contradictions_are_errors_that_say_which() {
    type Spoil = fn(&mut Plan);
    let cases: [(&str, Spoil); 12] = [
        ("slot 3 is released but holds no", |plan| {
            plan.released.push(SlotId(3))
        }),
        ("slot 9 is released", |plan| plan.released.push(SlotId(9))),
        ("slot 9 is admitted", |plan| {
            let mut seq = plan.admitted[0].clone();
            seq.slot = SlotId(9);
            plan.admitted.push(seq);
        }),
        ("slot 0 is admitted but holds", |plan| {
            plan.admitted.push(plan.admitted[0].clone())
        }),
        ("block 999 is not among", |plan| {
            plan.admitted[0].blocks[0] = BlockId::new(999)
        }),
        ("copy of block 1 to 999", |plan| {
            let (src, dst) = (BlockId::new(1), BlockId::new(999));
            plan.copies.push(BlockCopy { src, dst });
        }),
        ("points at new blocks 0..1", |plan| {
            plan.rows[0].new_blocks = 0..1
        }),
        ("computes tokens 0..5", |plan| plan.rows[0].len = 5),
        ("a sample of row 1 of 1", |plan| {
            plan.samples.push(SampleRow {
                slot: SlotId(0),
                row: 1,
            })
        }),
        ("draft tokens are not supported", |plan| plan.drafts.push(1)),
        (
            "swapping KV blocks to host memory is not supported",
            |plan| {
                plan.swap_outs.push(paged_kv::SwapOut {
                    src: paged_kv::BlockId::new(1),
                    dst: paged_kv::HostBlockId::new(0),
                });
            },
        ),
        ("slot 1 holds no sequence", |plan| {
            plan.rows[0].slot = SlotId(1)
        }),
    ];
    for (want, spoil) in cases {
        let mut runner = runner(load(NAME, DtypeChoice::Float32), 4, 16);
        let mut plan = empty(7);
        admit(&mut plan, &runner, 0, &[1, 2, 3, 4], &params(greedy()));
        row(&mut plan, 0, 0, 4, true);
        spoil(&mut plan);
        match runner.launch(plan) {
            Err(RunnerError::Plan { step: 7, what }) => assert!(what.contains(want), "{what}"),
            other => panic!("{want}: {other:?}"),
        }
    }
}

#[test]
fn new_blocks_replace_the_table_from_where_they_stand() {
    let mut runner = runner(load(NAME, DtypeChoice::Float32), 2, 2);
    let prompt = [9, 8, 7, 6, 5];
    let want = alone(&mut runner, &prompt, &params(greedy()), 2);
    let spare = blocks(&runner, 1);
    let mut plan = empty(0);
    admit(&mut plan, &runner, 0, &prompt, &params(greedy()));
    plan.admitted[0].blocks.truncate(3);
    row(&mut plan, 0, 0, 5, true);
    assert_eq!(bits(&run(&mut runner, plan)[0]), want[0]);
    // The third block, half full, is copied on write, and no fourth is needed yet.
    let mut plan = empty(1);
    plan.copies.push(BlockCopy {
        src: blocks(&runner, 0)[2],
        dst: spare[0],
    });
    plan.new_blocks.push(spare[0]);
    row(&mut plan, 0, 5, 1, true);
    (plan.rows[0].table_at, plan.rows[0].new_blocks) = (2, 0..1);
    assert_eq!(bits(&run(&mut runner, plan)[0]), want[1]);
}

#[test]
fn sizes_of_zero_are_refused() {
    let good = RunnerConfig {
        max_num_seqs: 1,
        max_num_batched_tokens: 1,
        max_model_len: 1,
        block_size: 1,
        num_blocks: 1,
    };
    let zeros: [fn(&mut RunnerConfig); 5] = [
        |c| c.max_num_seqs = 0,
        |c| c.max_num_batched_tokens = 0,
        |c| c.max_model_len = 0,
        |c| c.block_size = 0,
        |c| c.num_blocks = 0,
    ];
    for zero in zeros {
        let mut config = good;
        zero(&mut config);
        let error = tp_model::Runner::new(load(NAME, DtypeChoice::Float32), &config).unwrap_err();
        assert!(error.to_string().contains("at least"), "{error}");
    }
}
