//! Where sampling defaults come from: the checkpoint, a folder, the engine, or the operator.

use std::sync::Arc;

use engine::checkpoint::Checkpoint;
use engine::generation_config::{GenerationConfig, GenerationDefaults, GenerationOverrides};
use sampler::SamplingParams;

fn checkpoint() -> Checkpoint {
    let recommended = br#"{"eos_token_id": [7, 8], "temperature": 0.6, "top_k": 20, "top_p": 0.9,
                           "do_sample": true}"#;
    Checkpoint::Memory(Arc::new([("generation_config.json", &recommended[..])]))
}

fn params(defaults: &GenerationDefaults, over: &str) -> SamplingParams {
    let over: GenerationOverrides = over.parse().unwrap();
    let config = GenerationConfig::for_flags(&checkpoint(), defaults, &over).unwrap();
    assert_eq!(config.eos_token_id, [7, 8], "the checkpoint's own, always");
    config.sampling_params()
}

#[test]
fn the_operator_wins_over_the_folder_over_the_engine() {
    let base = SamplingParams::default();
    let own = params(&"auto".parse().unwrap(), "{}");
    assert_eq!((own.temperature, own.top_k, own.top_p), (0.6, 20, 0.9));
    assert_eq!(params(&"vllm".parse().unwrap(), "{}"), base);

    let folder = std::env::temp_dir().join(format!("generation-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("generation_config.json");
    std::fs::write(&file, r#"{"eos_token_id": 1, "min_p": 0.1, "top_k": 3}"#).unwrap();
    let named: GenerationDefaults = folder.to_str().unwrap().parse().unwrap();
    let over = r#"{"top_k": 5, "max_new_tokens": 9, "repetition_penalty": 1.5}"#;
    let expected = SamplingParams {
        min_p: 0.1,
        top_k: 5,
        max_tokens: Some(9),
        repetition_penalty: 1.5,
        ..base
    };
    assert_eq!(params(&named, over), expected);
    std::fs::remove_dir_all(&folder).unwrap();
    let gone = GenerationConfig::for_flags(&checkpoint(), &named, &Default::default());
    let message = gone.unwrap_err().to_string();
    assert!(
        message.contains("generation_config.json: missing"),
        "{message}"
    );
}

#[test]
fn only_the_operators_max_new_tokens_is_a_limit() {
    let files = |json: &'static str| {
        Checkpoint::Memory(Arc::new([("generation_config.json", json.as_bytes())]))
    };
    let checkpoint = files(r#"{"eos_token_id": 7, "max_new_tokens": 100}"#);
    let limits = |defaults: &GenerationDefaults, over: &str| {
        let over = over.parse().unwrap();
        let config = GenerationConfig::for_flags(&checkpoint, defaults, &over).unwrap();
        (config.sampling_params().max_tokens, config.max_tokens_limit)
    };
    let over = r#"{"max_new_tokens": 9}"#;
    let own = GenerationDefaults::Checkpoint;
    assert_eq!(limits(&own, "{}"), (Some(100), None));
    assert_eq!(limits(&own, over), (Some(9), Some(9)));
    assert_eq!(
        limits(&GenerationDefaults::Engine, over),
        (Some(9), Some(9))
    );

    let folder = std::env::temp_dir().join(format!("generation-limit-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let json = r#"{"max_new_tokens": 50}"#;
    std::fs::write(folder.join("generation_config.json"), json).unwrap();
    let named = GenerationDefaults::Folder(folder.clone());
    assert_eq!(limits(&named, "{}"), (Some(50), Some(50)));
    assert_eq!(limits(&named, over), (Some(9), Some(9)));
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn overrides_that_mean_nothing_are_refused() {
    for (json, text) in [
        ("temperature=1", "must be a JSON object"),
        (r#"{"temprature": 1}"#, "temprature"),
        (r#"{"temperature": -1}"#, "temperature"),
        (r#"{"top_p": 2}"#, "top_p"),
        (r#"{"top_k": "many"}"#, "many"),
    ] {
        let error = json.parse::<GenerationOverrides>().unwrap_err().to_string();
        assert!(error.contains("override_generation_config"), "{error}");
        assert!(error.contains(text), "{error}");
    }
}
