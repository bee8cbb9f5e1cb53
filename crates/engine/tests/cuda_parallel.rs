//! Ranks that share one GPU, and, with more GPUs, have one each, through the whole engine: chunked
//! prefill, shared prefixes, preemption, several steps under way.
#![cfg(feature = "cuda")]

use std::path::Path;
use std::time::Duration;

use engine::{
    DeviceChoice, DtypeChoice, Engine, EngineConfig, GenerateRequest, MaxModelLen, SamplingParams,
};

fn config(tp: usize, pp: usize) -> EngineConfig {
    EngineConfig {
        device: DeviceChoice::Cuda,
        dtype: DtypeChoice::Float16,
        tensor_parallel_size: tp,
        pipeline_parallel_size: pp,
        device_ids: Some(vec![0; tp * pp]),
        distributed_timeout: Duration::from_secs(20),
        max_model_len: MaxModelLen::Tokens(160),
        max_num_seqs: 6,
        max_num_batched_tokens: Some(32),
        block_size: 16,
        num_gpu_blocks_override: Some(16),
        skip_tokenizer_init: true,
        ..EngineConfig::new("demo")
    }
}

fn requests() -> Vec<GenerateRequest> {
    let request = |at: usize| {
        // Two beginnings that several prompts share.
        let len = 40 + at * 3;
        let token = |i: usize| ((i * 31 + at % 2 * 77 + i / 40 * at * 13) % 4000 + 50) as u32;
        let prompt: Vec<u32> = (0..len).map(token).collect();
        let params = SamplingParams {
            temperature: 0.0,
            n: 1,
            max_tokens: Some(30),
            ignore_eos: true,
            logprobs: Some(2),
            prompt_logprobs: (at == 6).then_some(1),
            ..SamplingParams::default()
        };
        GenerateRequest::new(at.to_string(), prompt, params)
    };
    (0..12).map(request).collect()
}

#[test]
fn answers_do_not_depend_on_the_number_of_ranks() {
    if !torch_ext::cuda::is_available() {
        println!("skipped: no CUDA device");
        return;
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo");
    let run = |config: &EngineConfig| {
        let mut engine = Engine::from_directory(config, &folder, None).unwrap();
        let outputs = engine.generate(requests());
        // The last step may still be on its way.
        let mut stats = engine.stats();
        for _ in 0..200 {
            if stats.kv_used_blocks == 0 {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(25));
            stats = engine.stats();
        }
        assert_eq!(stats.kv_used_blocks, 0);
        assert!(
            stats.totals.preemptions > 0 && stats.totals.prefix_hits > 0,
            "{stats:?}"
        );
        let outputs: Result<Vec<_>, _> = outputs.into_iter().collect();
        outputs.unwrap()
    };
    let alone = run(&config(1, 1));
    let mut configs = Vec::new();
    for (tp, pp) in [(2, 1), (4, 1), (1, 2), (1, 3), (2, 2)] {
        // Stages of several ranks on one GPU meet among themselves alone: while one loads code, which
        // waits for the GPU, the ranks of the other wait for each other on it, and are late.
        if tp == 1 || pp == 1 {
            configs.push(config(tp, pp));
        }
        let eager = EngineConfig {
            enforce_eager: true,
            ..config(tp, pp)
        };
        configs.extend((pp > 1 && tp == 1).then_some(eager));
        if torch_ext::cuda::device_count() >= tp * pp {
            configs.push(EngineConfig {
                device_ids: None,
                ..config(tp, pp)
            });
        }
    }
    for config in configs {
        let together = run(&config);
        let ranks = format!(
            "tp {}, pp {}, GPUs {:?}, eager {}:",
            config.tensor_parallel_size,
            config.pipeline_parallel_size,
            config.device_ids,
            config.enforce_eager
        );
        let (mut same, mut all) = (0, 0);
        for (one, other) in alone.iter().zip(&together) {
            let (one, other) = (&one.outputs[0], &other.outputs[0]);
            let pairs = one.token_ids.iter().zip(&other.token_ids);
            let equal = pairs.take_while(|(a, b)| a == b).count();
            all += one.token_ids.len();
            same += equal;
            if equal < one.token_ids.len() {
                // Where they part, both answers must have been nearly as good.
                let entry = &one.logprobs.as_ref().unwrap()[equal];
                let gap = match entry.top[..] {
                    [(_, first), (_, second), ..] => first - second,
                    _ => f32::INFINITY,
                };
                println!("{ranks} parts at token {equal}, gap {gap}");
                assert!(gap < 0.1, "{ranks} token {equal}: {gap}");
            }
        }
        println!("{ranks} {same} of {all} tokens come before the first difference");
        assert!(same * 2 > all);
    }
}

#[test]
fn too_many_ranks_are_refused() {
    if !torch_ext::cuda::is_available() {
        println!("skipped: no CUDA device");
        return;
    }
    let count = torch_ext::cuda::device_count();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo");
    let refused = |config: EngineConfig| {
        let refused = Engine::from_directory(&config, &folder, None);
        refused.err().expect("refused").to_string()
    };
    let many = EngineConfig {
        device_ids: None,
        ..config(count + 1, 1)
    };
    let error = refused(many);
    assert!(error.contains(&format!("libtorch sees {count}")), "{error}");
    let float32 = EngineConfig {
        dtype: DtypeChoice::Float32,
        ..config(2, 1)
    };
    let error = refused(float32);
    assert!(error.contains("bfloat16 or float16"), "{error}");
    let stages = EngineConfig {
        device_ids: Some(vec![0]),
        ..config(1, 2)
    };
    let error = refused(stages);
    assert!(error.contains("not one GPU for each of 2 ranks"), "{error}");
}
