//! From a configuration to an engine: what is refused, and in which words.

use std::path::{Path, PathBuf};

use engine::checkpoint::Checkpoint;
use engine::generation_config::GenerationConfig;
use engine::{
    DeviceChoice, DtypeChoice, Engine, EngineConfig, GenerateRequest, LoadFormat, MaxModelLen,
    SamplingParams,
};

/// A checkpoint folder that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn with(name: &str, files: &[(&str, &str)]) -> Self {
        let path = std::env::temp_dir().join(format!("engine-load-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        let config = std::fs::read(fixture("qwen3-headdim").join("config.json")).unwrap();
        std::fs::write(path.join("config.json"), config).unwrap();
        for (file, text) in files {
            std::fs::write(path.join(file), text).unwrap();
        }
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tp-model/tests/fixtures")
        .join(name)
}

fn small() -> EngineConfig {
    EngineConfig {
        device: DeviceChoice::Cpu,
        dtype: DtypeChoice::Float32,
        max_num_seqs: 4,
        ..EngineConfig::new("")
    }
}

fn refused(config: &EngineConfig, dir: &Path) -> String {
    match Engine::from_directory(config, dir, None) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    }
}

type Change = fn(&mut EngineConfig);

#[test]
fn impossible_options_are_named_with_what_would_work() {
    let dir = fixture("qwen3-headdim");
    let cases: [(Change, &str); 11] = [
        (
            |c| c.tensor_parallel_size = 0,
            "tensor_parallel_size: must be at least 1",
        ),
        (|c| c.max_num_seqs = 0, "max_num_seqs: must be at least 1"),
        (|c| c.block_size = 0, "block_size: must be at least 1"),
        (
            |c| c.max_num_batched_tokens = Some(3),
            "max_num_batched_tokens: 3 is below max_num_seqs (4)",
        ),
        (
            |c| c.max_model_len = MaxModelLen::Tokens(0),
            "max_model_len: must be at least 1",
        ),
        (
            |c| c.max_model_len = MaxModelLen::Tokens(5000),
            "max_model_len: 5000 exceeds the model's own 1024",
        ),
        (
            |c| c.kv_cache_memory_bytes = Some(1 << 17),
            "set max_model_len to at most 97, or kv_cache_memory_bytes to at least",
        ),
        (
            |c| c.kv_cache_memory_bytes = Some(1 << 14),
            "; set kv_cache_memory_bytes to at least 1198080",
        ),
        (
            |c| c.gpu_memory_utilization = f64::NAN,
            "gpu_memory_utilization: must be above 0 and at most 1",
        ),
        (
            |c| c.kv_cache_memory_bytes = Some(1 << 50),
            "kv_cache_memory_bytes: a KV cache of",
        ),
        (|c| c.max_logprobs = -2, "max_logprobs: must be at least -1"),
    ];
    for (change, expected) in cases {
        let mut config = small();
        // Room for more than memory, where memory is the limit.
        config.max_num_seqs = 1 << 20;
        config.kv_cache_memory_bytes = Some(1 << 24);
        config.max_num_batched_tokens = Some(1 << 20);
        if !expected.starts_with("kv_cache") {
            config = small();
        }
        change(&mut config);
        let error = refused(&config, &dir);
        assert!(error.contains(expected), "{error}\nlacks: {expected}");
    }
    let error = "tpu".parse::<DeviceChoice>().unwrap_err().to_string();
    assert_eq!(error, "device: `tpu` is none of auto, cpu, cuda");
}

#[test]
fn auto_shortens_sequences_to_what_the_cache_holds() {
    let config = EngineConfig {
        max_model_len: MaxModelLen::Auto,
        num_gpu_blocks_override: Some(4),
        ..small()
    };
    let mut engine = Engine::from_directory(&config, &fixture("qwen3-headdim"), None).unwrap();
    assert_eq!(engine.frontend().limits().max_model_len, 65);
    let params = SamplingParams {
        temperature: 0.0,
        max_tokens: None,
        ignore_eos: true,
        ..SamplingParams::default()
    };
    let output = engine.generate(vec![GenerateRequest::new("r", vec![5, 6, 7], params)]);
    assert_eq!(output[0].as_ref().unwrap().outputs[0].token_ids.len(), 62);
}

#[test]
fn dummy_weights_need_a_config_alone_and_follow_the_seed() {
    let folder = Folder::with("dummy", &[]);
    let run = |seed| {
        let config = EngineConfig {
            load_format: LoadFormat::Dummy,
            seed,
            ..small()
        };
        let mut engine = Engine::from_directory(&config, &folder.0, None).unwrap();
        let request = GenerateRequest::new("r", vec![5, 6, 7], SamplingParams::greedy());
        engine.generate(vec![request]).remove(0).unwrap().outputs[0]
            .token_ids
            .clone()
    };
    let first = run(1);
    assert_eq!(first, run(1));
    assert_ne!(first, run(2));
    let error = refused(&small(), &folder.0);
    assert!(error.contains("safetensors"), "{error}");
}

#[test]
fn broken_files_beside_the_weights_are_named() {
    for (file, text) in [
        ("tokenizer.json", "{"),
        ("generation_config.json", "{\"eos_token_id\": \"two\"}"),
        ("chat_template.jinja", "{% for %}"),
    ] {
        let folder = Folder::with(&file[..4], &[(file, text)]);
        let config = EngineConfig {
            load_format: LoadFormat::Dummy,
            ..small()
        };
        let error = refused(&config, &folder.0);
        assert!(error.contains(file), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
    let config = EngineConfig {
        chat_template: Some(PathBuf::from("/no/such/template")),
        load_format: LoadFormat::Dummy,
        ..small()
    };
    let error = refused(&config, &fixture("qwen3-headdim"));
    assert!(error.contains("/no/such/template"), "{error}");
}

#[test]
fn end_tokens_come_from_the_generation_config_before_the_config() {
    let load = |files: Vec<(&'static str, &'static [u8])>| {
        GenerationConfig::load(&Checkpoint::Memory(files.into())).unwrap()
    };
    let config: (&str, &[u8]) = ("config.json", b"{\"eos_token_id\": 2}");
    assert_eq!(load(vec![config]).eos_token_id, [2]);
    let silent: (&str, &[u8]) = ("generation_config.json", b"{\"temperature\": 0.5}");
    let both = load(vec![config, silent]);
    assert_eq!((both.eos_token_id, both.temperature), (vec![2], Some(0.5)));
    let list: (&str, &[u8]) = ("generation_config.json", b"{\"eos_token_id\": [7, 8]}");
    assert_eq!(load(vec![config, list]).eos_token_id, [7, 8]);
    assert_eq!(load(vec![]).eos_token_id, Vec::<u32>::new());
}
