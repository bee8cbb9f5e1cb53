//! The same tokens however many ranks share the model: through the whole engine, with chunked
//! prefill, shared prefixes, preemption and several answers to a prompt.

use std::path::PathBuf;
use std::time::Duration;

use engine::{
    Backend, DeviceChoice, DtypeChoice, Engine, EngineConfig, GenerateRequest, Health, MaxModelLen,
    RequestOutput, SamplingParams,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tp_model::comm::CommError;

fn checkpoint(name: &str) -> PathBuf {
    let fixtures = "../tp-model/tests/fixtures";
    [env!("CARGO_MANIFEST_DIR"), fixtures, name]
        .iter()
        .collect()
}

fn config(tp: usize, pp: usize) -> EngineConfig {
    tch::set_num_threads(1);
    EngineConfig {
        device: DeviceChoice::Cpu,
        dtype: DtypeChoice::Float32,
        attention_backend: Backend::Cpu,
        tensor_parallel_size: tp,
        pipeline_parallel_size: pp,
        distributed_timeout: Duration::from_secs(20),
        max_model_len: MaxModelLen::Tokens(160),
        max_num_seqs: 6,
        // Prompts take several steps, and not all sequences fit at once.
        max_num_batched_tokens: Some(32),
        block_size: 4,
        num_gpu_blocks_override: Some(44),
        skip_tokenizer_init: true,
        ..EngineConfig::new("fixture")
    }
}

/// Prompts with common beginnings, greedy and seeded, some with several answers, all with
/// log-probabilities of something.
fn requests(vocab: u32) -> Vec<GenerateRequest> {
    let mut rng = StdRng::seed_from_u64(8);
    let mut ids =
        |len: usize| -> Vec<u32> { (0..len).map(|_| rng.random_range(0..vocab)).collect() };
    let beginnings = [ids(40), ids(23)];
    (0..14)
        .map(|at| {
            let mut prompt = beginnings[at % 2].clone();
            prompt.extend(ids(1 + at * 3));
            let several = at % 5 == 3;
            let params = SamplingParams {
                temperature: if at % 3 == 0 { 0.0 } else { 0.8 },
                n: if several && at % 3 != 0 { 3 } else { 1 },
                top_k: if at % 4 == 1 { 20 } else { 0 },
                seed: Some(at as u64),
                max_tokens: Some(30),
                ignore_eos: true,
                logprobs: (at % 4 == 0).then_some(2),
                prompt_logprobs: (at % 7 == 6).then_some(1),
                ..SamplingParams::default()
            };
            GenerateRequest::new(at.to_string(), prompt, params)
        })
        .collect()
}

fn tokens(output: &RequestOutput) -> Vec<Vec<u32>> {
    let outputs = output.outputs.iter();
    outputs.map(|sequence| sequence.token_ids.clone()).collect()
}

/// The log-probability of every sampled token and of every token of the prompt that has one.
fn logprobs(output: &RequestOutput) -> Vec<f32> {
    let sampled = output.outputs.iter().filter_map(|s| s.logprobs.as_ref());
    let prompt = output.prompt_logprobs.iter().flatten().flatten();
    sampled
        .flatten()
        .chain(prompt)
        .map(|entry| entry.logprob)
        .collect()
}

#[test]
fn tokens_do_not_depend_on_the_number_of_ranks() {
    for name in [
        "llama3-gqa4",
        "qwen3-headdim",
        "mistral-window",
        "qwen2-tied",
        "llama-bias",
    ] {
        let run = |tp: usize, pp: usize| {
            let mut engine =
                Engine::from_directory(&config(tp, pp), &checkpoint(name), None).unwrap();
            let requests = requests(engine.frontend().limits().vocab_size as u32);
            let outputs = engine.generate(requests);
            let stats = engine.stats();
            assert_eq!(stats.kv_used_blocks, 0);
            // Otherwise this would test less than it says.
            assert!(
                stats.totals.preemptions > 0 && stats.totals.prefix_hits > 0,
                "{stats:?}"
            );
            let outputs: Result<Vec<RequestOutput>, _> = outputs.into_iter().collect();
            outputs.unwrap()
        };
        let alone = run(1, 1);
        for (tp, pp) in [(2, 1), (4, 1), (1, 2), (1, 3), (2, 2)] {
            let together = run(tp, pp);
            for (one, other) in alone.iter().zip(&together) {
                assert_eq!(tokens(one), tokens(other), "{name}, TP {tp}, PP {pp}");
                let (a, b) = (logprobs(one), logprobs(other));
                assert_eq!(a.len(), b.len());
                // Stages change no bit; sums over ranks round differently.
                let most = if tp == 1 { 0.0 } else { 1e-4 };
                let far = a.iter().zip(&b).any(|(a, b)| (a - b).abs() > most);
                assert!(!far, "{name}, TP {tp}, PP {pp}: {a:?} {b:?}");
            }
        }
    }
}

#[test]
fn aborted_requests_leave_nothing_on_any_stage() {
    let mut engine =
        Engine::from_directory(&config(1, 2), &checkpoint("llama3-gqa4"), None).unwrap();
    let vocab = engine.frontend().limits().vocab_size as u32;
    let expected: Vec<_> = engine.generate(requests(vocab));
    for turn in 0..6 {
        let requests = requests(vocab).into_iter();
        let open: Vec<_> = requests
            .map(|request| engine.add_request(request).unwrap())
            .collect();
        // With steps under way on both stages.
        for _ in 0..3 + 2 * turn {
            let _ = engine.step();
        }
        for id in open {
            engine.abort(id);
        }
        while engine.has_work() {
            let _ = engine.step();
        }
        assert_eq!(engine.stats().kv_used_blocks, 0);
    }
    let again = engine.generate(requests(vocab));
    for (one, other) in expected.iter().zip(&again) {
        let (one, other) = (one.as_ref().unwrap(), other.as_ref().unwrap());
        assert_eq!(tokens(one), tokens(other));
    }
}

#[test]
fn ranks_tell_who_asked_until_their_engine_ends() {
    for (tp, pp) in [(2, 1), (1, 2)] {
        let health = Health::default();
        let config = EngineConfig {
            health: Some(health.clone()),
            ..config(tp, pp)
        };
        let engine = Engine::from_directory(&config, &checkpoint("llama3-gqa4"), None);
        let engine = engine.unwrap();
        assert_eq!(health.failure(), None);
        drop(engine);
        // The end of the work has closed it: connections may end.
        let failure = CommError {
            rank: 1,
            world_size: 2,
            what: "is gone".to_owned(),
        };
        health.fail(failure.clone());
        assert_eq!(health.failure(), None);
        // One that no engine had does hear.
        let other = Health::default();
        other.fail(failure.clone());
        assert_eq!(other.failure(), Some(failure));
    }
}

#[test]
fn what_cannot_be_divided_is_refused_with_what_can() {
    let refused = |config: EngineConfig| {
        let Err(error) = Engine::from_directory(&config, &checkpoint("llama3-gqa4"), None) else {
            panic!("it works");
        };
        error.to_string()
    };
    let error = |ranks| refused(config(ranks, 1));
    assert!(
        error(3).contains("sizes that do: 1, 2, 4, 8"),
        "{}",
        error(3)
    );
    assert!(error(0).contains("tensor_parallel_size: must be at least 1"));
    let stages = |pp, partition: Option<&[usize]>| {
        refused(EngineConfig {
            pp_layer_partition: partition.map(<[usize]>::to_vec),
            ..config(1, pp)
        })
    };
    let layers = stages(99, None);
    assert!(layers.contains("pipeline_parallel_size 99"), "{layers}");
    assert!(layers.contains("sizes that do: 1 to "), "{layers}");
    assert!(stages(0, None).contains("pipeline_parallel_size: must be at least 1"));
    for (pp, wrong) in [(1, &[1, 1][..]), (2, &[1]), (2, &[1, 77]), (2, &[0, 2])] {
        let error = stages(pp, Some(wrong));
        assert!(error.contains("one that does: "), "{error}");
    }
}
