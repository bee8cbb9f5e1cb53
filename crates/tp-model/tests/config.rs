//! What each family's `config.json` means. (What is refused: `broken_checkpoints`.)

use std::path::PathBuf;

use serde_json::{Value, json};
use tch::Kind;
use tp_model::{Family, ModelConfig, RopeScaling};

fn parse(edits: Value) -> ModelConfig {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 321, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "max_position_embeddings": 512,
    });
    let edits = edits.as_object().unwrap().clone();
    config.as_object_mut().unwrap().extend(edits);
    static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let name = format!("tp-model-config-{}-{number}.json", std::process::id());
    let path: PathBuf = std::env::temp_dir().join(name);
    std::fs::write(&path, config.to_string()).unwrap();
    let parsed = ModelConfig::from_file(&path);
    std::fs::remove_file(&path).unwrap();
    parsed.unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn defaults_are_those_of_transformers() {
    let config = parse(json!({}));
    assert_eq!(config.family, Family::Llama);
    assert_eq!((config.num_kv_heads, config.head_dim), (4, 16));
    assert_eq!(config.rms_norm_eps, 1e-6);
    assert_eq!(config.rope.theta, 10_000.0);
    assert_eq!(config.rope.rotary_dim, 16);
    assert_eq!(config.rope.scaling, RopeScaling::Default);
    assert_eq!(config.dtype, Kind::Float);
    assert!(!config.tie_word_embeddings && !config.qkv_bias && !config.o_bias && !config.mlp_bias);
    assert_eq!((config.sliding_window(), config.max_context()), (None, 512));
    assert!(config.eos_token_ids.is_empty() && config.bos_token_id.is_none());
    // `null` is absence.
    let nulls = json!({"head_dim": null, "num_key_value_heads": null, "rope_scaling": null});
    assert_eq!(parse(nulls), config);
}

#[test]
fn families_differ_in_bias_norms_and_head_dim() {
    let biased = |family: &str| {
        let config = parse(json!({
            "architectures": [family], "attention_bias": true, "mlp_bias": true,
        }));
        (
            config.qkv_bias,
            config.o_bias,
            config.mlp_bias,
            config.qk_norm,
            config.head_dim,
        )
    };
    assert_eq!(biased("LlamaForCausalLM"), (true, true, true, false, 16));
    assert_eq!(
        biased("MistralForCausalLM"),
        (false, false, false, false, 16)
    );
    assert_eq!(biased("Qwen2ForCausalLM"), (true, false, false, false, 16));
    assert_eq!(biased("Qwen3ForCausalLM"), (true, true, false, true, 128));
    assert_eq!(Family::Qwen3.architecture(), "Qwen3ForCausalLM");
    let tied =
        parse(json!({"tie_word_embeddings": true, "head_dim": 40, "num_key_value_heads": 2}));
    assert!(tied.tie_word_embeddings);
    assert_eq!((tied.head_dim, tied.num_kv_heads), (40, 2));
}

#[test]
fn windows_follow_each_familys_rules() {
    let windows = |family: &str, edits: Value| {
        let mut all = edits;
        all["architectures"] = json!([family]);
        let config = parse(all);
        (config.windows.clone(), config.sliding_window())
    };
    let (all, some) = (Some(32), Some(32));
    assert_eq!(
        windows("LlamaForCausalLM", json!({"sliding_window": 32})),
        (vec![None; 4], None)
    );
    assert_eq!(
        windows("MistralForCausalLM", json!({"sliding_window": 32})),
        (vec![some; 4], all)
    );
    assert_eq!(
        windows("MistralForCausalLM", json!({"sliding_window": null})),
        (vec![None; 4], None)
    );
    assert_eq!(
        windows("MistralForCausalLM", json!({})),
        (vec![Some(4096); 4], Some(4096))
    );
    for family in ["Qwen2ForCausalLM", "Qwen3ForCausalLM"] {
        let off =
            json!({"sliding_window": 32, "use_sliding_window": false, "max_window_layers": 0});
        assert_eq!(windows(family, off), (vec![None; 4], None));
        let from = |layer: usize| json!({"sliding_window": 32, "use_sliding_window": true, "max_window_layers": layer});
        assert_eq!(windows(family, from(0)), (vec![some; 4], all));
        assert_eq!(
            windows(family, from(3)),
            (vec![None, None, None, some], None)
        );
        assert_eq!(windows(family, from(28)), (vec![None; 4], None));
        let (full, slide) = ("full_attention", "sliding_attention");
        let named = json!({
            "sliding_window": 32, "use_sliding_window": true, "max_window_layers": 0,
            "layer_types": [slide, full, slide, full],
        });
        assert_eq!(windows(family, named), (vec![some, None, some, None], None));
    }
}

#[test]
fn rope_is_read_in_old_and_new_style() {
    let old = parse(json!({
        "rope_theta": 500000.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    }));
    let new = parse(json!({
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0},
    }));
    assert_eq!(old, new);
    assert_eq!(old.rope.scaling, RopeScaling::Linear { factor: 4.0 });
    assert_eq!((old.rope.theta, old.max_context()), (500_000.0, 2048));

    let dynamic = parse(json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}));
    assert_eq!(dynamic.max_context(), 1024);
    assert!(!dynamic.prefix_cacheable() && old.prefix_cacheable());

    let llama3 = parse(json!({"rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }}));
    assert_eq!(llama3.max_context(), 512);

    let partial = parse(json!({"partial_rotary_factor": 0.5}));
    assert_eq!(partial.rope.rotary_dim, 8);
}

#[test]
fn yarn_derives_what_is_not_given() {
    let yarn = |edits: Value| {
        let mut rope = json!({
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256,
        });
        rope.as_object_mut()
            .unwrap()
            .extend(edits.as_object().unwrap().clone());
        let config = parse(json!({ "rope_scaling": rope }));
        let RopeScaling::Yarn {
            attention_factor,
            beta_fast,
            beta_slow,
            truncate,
            original,
            ..
        } = config.rope.scaling
        else {
            panic!("{config:?}")
        };
        let context = config.max_context();
        (
            attention_factor,
            beta_fast,
            beta_slow,
            truncate,
            original,
            context,
        )
    };
    let plain = 0.1 * 4f64.ln() + 1.0;
    assert_eq!(yarn(json!({})), (plain, 32.0, 1.0, true, 256, 1024));
    assert_eq!(yarn(json!({"attention_factor": 1.5})).0, 1.5);
    let both = yarn(json!({"mscale": 0.7, "mscale_all_dim": 0.4})).0;
    let want = (0.07 * 4f64.ln() + 1.0) / (0.04 * 4f64.ln() + 1.0);
    assert!((both - want).abs() < 1e-12);
    let ends = yarn(json!({"beta_fast": 16, "beta_slow": 2, "truncate": false}));
    assert_eq!((ends.1, ends.2, ends.3), (16.0, 2.0, false));
}

#[test]
fn dtype_and_special_tokens() {
    for (name, kind) in [
        ("float32", Kind::Float),
        ("bfloat16", Kind::BFloat16),
        ("float16", Kind::Half),
    ] {
        assert_eq!(parse(json!({ "torch_dtype": name })).dtype, kind);
        assert_eq!(
            parse(json!({"dtype": name, "torch_dtype": "float32"})).dtype,
            kind
        );
    }
    let config = parse(json!({"eos_token_id": [3, 5], "bos_token_id": 1}));
    assert_eq!(
        (config.eos_token_ids, config.bos_token_id),
        (vec![3, 5], Some(1))
    );
    assert_eq!(parse(json!({"eos_token_id": 9})).eos_token_ids, [9]);
}
