//! Log-probabilities of prompts, and sequences that share a row.

use std::sync::Arc;

use batch_scheduler::{AdmittedSeq, ModelRunner, SampleRow, SlotId};
use paged_kv::{BlockCopy, BlockId};
use sampler::SamplingParams;
use tch::Kind;
use tp_model::{DtypeChoice, SeqParams};

use super::plans::{admit, blocks, empty, load, params, row, run, runner};

#[test]
fn prompt_logprobs_are_the_log_softmax_of_each_position() {
    let model = load("qwen2-tied", DtypeChoice::Float32);
    let vocab = model.config().vocab_size as u32;
    let prompt: Vec<u32> = (0..150).map(|i| i * 37 % vocab).collect();
    let want = model
        .forward_logits(&prompt, usize::MAX)
        .unwrap()
        .log_softmax(-1, Kind::Double);
    for chunk in [1, 13, 149, 150] {
        let mut runner = runner(load("qwen2-tied", DtypeChoice::Float32), 2, 16);
        let asks = params(SamplingParams {
            prompt_logprobs: Some(3),
            ..SamplingParams::greedy()
        });
        let quiet = params(SamplingParams::greedy());
        let mut next = 1;
        for (step, start) in (0..prompt.len()).step_by(chunk).enumerate() {
            let mut plan = empty(step as u64);
            let len = chunk.min(prompt.len() - start);
            if start == 0 {
                admit(&mut plan, &runner, 0, &prompt, &quiet);
                admit(&mut plan, &runner, 1, &prompt, &asks);
            }
            row(&mut plan, 0, start, len, false);
            row(&mut plan, 1, start, len, start + len == prompt.len());
            let ticket = runner.launch(plan).unwrap();
            let output = runner.collect(ticket).unwrap();
            for (slot, position, entries) in output.prompt_extras {
                assert_eq!((slot, position as usize), (SlotId(1), next));
                for entry in entries {
                    assert_eq!(entry.token, prompt[next]);
                    assert_eq!(entry.top.len(), 3);
                    let at = [next as i64 - 1, i64::from(entry.token)];
                    let exact = want.double_value(&at);
                    assert!((f64::from(entry.logprob) - exact).abs() < 1e-5);
                    next += 1;
                }
            }
        }
        assert_eq!(next, prompt.len(), "chunks of {chunk}");
    }
}

#[test]
fn forks_sample_from_one_row_and_go_on_in_copied_blocks() {
    const BLOCK: usize = 16;
    let sampling = Arc::new(SamplingParams {
        n: 3,
        seed: Some(4),
        logprobs: Some(0),
        ..SamplingParams::default()
    });
    let request = Arc::new(SeqParams {
        sampling,
        seed: 4,
        eos_token_ids: Vec::new(),
    });
    let mut runner = runner(load("llama3-gqa4", DtypeChoice::Float32), 3, BLOCK);
    let prompt: Vec<u32> = (0..21).map(|i| i * 11 % 100).collect();
    // Each fork has the first sequence's first block and a copy of its second.
    let first = blocks(&runner, 0);
    let fork = |slot: u32, own: BlockId| AdmittedSeq {
        slot: SlotId(slot),
        tokens: prompt.clone(),
        num_prompt: 21,
        num_computed: 21,
        blocks: vec![first[0], own],
        index: slot,
        params: request.clone(),
    };
    let own: Vec<BlockId> = (1..3).map(|slot| blocks(&runner, slot)[1]).collect();

    let mut plan = empty(0);
    admit(&mut plan, &runner, 0, &prompt, &request);
    plan.admitted.push(fork(1, own[0]));
    plan.admitted.push(fork(2, own[1]));
    row(&mut plan, 0, 0, prompt.len(), true);
    plan.samples.extend([1, 2].map(|slot| SampleRow {
        slot: SlotId(slot),
        row: 0,
    }));
    let mut tokens = vec![Vec::new(); 3];
    let mut keep = |samples: Vec<batch_scheduler::Sampled<sampler::TokenLogprobs>>| {
        for (slot, sample) in samples.iter().enumerate() {
            assert_eq!(sample.error, None);
            tokens[slot].push(sample.tokens[0]);
        }
    };
    keep(run(&mut runner, plan));
    for step in 1..6 {
        let mut plan = empty(step);
        if step == 1 {
            let copies = own.iter().map(|&dst| BlockCopy { src: first[1], dst });
            plan.copies.extend(copies);
        }
        for slot in 0..3 {
            row(&mut plan, slot, 20 + step as usize, 1, true);
        }
        keep(run(&mut runner, plan));
    }
    assert!(
        tokens[0] != tokens[1] && tokens[1] != tokens[2],
        "{tokens:?}"
    );

    // Each as if it had been alone.
    for (index, want) in tokens.iter().enumerate() {
        let mut plan = empty(6);
        plan.released = if index == 0 {
            (0..3).map(SlotId).collect()
        } else {
            vec![SlotId(0)]
        };
        admit(&mut plan, &runner, 0, &prompt, &request);
        plan.admitted[0].index = index as u32;
        row(&mut plan, 0, 0, prompt.len(), true);
        let mut got = vec![run(&mut runner, plan)[0].tokens[0]];
        for step in 1..6 {
            let mut plan = empty(6 + step);
            row(&mut plan, 0, 20 + step as usize, 1, true);
            got.push(run(&mut runner, plan)[0].tokens[0]);
        }
        assert_eq!(&got, want, "index {index}");
    }
}
