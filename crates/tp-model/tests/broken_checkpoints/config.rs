//! A `config.json` that is not one, or that asks for what cannot be.

use serde_json::{Value, json};

use super::scratch::{SINGLE, Scratch};

const CONFIG: &str = "config.json";

/// Loads with one field replaced (or removed, if `value` is `None`) and expects a refusal.
fn refused(field: &str, value: Option<Value>, parts: &[&str]) {
    let scratch = Scratch::of(SINGLE);
    let what = format!("{field} = {value:?}");
    scratch.edit_json(CONFIG, |config| {
        match value {
            Some(value) => config.insert(field.into(), value),
            None => config.remove(field),
        };
    });
    scratch.refused(&what, parts);
}

#[test]
fn text_that_is_not_a_json_object_is_refused() {
    let scratch = Scratch::of(SINGLE);
    let nested = "[".repeat(100_000);
    for text in [
        "",
        "{",
        "config",
        "[]",
        "3",
        "null",
        "{}{}",
        "{\"vocab_size\": NaN}",
        &nested,
    ] {
        scratch.write(CONFIG, text);
        scratch.refused(&format!("{text:.20}"), &[CONFIG, "JSON"]);
    }
    scratch.write(CONFIG, [0xff, 0xfe, b'{', b'}']);
    scratch.refused("not UTF-8", &[CONFIG]);
}

#[test]
fn an_unknown_architecture_is_named_beside_the_known_ones() {
    for name in [
        "MambaForCausalLM",
        "LlamaForSequenceClassification",
        "llamaforcausallm",
        "",
    ] {
        let known = [
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
        ];
        let parts = [&[CONFIG, "`architectures`", name][..], &known].concat();
        refused("architectures", Some(json!([name])), &parts);
    }
    for value in [json!([]), json!("LlamaForCausalLM"), json!([1]), json!({})] {
        refused("architectures", Some(value), &[CONFIG, "`architectures`"]);
    }
    refused(
        "architectures",
        None,
        &[CONFIG, "`architectures`", "found nothing"],
    );
}

#[test]
fn each_size_is_required_and_checked() {
    let sizes = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "vocab_size",
    ];
    for field in sizes {
        let quoted = format!("`{field}`");
        refused(field, None, &[CONFIG, &quoted, "expected", "found nothing"]);
        let wrong = [
            json!(0),
            json!(-1),
            json!(64.5),
            json!("64"),
            json!([64]),
            json!(true),
            json!(1e300),
            json!(u64::MAX),
            json!(1u64 << 62),
            json!(1u64 << 33),
        ];
        for value in wrong {
            let text = value.to_string();
            refused(
                field,
                Some(value),
                &[CONFIG, &quoted, "expected", "found", &text],
            );
        }
    }
}

#[test]
fn a_large_size_is_compared_with_the_weights_before_anything_is_allocated() {
    let large = [
        ("hidden_size", 1 << 30, "tensor `"),
        ("intermediate_size", 1 << 30, "tensor `"),
        ("vocab_size", 1u64 << 31, "tensor `"),
        ("num_hidden_layers", 4, "tensor `model.layers.3."),
        ("num_hidden_layers", 1_000, "tensor `model.layers.3."),
        ("num_attention_heads", 1 << 30, ""),
    ];
    for (field, value, part) in large {
        refused(field, Some(json!(value)), &[part, "expected", "found"]);
    }
    refused(
        "num_hidden_layers",
        Some(json!(u32::MAX)),
        &["expected", "found"],
    );
    // A context costs nothing before it is used.
    let scratch = Scratch::of(SINGLE);
    scratch.edit_json(CONFIG, |config| {
        config.insert("max_position_embeddings".into(), json!(u32::MAX));
    });
    scratch.load().expect("loads");
}

#[test]
fn heads_must_fit_one_another() {
    for kv_heads in [
        json!(0),
        json!(-2),
        json!(3),
        json!(8),
        json!("2"),
        json!(1u64 << 40),
    ] {
        let text = kv_heads.to_string();
        let parts = [CONFIG, "`num_key_value_heads`", "expected", "found", &text];
        refused("num_key_value_heads", Some(kv_heads), &parts);
    }
    for head_dim in [json!(0), json!(-16), json!(15), json!(1.5), json!("16")] {
        let text = head_dim.to_string();
        refused(
            "head_dim",
            Some(head_dim),
            &[CONFIG, "`head_dim`", "expected", "found", &text],
        );
    }
    refused(
        "head_dim",
        Some(json!(1u32 << 31)),
        &["tensor `", "expected", "found"],
    );
    refused(
        "num_attention_heads",
        Some(json!(6)),
        &[CONFIG, "hidden_size", "expected"],
    );
}

