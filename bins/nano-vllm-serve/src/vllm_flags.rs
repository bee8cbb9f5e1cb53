//! Flags of vLLM (0.23) that are not flags here. Those that ask for what is so anyway are passed
//! over; every other is refused by name, with what to do instead.

use std::ffi::OsString;

use anyhow::bail;

/// Flags that are answered together.
struct Row {
    flags: &'static [&'static str],
    /// Values with which they ask for nothing; `""`: the flag has no value, and alone asks for nothing.
    fine: &'static [&'static str],
    /// Why there is no such flag, and what to do.
    why: &'static str,
}

const fn row(
    flags: &'static [&'static str],
    fine: &'static [&'static str],
    why: &'static str,
) -> Row {
    Row { flags, fine, why }
}

/// Short names that vLLM has and clap cannot.
const SHORT: &[(&str, &str)] = &[
    ("-tp", "--tensor-parallel-size"),
    ("-pp", "--pipeline-parallel-size"),
    ("-q", "--quantization"),
    ("-n", "--nnodes"),
    ("-r", "--node-rank"),
    ("-dp", "--data-parallel-size"),
    ("-ep", "--enable-expert-parallel"),
    ("-dcp", "--decode-context-parallel-size"),
    ("-pcp", "--prefill-context-parallel-size"),
    ("-sc", "--speculative-config"),
    ("-cc", "--compilation-config"),
    ("-ac", "--attention-config"),
];

#[rustfmt::skip]
const TABLE: &[Row] = &[
    // What is so anyway.
    row(&["--disable-log-stats"], &[""], "no statistics are logged; scrape /metrics"),
    row(&["--disable-log-requests", "--disable-uvicorn-access-log"], &[""],
        "requests are logged with --enable-log-requests, and only then"),
    row(&["--enable-server-load-tracking"], &[""], "/load always counts"),
    row(&["--async-scheduling"], &[""], "steps overlap on a GPU unless --no-overlap is given"),
    row(&["--no-enable-log-requests", "--no-enable-request-id-headers", "--no-enforce-eager",
          "--no-enable-prompt-tokens-details", "--no-enable-auto-tool-choice", "--no-skip-tokenizer-init",
          "--no-disable-custom-all-reduce", "--no-enable-force-include-usage",
          "--no-return-tokens-as-token-ids", "--no-enable-ssl-refresh"], &[""], "this is off unless asked for"),
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
    row(&["--quantization", "--quantization-config", "--allow-deprecated-quantization"], &["None", "none"],
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
    row(&["--data-parallel-size", "--data-parallel-size-local"], &["1"],
        "start a server for each replica, and a router in front of them"),
    row(&["--data-parallel-rank", "--data-parallel-start-rank", "--data-parallel-address",
          "--data-parallel-rpc-port", "--data-parallel-backend", "--data-parallel-hybrid-lb",
          "--data-parallel-external-lb", "--data-parallel-multi-port-external-lb",
          "--data-parallel-supervisor-port", "--dp-supervisor-probe-interval-s",
          "--dp-supervisor-probe-timeout-s", "--dp-supervisor-probe-failure-threshold", "--api-server-count",
          "--headless", "--disable-nccl-for-dp-synchronization"], &[],
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
    row(&["--scheduler-reserve-full-isl", "--kv-sharing-fast-prefill", "--calculate-kv-scales",
          "--kv-cache-dtype-skip-layers", "--renderer-num-workers", "--enable-sleep-mode",
          "--enable-cumem-allocator", "--fail-on-environ-validation"], &[],
        "there is nothing like it here; leave it out"),
    row(&["--cudagraph-capture-sizes", "--max-cudagraph-capture-size", "--compilation-config",
          "--optimization-level", "--performance-mode", "--kernel-config", "--attention-config",
          "--ir-op-priority", "--enable-flashinfer-autotune", "--linear-backend", "--use-fp64-gumbel",
          "--disable-cascade-attn"], &[],
        "kernels and CUDA graphs choose for themselves; --enforce-eager and --attention-backend are all there is"),
];

/// `args` as clap takes them: underscores in a flag's name are hyphens, as in vLLM, and vLLM's short
/// names are long.
pub fn spell(args: Vec<OsString>) -> Vec<OsString> {
    let mut open = true;
    let spelled = args.into_iter().map(|arg| {
        open &= arg != "--";
        match arg.to_str().filter(|_| open).and_then(spelled) {
            Some(spelled) => spelled.into(),
            None => arg,
        }
    });
    spelled.collect()
}

fn spelled(arg: &str) -> Option<String> {
    let (name, rest) = arg.split_at(arg.find(['=', '.']).unwrap_or(arg.len()));
    if name.starts_with("--") {
        return Some(name.replace('_', "-") + rest);
    }
    if let Some(level) = arg.strip_prefix("-O") {
        return Some(format!("--optimization-level={level}"));
    }
    let (_, long) = SHORT.iter().find(|(short, _)| *short == name)?;
    Some(format!("{long}{rest}"))
}

/// `args`, spelled, without vLLM's flags that ask for what is so anyway. An error for those that ask
/// for something else.
pub fn settle(args: Vec<OsString>) -> anyhow::Result<Vec<OsString>> {
    let mut rest = Vec::with_capacity(args.len());
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let text = arg.to_string_lossy().into_owned();
        let name = text.split(['=', '.']).next().unwrap_or_default();
        let no = name.strip_prefix("--no-").map(|name| format!("--{name}"));
        if text == "--" {
            rest.push(arg);
            break;
        } else if let Some(row) = find(name) {
            let value = match text.split_once('=') {
                Some((_, value)) => value.to_owned(),
                None if row.fine.is_empty() || row.fine.contains(&"") => String::new(),
                None => args.next().unwrap_or_default().to_string_lossy().into(),
            };
            if !row.fine.contains(&value.as_str()) {
                bail!("{}", refusal(name, row));
            }
        } else if let Some(row) = no.as_deref().and_then(find) {
            // Not to have what is not there is fine.
            if row.fine.contains(&"") {
                bail!("{}", refusal(name, row));
            }
        } else {
            rest.push(arg);
        }
    }
    rest.extend(args);
    Ok(rest)
}

fn find(name: &str) -> Option<&'static Row> {
    TABLE.iter().find(|row| row.flags.contains(&name))
}

