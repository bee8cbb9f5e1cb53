//! What keeps the program from starting: one line that names the fault, exit code 1 or 2.

use std::fs;

use crate::common::{Scratch, fixture, run};

/// Runs `run-batch` with these flags, which must fail with this code and a message that holds
/// `text`.
fn refuse(flags: &[&str], code: i32, text: &str) {
    let args = [&["run-batch", "-i", "-", "-o", "-"], flags].concat();
    let ran = run(&args, b"");
    let error = ran.error(code);
    assert!(error.contains(text), "{flags:?}: {error}");
    assert_eq!(ran.stdout, "");
}

#[test]
fn wrong_usage_is_exit_code_2() {
    for (flags, text) in [
        (&["--frobnicate"][..], "--frobnicate"),
        (&["--max-num-seqs", "0"], "at least 1"),
        (&["--max-num-seqs", "many"], "many"),
        (&["--block-size", "0"], "at least 1"),
        (&["--block-size", "99999999999999999"], "at most 1048576"),
        (&["--max-model-len", "0"], "at least 1"),
        (&["--max-model-len", "1kk"], "1kk"),
        (&["--max-num-batched-tokens", "0"], "at least 1"),
        (&["--kv-cache-memory-bytes", "1.5.5G"], "1.5.5G"),
        (&["--threads", "0"], "at least 1"),
        (&["--threads", "100000"], "four for each core"),
        (&["--seed", "-1"], "-1"),
        (&["--cpu", "--device", "cuda"], "cannot be used with"),
        (&["--revision", "main"], "--model"),
        // Flags of vLLM that are none here say what to do instead.
        (&["--quantization", "fp8"], "not quantized"),
        (&["--enable_lora"], "merge the adapter"),
    ] {
        refuse(flags, 2, text);
    }
    for args in [
        &[][..],
        &["fly"],
        &["run-batch"],
        &["run-batch", "-i", "x"],
        &["bench"],
    ] {
        run(args, b"").error(2);
    }
    for args in [
        &["--version"][..],
        &["--help"],
        &["run-batch", "--help"],
        &["bench", "latency", "-h"],
    ] {
        assert_eq!(run(args, b"").code, Some(0));
    }
}

#[test]
fn options_that_cannot_work_are_named() {
    for (flags, text) in [
        (&["--cpu", "--tp", "3"][..], "sizes that do: 1, 2, 4"),
        (&["--tp", "0"], "tensor_parallel_size"),
        (&["--device", "tpu"], "`tpu` is none of auto, cpu, cuda"),
        (&["--dtype", "int8"], "`int8`"),
        (&["--load-format", "gguf"], "`gguf` is none of"),
        (
            &["--scheduling-policy", "lifo"],
            "`lifo` is none of fcfs, priority",
        ),
        (&["--attention-backend", "magic"], "`magic`"),
        (&["--cpu", "--max-logprobs", "-2"], "max_logprobs"),
        (
            &["--cpu", "--override-generation-config", "{\"top_p\": 2}"],
            "override_generation_config: top_p",
        ),
        (
            &["--cpu", "--generation-config", "/nowhere"],
            "/nowhere/generation_config.json: missing",
        ),
        (
            &["--cpu", "--num-gpu-blocks-override", "0"],
            "num_gpu_blocks_override",
        ),
        (
            &["--cpu", "--max-num-batched-tokens", "10"],
            "below max_num_seqs (256)",
        ),
        (
            &["--cpu", "--max-model-len", "100k"],
            "100000 exceeds the model's own 2048",
        ),
        (
            &["--cpu", "--kv-cache-memory-bytes", "1"],
            "kv_cache_memory_bytes",
        ),
        (
            &["--cpu", "--num-gpu-blocks-override", "5"],
            "max_model_len to at most 81",
        ),
        (
            &["--cpu", "--num-gpu-blocks-override", "99999999999999"],
            "num_gpu_blocks_override",
        ),
        (
            &["--cpu", "--max-num-seqs", "1000000000000"],
            "max_num_seqs",
        ),
        (
            &["--cpu", "--max-num-batched-tokens", "1000000000000"],
            "max_num_batched_tokens",
        ),
        (
            &["--cpu", "--chat-template", "/nowhere/x.jinja"],
            "/nowhere/x.jinja",
        ),
    ] {
        refuse(flags, 1, text);
    }
}

#[test]
fn a_wrong_flag_of_a_configuration_file_is_said_to_stand_there() {
    let scratch = Scratch::new();
    let error = |yaml: &str, flag: &str| {
        let file = scratch.file("config.yaml", yaml);
        let ran = run(&["serve", "--cpu", flag, "--config", &file], b"");
        (ran.error(2).to_owned(), file)
    };
    for (yaml, flag) in [
        ("no-such: 1", "--no-such"),
        ("port: many", "--port"),
        // vLLM's, refused.
        ("swap_space: 4", "--swap-space"),
    ] {
        let (error, file) = error(yaml, "--cpu");
        let place = format!("{flag} stands in --config {file}");
        assert!(error.contains(&place), "{yaml}: {error}");
    }
    // The command line's own, and nothing of what keys are.
    let (error, _) = error("api-key: [secret]", "--bogus");
    assert!(
        error.contains("--bogus") && !error.contains("stands in"),
        "{error}"
    );
    assert!(!error.contains("secret"), "{error}");
}

#[test]
#[cfg(not(feature = "cuda"))]
fn a_build_without_cuda_says_so() {
    refuse(&["--device", "cuda"], 1, "--features cuda");
}

#[test]
fn models_that_cannot_be_loaded_are_named() {
    let scratch = Scratch::new();
    let refuse = |model: &str, text: &str| refuse(&["--cpu", "--model", model], 1, text);
    refuse(&scratch.path("missing"), "does not exist");
    refuse(&scratch.path(""), "config.json");
    refuse("Nobody/No-Such-Model", "HF_HUB_OFFLINE");
    refuse("not a model", "neither a directory nor a hub id");

    // A good checkpoint, with one file after the other broken.
    let good = fixture("qwen2-tied");
    let weights = fs::read(good.join("model.safetensors")).unwrap();
    let config = fs::read_to_string(good.join("config.json")).unwrap();
    for (name, content, text) in [
        ("config.json", "{\"architectures\":".into(), "config.json"),
        (
            "config.json",
            config
                .replace("Qwen2ForCausalLM", "OtherForCausalLM")
                .into(),
            "OtherForCausalLM",
        ),
        (
            "config.json",
            config
                .replace("\"hidden_size\": 64", "\"hidden_size\": 65")
                .into(),
            "hidden_size",
        ),
        ("tokenizer.json", "{}".into(), "tokenizer.json"),
        (
            "generation_config.json",
            "[1]".into(),
            "generation_config.json",
        ),
        (
            "model.safetensors",
            weights[..weights.len() / 2].to_vec(),
            "model.safetensors",
        ),
        ("model.safetensors", Vec::new(), "model.safetensors"),
    ] {
        let broken = Scratch::new();
        for file in [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ] {
            fs::copy(good.join(file), broken.path(file)).unwrap();
        }
        broken.file(name, content);
        refuse(&broken.path(""), text);
    }
}