#[test]
fn an_unknown_rope_type_is_refused() {
    for name in ["ntk", "longrope", "mrope", "YARN", ""] {
        for key in ["rope_type", "type"] {
            let rope = json!({key: name, "factor": 2.0});
            let parts = [
                CONFIG,
                "rope_scaling",
                name,
                "linear",
                "dynamic",
                "llama3",
                "yarn",
            ];
            refused("rope_scaling", Some(rope), &parts);
        }
        let rope = json!({"rope_type": name, "rope_theta": 1e4, "factor": 2.0});
        let scratch = Scratch::of(SINGLE);
        scratch.edit_json(CONFIG, |config| {
            config.remove("rope_scaling");
            config.insert("rope_parameters".into(), rope);
        });
        scratch.refused(name, &[CONFIG, "rope_parameters", name, "linear", "yarn"]);
    }
    for value in [json!([]), json!("yarn"), json!(4)] {
        refused(
            "rope_scaling",
            Some(value),
            &[CONFIG, "`rope_scaling`", "expected", "found"],
        );
    }
}

#[test]
fn each_number_of_a_rope_scaling_is_checked() {
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256});
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 256,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    });
    let linear = json!({"rope_type": "linear", "factor": 4.0});
    let dynamic = json!({"rope_type": "dynamic", "factor": 4.0});
    for (whole, field) in [
        (&yarn, "factor"),
        (&yarn, "original_max_position_embeddings"),
        (&yarn, "beta_fast"),
        (&yarn, "attention_factor"),
        (&llama3, "factor"),
        (&llama3, "low_freq_factor"),
        (&llama3, "high_freq_factor"),
        (&llama3, "original_max_position_embeddings"),
        (&linear, "factor"),
        (&dynamic, "factor"),
    ] {
        for value in [json!(0), json!(-4.0), json!("4"), json!([4]), json!(true)] {
            let text = value.to_string();
            let mut rope = whole.clone();
            rope[field] = value;
            let quoted = format!("rope_scaling.{field}`");
            refused(
                "rope_scaling",
                Some(rope),
                &[CONFIG, &quoted, "expected", "found", &text],
            );
        }
    }
    for (whole, field) in [
        (&llama3, "factor"),
        (&llama3, "low_freq_factor"),
        (&linear, "factor"),
        (&dynamic, "factor"),
    ] {
        let mut rope = whole.clone();
        rope.as_object_mut().expect("an object").remove(field);
        let quoted = format!("rope_scaling.{field}`");
        refused(
            "rope_scaling",
            Some(rope),
            &[CONFIG, &quoted, "expected", "found nothing"],
        );
    }
    for theta in [json!(0), json!(-1e4), json!("10000")] {
        refused(
            "rope_theta",
            Some(theta),
            &[CONFIG, "rope_theta`", "expected", "found"],
        );
    }
}

#[test]
fn what_is_not_implemented_is_refused_and_not_ignored() {
    refused(
        "hidden_act",
        Some(json!("gelu")),
        &[CONFIG, "`hidden_act`", "gelu", "silu"],
    );
    let quantization = json!({"quant_method": "gptq", "bits": 4});
    refused(
        "quantization_config",
        Some(quantization),
        &[CONFIG, "`quantization_config`", "gptq"],
    );
    for value in [json!("int8"), json!(16)] {
        refused("torch_dtype", Some(value), &[CONFIG, "`torch_dtype`"]);
    }
    for value in [json!(0), json!(-1e-5), json!("tiny")] {
        refused(
            "rms_norm_eps",
            Some(value),
            &[CONFIG, "`rms_norm_eps`", "expected", "found"],
        );
    }
    for value in [json!("yes"), json!(1)] {
        refused(
            "tie_word_embeddings",
            Some(value),
            &[CONFIG, "`tie_word_embeddings`", "expected"],
        );
    }
    // The checkpoint has no bias: a config that promises one is not a matter of taste.
    refused(
        "attention_bias",
        Some(json!(true)),
        &["tensor `model.layers.0.self_attn."],
    );
    refused(
        "mlp_bias",
        Some(json!(true)),
        &["tensor `model.layers.0.mlp."],
    );
}
