//! Flags of vLLM that are not flags here, and why.

/// Flags that are answered together.
pub struct Row {
    pub flags: &'static [&'static str],
    /// Values with which they ask for nothing; `""`: the flag has no value, and alone asks for nothing.
    pub fine: &'static [&'static str],
    /// Why there is no such flag, and what to do.
    pub why: &'static str,
}

const fn row(
    flags: &'static [&'static str],
    fine: &'static [&'static str],
    why: &'static str,
) -> Row {
    Row { flags, fine, why }
}

#[rustfmt::skip]
pub const TABLE: &[Row] = &[
    // What is so anyway.
    row(&["--disable-log-stats"], &[""], "no statistics are logged; scrape /metrics"),
    row(&["--disable-log-requests", "--disable-uvicorn-access-log"], &[""],
        "requests are logged with --enable-log-requests, and only then"),
    row(&["--enable-server-load-tracking"], &[""], "/load always counts"),
    row(&["--async-scheduling"], &[""], "steps overlap on a GPU unless --no-overlap is given"),
    row(&["--scheduler-reserve-full-isl"], &[""], "a prompt enters once there are blocks for all its tokens"),
    row(&["--prefix-caching-hash-algo"], &["builtin", "sha256", "sha256_cbor", "xxhash", "xxhash_cbor"],
        "prefixes are found by keyed hashes and then compared token by token; leave it out"),
    row(&["--max-log-len"], &["0"], "prompts are not logged; leave it out"),
    // What has one value here.
    row(&["--logprobs-mode"], &["raw_logprobs"],
        "log-probabilities are the model's own (raw_logprobs), before penalties and temperature"),
    row(&["--runner", "--task"], &["auto", "generate"], "models generate text here and do nothing else"),
    row(&["--convert"], &["auto", "none"], "models generate text here and do nothing else"),
    row(&["--model-impl"], &["auto", "vllm"], "there is one implementation of each model"),
    row(&["--tokenizer-mode", "--config-format"], &["auto", "hf"],
        "checkpoints have the Hugging Face format, with a tokenizer.json"),
    row(&["--chat-template-content-format"], &["auto"], "the template decides how messages are rendered (auto)"),
    row(&["--response-role"], &["assistant"], "answers have the role assistant"),
    row(&["--kv-cache-dtype"], &["auto"], "the KV cache has the weights' type; see --dtype"),
    row(&["--distributed-executor-backend"], &["mp", "uni"],
        "ranks are threads of this process, or processes under torchrun; see docs/distributed.md"),
    row(&["--allowed-methods", "--allowed-headers"], &["[\"*\"]", "*"],
        "--allowed-origins lets a page use every method and header that there is"),
    // The checkpoint.
    row(&["--quantization", "--quantization-config"], &["None", "none"],
        "weights are float32, bfloat16 or float16 (--dtype); use a checkpoint that is not quantized"),
    row(&["--allow-deprecated-quantization"], &[],
        "weights are float32, bfloat16 or float16 (--dtype); use a checkpoint that is not quantized"),
    row(&["--tokenizer", "--tokenizer-revision", "--hf-config-path"], &[],
        "all files of a model lie in one folder: put the other tokenizer or config.json there"),
    row(&["--trust-remote-code", "--code-revision"], &[],
        "no code of a checkpoint is ever run; models that bring their own are not supported"),
    row(&["--hf-token"], &[], "set HF_TOKEN, or log in with `hf auth login`"),
    row(&["--download-dir"], &[], "set HF_HUB_CACHE or HF_HOME"),
    row(&["--hf-overrides", "--disable-sliding-window", "--rope-scaling", "--rope-theta",
          "--override-attention-dtype"], &[], "edit config.json in a copy of the checkpoint's folder"),
    row(&["--safetensors-load-strategy", "--safetensors-prefetch-num-threads",
          "--safetensors-prefetch-block-size", "--model-loader-extra-config", "--ignore-patterns",
          "--use-tqdm-on-load", "--pt-load-map-location", "--max-parallel-loading-workers"], &[],
        "safetensors files are read as fast as the disk allows; leave it out"),
    // Requests and answers.
    row(&["--trust-request-chat-template"], &[], "templates are the operator's (--chat-template), never a request's"),
    row(&["--exclude-tools-when-tool-choice-none"], &[], "clients that want no tools in the prompt send none"),
    row(&["--tool-parser-plugin", "--reasoning-parser-plugin", "--tool-server", "--logits-processors",
          "--io-processor-plugin", "--worker-cls", "--worker-extension-cls", "--scheduler-cls", "--middleware",
          "--additional-config"], &[],
        "this loads Python code, and there is no Python here; put a proxy in front of the server"),
    row(&["--reasoning-config"], &[], "--reasoning-parser is all there is about reasoning"),
    row(&["--structured-outputs-config", "--guided-decoding-backend"], &[],
        "there is one implementation of structured outputs; see docs/structured.md"),
    row(&["--enable-tokenizer-info-endpoint", "--tokens-only", "--enable-prompt-embeds",
          "--enable-per-request-metrics", "--enable-return-routed-experts"], &[],
        "the server has no such endpoint or field; see docs/serving.md"),
    row(&["--fingerprint-mode", "--fingerprint-value"], &[], "system_fingerprint is nano-vllm and its version"),
    // Around HTTP.
    row(&["--root-path"], &[], "let the proxy in front strip its prefix from the path"),
    row(&["--grpc"], &[], "the server speaks HTTP"),
    row(&["--allow-credentials"], &[], "keys are sent in a header, cookies are not looked at"),
    row(&["--ssl-ciphers"], &[], "TLS 1.2 and 1.3 have the cipher suites of rustls, all of them safe"),
    row(&["--disable-fastapi-docs", "--enable-offline-docs"], &[],
        "/openapi.json is behind --api-key like all else, and there is no viewer of it"),
    row(&["--uvicorn-log-level", "--log-config-file", "--log-error-stack", "--enable-log-outputs",
          "--enable-log-deltas", "--disable-access-log-for-endpoints", "--aggregate-engine-logging",
          "--enable-logging-iteration-details"], &[],
        "see --log-format, --enable-log-requests and the variable RUST_LOG; no prompt or answer is logged"),
    row(&["--collect-detailed-traces", "--show-hidden-metrics-for-version", "--kv-cache-metrics",
          "--kv-cache-metrics-sample", "--cudagraph-metrics", "--enable-layerwise-nvtx-tracing",
          "--enable-mfu-metrics", "--profiler-config"], &[],
        "see /metrics and --otlp-traces-endpoint for what is measured"),
    // The engine.
    row(&["--speculative-config", "--spec-method", "--spec-model", "--spec-tokens"], &[],
        "speculative decoding is not supported; leave it out"),
    row(&["--swap-space", "--cpu-offload-gb"], &["0"],
        "nothing is moved to the CPU's memory: preempted sequences are computed again; leave it out"),
    row(&["--kv-offloading-size", "--kv-offloading-backend", "--offload-backend", "--cpu-offload-params",
          "--offload-group-size", "--offload-num-in-group", "--offload-prefetch-step", "--offload-params",
          "--kv-transfer-config", "--kv-events-config", "--ec-transfer-config", "--weight-transfer-config"], &[],
        "weights and KV cache stay on the device; leave it out"),
    row(&["--enable-lora", "--lora-modules", "--max-loras", "--max-lora-rank", "--lora-dtype", "--max-cpu-loras",
          "--fully-sharded-loras", "--lora-target-modules", "--default-mm-loras", "--specialize-active-lora",
          "--enable-tower-connector-lora", "--enable-mixed-moe-lora-format"], &[],
        "LoRA is not supported: merge the adapter into the checkpoint"),
    row(&["--data-parallel-size", "--data-parallel-size-local", "--api-server-count"], &["1"],
        "start a server for each replica, and a router in front of them"),
    row(&["--data-parallel-rank", "--data-parallel-start-rank", "--data-parallel-address",
          "--data-parallel-rpc-port", "--data-parallel-backend", "--data-parallel-hybrid-lb",
          "--data-parallel-external-lb", "--data-parallel-multi-port-external-lb",
          "--data-parallel-supervisor-port", "--dp-supervisor-probe-interval-s",
          "--dp-supervisor-probe-timeout-s", "--dp-supervisor-probe-failure-threshold", "--headless",
           "--disable-nccl-for-dp-synchronization"], &[],
        "start a server for each replica, and a router in front of them"),
    row(&["--nnodes", "--decode-context-parallel-size", "--prefill-context-parallel-size"], &["1"],
        "ranks on several machines are started by torchrun; see docs/distributed.md"),
    row(&["--node-rank"], &["0"], "ranks on several machines are started by torchrun; see docs/distributed.md"),
    row(&["--master-addr", "--master-port", "--cpu-distributed-timeout-seconds", "--ray-workers-use-nsight",
          "--numa-bind", "--numa-bind-nodes", "--numa-bind-cpus", "--dcp-comm-backend",
          "--dcp-kv-cache-interleave-size", "--cp-kv-cache-interleave-size"], &[],
        "ranks on several machines are started by torchrun; see docs/distributed.md"),
    row(&["--enable-expert-parallel", "--enable-ep-weight-filter", "--all2all-backend", "--enable-dbo",
          "--ubatch-size", "--enable-elastic-ep", "--dbo-decode-token-threshold",
          "--dbo-prefill-token-threshold", "--enable-eplb", "--eplb-config", "--expert-placement-strategy",
          "--moe-backend"], &[], "models with experts are not supported"),
    row(&["--mamba-backend", "--enable-mamba-cache-stochastic-rounding", "--mamba-cache-philox-rounds",
          "--mamba-cache-dtype", "--mamba-ssm-cache-dtype", "--mamba-block-size", "--mamba-cache-mode",
          "--gdn-prefill-backend", "--disable-hybrid-kv-cache-manager"], &[],
        "models with state-space layers are not supported"),
    row(&["--allowed-local-media-path", "--allowed-media-domains", "--language-model-only",
          "--limit-mm-per-prompt", "--enable-mm-embeds", "--media-io-kwargs", "--mm-processor-kwargs",
          "--mm-processor-cache-gb", "--mm-processor-cache-type", "--mm-shm-cache-max-object-size-mb",
          "--mm-encoder-only", "--mm-encoder-tp-mode", "--mm-encoder-attn-backend", "--mm-encoder-attn-dtype",
          "--mm-encoder-fp8-scale-path", "--mm-encoder-fp8-scale-save-path",
          "--mm-encoder-fp8-scale-save-margin", "--interleave-mm-strings", "--skip-mm-profiling",
          "--video-pruning-rate", "--mm-tensor-ipc", "--disable-chunked-mm-input"], &[],
        "models read text here, no pictures or sound"),
    row(&["--pooler-config", "--enable-flash-late-interaction", "--cohere-is-reasoning-model", "--cohere-format"],
        &[], "models generate text here and do nothing else"),
    row(&["--max-num-partial-prefills", "--max-long-partial-prefills"], &["1"],
        "--long-prefill-token-threshold keeps long prompts from holding up short ones"),
    row(&["--kv-sharing-fast-prefill", "--calculate-kv-scales",
          "--kv-cache-dtype-skip-layers", "--renderer-num-workers", "--enable-sleep-mode",
          "--enable-cumem-allocator", "--fail-on-environ-validation"], &[],
        "there is nothing like it here; leave it out"),
    row(&["--cudagraph-capture-sizes", "--max-cudagraph-capture-size", "--compilation-config",
          "--optimization-level", "--performance-mode", "--kernel-config", "--attention-config",
          "--ir-op-priority", "--enable-flashinfer-autotune", "--linear-backend", "--use-fp64-gumbel",
          "--disable-cascade-attn"], &[],
        "kernels and CUDA graphs choose for themselves; --enforce-eager and --attention-backend are all there is"),
];

