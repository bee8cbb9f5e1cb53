//! The tokens of a request depend on its prompt, parameters and seed alone: not on block size,
//! chunk, batch mates, prefix cache, preemption or overlap. On real (small, random) models.

use std::path::{Path, PathBuf};

use engine::{
    DeviceChoice, DtypeChoice, Engine, EngineConfig, GenerateRequest, MaxModelLen, RequestOutput,
    SamplingParams,
};
use rand::{Rng, SeedableRng, rngs::StdRng};

const MAX_MODEL_LEN: usize = 160;
/// Enough for every request's `n`; "one at a time" is a matter of how requests are handed in.
const FEW_SEQS: usize = 4;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tp-model/tests/fixtures")
        .join(name)
}

/// One way to serve.
#[derive(Clone, Copy, Debug)]
struct Way {
    block_size: usize,
    /// Prompt tokens of one sequence in a step; 0 for no limit.
    chunk: usize,
    /// Tokens up to which prompts fill the steps of a few that decode; 0 for no limit.
    mixed: usize,
    /// Sequences at a time.
    concurrency: usize,
    prefix_cache: bool,
    /// A pool that holds one long sequence and little more.
    tiny_pool: bool,
    overlap: bool,
}

const PLAIN: Way = Way {
    block_size: 16,
    chunk: 0,
    mixed: 0,
    concurrency: 1,
    prefix_cache: false,
    tiny_pool: false,
    overlap: false,
};

fn engine(model: &str, way: Way) -> Engine<tp_model::Runner> {
    // Tests run side by side, and the tensors are small.
    tch::set_num_threads(1);
    let blocks_for = |tokens: usize| tokens.div_ceil(way.block_size);
    let config = EngineConfig {
        device: DeviceChoice::Cpu,
        dtype: DtypeChoice::Float32,
        max_model_len: MaxModelLen::Tokens(MAX_MODEL_LEN),
        max_num_seqs: way.concurrency.max(FEW_SEQS),
        block_size: way.block_size,
        long_prefill_token_threshold: way.chunk,
        mixed_step_tokens: Some(way.mixed),
        enable_prefix_caching: way.prefix_cache,
        overlap: Some(way.overlap),
        num_gpu_blocks_override: Some(match way.tiny_pool {
            true => blocks_for(MAX_MODEL_LEN) + blocks_for(40),
            false => 64 * blocks_for(MAX_MODEL_LEN),
        }),
        ..EngineConfig::new("")
    };
    Engine::from_directory(&config, &fixture(model), None).unwrap()
}

/// Prompts that share beginnings, of 1 to 120 tokens; every kind of sampling.
fn workload(vocab: u32) -> Vec<GenerateRequest> {
    let mut rng = StdRng::seed_from_u64(11);
    let mut random =
        |len: usize| -> Vec<u32> { (0..len).map(|_| rng.random_range(3..vocab)).collect() };
    let stems = [random(100), random(33), random(0)];
    (0..24u64)
        .map(|at| {
            let stem = &stems[at as usize % 3];
            let tail = random([1, 2, 15, 16, 17, 20, 5, 9][at as usize % 8]);
            let prompt = [stem.as_slice(), &tail].concat();
            let base = SamplingParams {
                max_tokens: Some([1, 5, 24, 16, 33][at as usize % 5]),
                ignore_eos: true,
                ..SamplingParams::default()
            };
            let params = match at % 6 {
                0 | 1 => SamplingParams {
                    temperature: 0.0,
                    ..base
                },
                2 => SamplingParams {
                    seed: Some(at),
                    n: 3,
                    ..base
                },
                3 => SamplingParams {
                    seed: Some(at),
                    temperature: 0.8,
                    top_k: 20,
                    top_p: 0.9,
                    ..base
                },
                4 => SamplingParams {
                    seed: Some(at),
                    repetition_penalty: 1.3,
                    frequency_penalty: 0.5,
                    presence_penalty: 0.5,
                    min_p: 0.01,
                    ..base
                },
                _ => SamplingParams {
                    seed: Some(at),
                    n: 2,
                    temperature: 1.5,
                    logit_bias: [(7, 2.0)].into(),
                    ignore_eos: false,
                    stop_token_ids: (0..vocab).step_by(9).collect(),
                    min_tokens: 1,
                    ..base
                },
            };
            GenerateRequest::new(at.to_string(), prompt, params)
        })
        .collect()
}