fn refusal(name: &str, row: &Row) -> String {
    match row.fine {
        [] | [""] => format!("{name} is a flag of vLLM that is not one here: {}", row.why),
        fine => format!(
            "{name}, a flag of vLLM, can only be {} here: {}",
            fine.join(" or "),
            row.why
        ),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn settled(args: &[&str]) -> anyhow::Result<Vec<OsString>> {
        settle(spell(args.iter().map(OsString::from).collect()))
    }

    #[test]
    fn every_flag_of_the_table_is_refused_by_name_or_asks_for_nothing() {
        let mut seen = std::collections::HashSet::new();
        for row in TABLE {
            for flag in row.flags {
                assert!(seen.insert(flag), "{flag} is there twice");
                let bad = match row.fine {
                    [""] => format!("{flag}=strange"),
                    _ => format!("{flag}=strange-value"),
                };
                for args in [vec!["serve", &bad], vec!["serve", "--port", "1", &bad, "x"]] {
                    let error = settled(&args).unwrap_err().to_string();
                    assert!(error.starts_with(flag), "{error}");
                    assert!(error.ends_with(row.why), "{error}");
                }
                for fine in row.fine {
                    let args = match *fine {
                        "" => vec!["serve", flag, "x"],
                        value => vec!["serve", flag, value, "x"],
                    };
                    assert_eq!(settled(&args).unwrap(), ["serve", "x"], "{flag} {fine}");
                }
            }
        }
    }

    #[test]
    fn no_flag_of_ours_is_in_the_table() {
        fn check(command: &clap::Command) {
            for long in command.get_arguments().filter_map(clap::Arg::get_long) {
                let flag = format!("--{long}");
                assert!(find(&flag).is_none(), "{flag} is in the table");
            }
            command.get_subcommands().for_each(check);
        }
        check(&crate::Cli::command());
    }

    #[test]
    fn names_are_spelled_as_in_vllm() {
        let args = [
            "serve",
            "m",
            "--max_model_len=1_0",
            "-tp",
            "2",
            "-O3",
            "--",
            "--a_b",
        ];
        let spelled = spell(args.map(OsString::from).to_vec());
        assert_eq!(
            spelled,
            [
                "serve",
                "m",
                "--max-model-len=1_0",
                "--tensor-parallel-size",
                "2",
                "--optimization-level=3",
                "--",
                "--a_b"
            ]
        );
        for (args, text) in [
            (&["serve", "-q", "fp8"][..], "--quantization"),
            (&["serve", "--enable_lora"], "--enable-lora"),
            (
                &["serve", "--compilation-config.mode=3"],
                "--compilation-config",
            ),
            (&["serve", "--no-async-scheduling"], "--no-overlap"),
            (&["serve", "--kv-cache-dtype", "fp8"], "can only be auto"),
        ] {
            let error = settled(args).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
        let fine = [
            "serve",
            "--no-enable-lora",
            "--no-trust-remote-code",
            "--seed",
            "1",
        ];
        assert_eq!(settled(&fine).unwrap(), ["serve", "--seed", "1"]);
        assert_eq!(
            settled(&["x", "--", "--uds"]).unwrap(),
            ["x", "--", "--uds"]
        );
    }
}