/// Flags of the table that take no value, besides those that begin with `--enable-` or are fine alone.
#[rustfmt::skip]
pub const SWITCHES: &[&str] = &[
    "--aggregate-engine-logging", "--allow-credentials", "--allow-deprecated-quantization", "--calculate-kv-scales",
    "--cohere-is-reasoning-model", "--cudagraph-metrics", "--data-parallel-external-lb", "--data-parallel-hybrid-lb",
    "--data-parallel-multi-port-external-lb", "--disable-cascade-attn", "--disable-chunked-mm-input",
    "--disable-fastapi-docs", "--disable-hybrid-kv-cache-manager", "--disable-nccl-for-dp-synchronization",
    "--disable-sliding-window", "--exclude-tools-when-tool-choice-none", "--fail-on-environ-validation",
    "--fully-sharded-loras", "--grpc", "--headless", "--interleave-mm-strings", "--kv-cache-metrics",
    "--kv-sharing-fast-prefill", "--language-model-only", "--log-error-stack", "--mm-encoder-only", "--numa-bind",
    "--ray-workers-use-nsight", "--skip-mm-profiling", "--specialize-active-lora", "--tokens-only",
    "--trust-remote-code", "--trust-request-chat-template", "--use-fp64-gumbel", "--use-tqdm-on-load",
];

/// The row of a flag.
pub fn find(name: &str) -> Option<&'static Row> {
    TABLE.iter().find(|row| row.flags.contains(&name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_switch_is_in_the_table_and_listed_once() {
        for (at, flag) in SWITCHES.iter().enumerate() {
            // Where values are listed, one would be taken from what follows the flag.
            assert!(find(flag).is_some_and(|row| row.fine.is_empty()), "{flag}");
            assert!(!flag.starts_with("--enable-"), "{flag}");
            assert!(!SWITCHES[..at].contains(flag), "{flag}");
        }
    }
}