fn tokens(output: &RequestOutput) -> Vec<Vec<u32>> {
    output
        .outputs
        .iter()
        .map(|seq| seq.token_ids.clone())
        .collect()
}

/// The tokens of every request, and how often sequences were preempted.
fn run(model: &str, way: Way) -> (Vec<Vec<Vec<u32>>>, u64) {
    let mut engine = engine(model, way);
    let requests = workload(engine.frontend().limits().vocab_size as u32);
    let outputs: Vec<_> = if way.concurrency == 1 {
        let one = |request| engine.generate(vec![request]).remove(0);
        requests.into_iter().map(one).collect()
    } else {
        engine.generate(requests)
    };
    let tokens = outputs
        .iter()
        .map(|output| tokens(output.as_ref().unwrap()))
        .collect();
    let stats = engine.stats();
    assert_eq!(stats.kv_used_blocks, 0, "{way:?}: blocks leaked");
    assert_eq!(
        (stats.running, stats.waiting, stats.steps_in_flight),
        (0, 0, 0),
        "{way:?}"
    );
    // With room for all, every prompt enters before the first has been computed.
    if way.prefix_cache && way.concurrency < 64 {
        assert!(
            stats.totals.prefix_hits > 0,
            "{way:?}: no prefix was shared"
        );
    }
    (tokens, stats.totals.preemptions)
}

/// Every value of each axis with every value of every other: block size, chunk and concurrency in
/// all combinations, each with one of the eight settings of the switches and with its opposite.
fn ways() -> Vec<Way> {
    let mut ways = Vec::new();
    for block_size in [1, 16, 64] {
        for chunk in [7, 64, 0] {
            for concurrency in [1, 8, 64] {
                let switches = ways.len() / 2 * 3 % 8;
                for switches in [switches, 7 - switches] {
                    ways.push(Way {
                        block_size,
                        chunk,
                        mixed: if block_size == 16 { 0 } else { 24 },
                        concurrency,
                        prefix_cache: switches & 1 > 0,
                        tiny_pool: switches & 2 > 0,
                        overlap: switches & 4 > 0,
                    });
                }
            }
        }
    }
    ways
}

fn same_tokens_whatever_the_way(model: &str, ways: impl IntoIterator<Item = Way>) {
    let (expected, _) = run(model, PLAIN);
    let lengths: usize = expected.iter().flatten().map(Vec::len).sum();
    assert!(lengths > 400, "{lengths} tokens are a poor test");
    let mut preemptions = 0;
    for way in ways {
        let (got, preempted) = run(model, way);
        preemptions += preempted;
        for (at, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert_eq!(got, expected, "{model}, request {at}, {way:?}");
        }
    }
    assert!(preemptions > 0, "no way was tight enough to preempt");
}

#[test]
fn on_a_model_with_full_attention() {
    same_tokens_whatever_the_way("qwen3-headdim", ways());
}

#[test]
fn on_a_model_with_a_sliding_window() {
    same_tokens_whatever_the_way("mistral-window", ways().into_iter().step_by(4));
}

#[test]
fn on_a_model_with_few_windowed_layers() {
    same_tokens_whatever_the_way("qwen2-window-mix", ways().into_iter().skip(2).step_by(4));
}

#[test]
fn on_a_thread_of_its_own() {
    let (expected, _) = run("qwen3-headdim", PLAIN);
    let way = Way {
        concurrency: 8,
        prefix_cache: true,
        overlap: true,
        ..PLAIN
    };
    let engine = engine("qwen3-headdim", way).into_async().unwrap();
    let vocab = engine.frontend().limits().vocab_size as u32;
    let streams: Vec<_> = workload(vocab)
        .into_iter()
        .map(|request| engine.generate(request).unwrap())
        .collect();
    for (stream, expected) in streams.into_iter().zip(expected) {
        assert_eq!(tokens(&stream.blocking_collect().unwrap()), expected);
    }
}
