//! The model in the program: whole sentences, ended by itself, the same as transformers gives.
#![cfg(feature = "demo-model")]

use engine::chat_template::ChatInput;
use engine::{
    DeviceChoice, DtypeChoice, EngineConfig, FinishReason, GenerateRequest, SamplingParams, demo,
};
use serde_json::json;

fn ask(question: &str) -> ChatInput {
    ChatInput {
        messages: vec![json!({"role": "user", "content": question})],
        ..ChatInput::default()
    }
}

#[test]
fn it_answers_and_stops_by_itself() {
    let config = EngineConfig {
        device: DeviceChoice::Cpu,
        dtype: DtypeChoice::Float32,
        ..EngineConfig::new("demo")
    };
    let mut engine = demo::engine(&config).unwrap();
    let defaults = engine.frontend().default_sampling_params();
    assert_eq!(
        (defaults.temperature, defaults.top_k, defaults.top_p),
        (0.6, 40, 0.9)
    );
    let params = SamplingParams {
        temperature: 0.0,
        max_tokens: Some(100),
        ..defaults
    };
    let requests = ["What is 3 plus 4?", "What is the opposite of hot?"]
        .map(|question| GenerateRequest::new(question, ask(question), params.clone()));
    let outputs = engine.generate(requests.to_vec());
    for (output, expected) in outputs.iter().zip(["7", "cold"]) {
        let answer = &output.as_ref().unwrap().outputs[0];
        assert_eq!(answer.finish_reason(), Some(FinishReason::Stop));
        assert!(
            answer.text.to_lowercase().contains(expected),
            "{}",
            answer.text
        );
        assert!(!answer.text.contains("<|"), "{}", answer.text);
    }
    assert_eq!(engine.stats().kv_used_blocks, 0);
    let left = std::fs::read_dir(std::env::temp_dir())
        .unwrap()
        .flatten()
        .filter(|entry| {
            let name = format!("nano-vllm-demo-{}-", std::process::id());
            entry.file_name().to_string_lossy().starts_with(&name)
        });
    assert_eq!(left.count(), 0, "the temporary folder is gone");
}
