//! Tensors that are missing, misshapen, of another dtype, or not where the header says.

use serde_json::{Value, json};

use super::FILE;
use super::scratch::{SHARDED, SINGLE, Scratch};

const PROJ: &str = "model.layers.1.mlp.down_proj.weight";

/// Every tensor of a checkpoint with the shape that its header gives.
fn tensors(scratch: &Scratch) -> Vec<(String, Value)> {
    let mut found = Vec::new();
    scratch.edit_header(FILE, |header| {
        header.remove("__metadata__");
        found.extend(
            header
                .iter()
                .map(|(name, info)| (name.clone(), info["shape"].clone())),
        );
    });
    found
}

#[test]
fn each_tensor_is_missed() {
    let all = tensors(&Scratch::of(SINGLE));
    assert_eq!(all.len(), 3 * 9 + 3);
    for (name, _) in all {
        let scratch = Scratch::of(SINGLE);
        scratch.edit_header(FILE, |header| {
            // Under another name, because tensors must fill the file without a gap.
            let info = header.remove(&name).expect("there");
            header.insert("another".into(), info);
        });
        scratch.refused(
            &name,
            &[FILE, &format!("tensor `{name}`"), "expected", "found"],
        );
    }
}

#[test]
fn each_tensor_must_have_its_shape() {
    for (name, shape) in tensors(&Scratch::of(SINGLE)) {
        let dims: Vec<u64> = serde_json::from_value(shape).expect("a shape");
        // The same bytes in another shape: only the comparison with the config can tell.
        let wrong: Vec<u64> = match dims[..] {
            [n] => vec![n / 2, 2],
            [rows, columns] => vec![columns * 2, rows / 2]
                .into_iter()
                .filter(|_| rows % 2 == 0)
                .collect(),
            _ => panic!("{name}: {dims:?}"),
        };
        let wrong = if wrong.is_empty() {
            vec![dims[1], dims[0]]
        } else {
            wrong
        };
        let scratch = Scratch::of(SINGLE);
        scratch.edit_header(FILE, |header| header[&name]["shape"] = json!(wrong));
        let parts = [
            format!("tensor `{name}`"),
            format!("{dims:?}"),
            format!("{wrong:?}"),
        ];
        scratch.refused(
            &name,
            &[FILE, &parts[0], "expected", &parts[1], "found", &parts[2]],
        );
    }
}

#[test]
fn a_shape_that_contradicts_the_bytes_is_refused() {
    let huge = u64::MAX;
    for shape in [
        json!([63, 112]),
        json!([64]),
        json!([]),
        json!([0, 112]),
        json!([huge, huge]),
    ] {
        let scratch = Scratch::of(SINGLE);
        scratch.edit_header(FILE, |header| header[PROJ]["shape"] = shape.clone());
        scratch.refused(
            &shape.to_string(),
            &[FILE, &format!("tensor `{PROJ}`"), "bytes"],
        );
    }
}

#[test]
fn a_dtype_that_weights_cannot_have_is_refused() {
    // Of the same width as what is stored, and of others; known to the format and unknown.
    for dtype in [
        "I16", "U16", "I32", "F64", "BOOL", "F8_E4M3", "F4", "Q4_K", "",
    ] {
        let scratch = Scratch::of(SINGLE);
        scratch.edit_header(FILE, |header| header[PROJ]["dtype"] = dtype.into());
        let parts = [
            format!("tensor `{PROJ}`"),
            "expected".into(),
            dtype.to_owned(),
        ];
        scratch.refused(dtype, &[FILE, &parts[0], &parts[1], &parts[2]]);
    }
}

#[test]
fn an_entry_that_is_not_one_is_refused() {
    let entries = [
        json!(null),
        json!(7),
        json!({}),
        json!({"dtype": "BF16", "shape": [64, 112]}),
        json!({"dtype": "BF16", "shape": [-64, 112], "data_offsets": [0, 14336]}),
        json!({"dtype": "BF16", "shape": [64.5, 112], "data_offsets": [0, 14336]}),
        json!({"dtype": "BF16", "shape": "64x112", "data_offsets": [0, 14336]}),
        json!({"dtype": 3, "shape": [64, 112], "data_offsets": [0, 14336]}),
        json!({"dtype": "BF16", "shape": [64, 112], "data_offsets": [0]}),
        json!({"dtype": "BF16", "shape": [64, 112], "data_offsets": [-14336, 0]}),
    ];
    for entry in entries {
        let scratch = Scratch::of(SINGLE);
        scratch.edit_header(FILE, |header| header[PROJ] = entry.clone());
        scratch.refused(
            &entry.to_string(),
            &[FILE, &format!("tensor `{PROJ}`"), "expected"],
        );
    }
}

#[test]
fn offsets_must_lie_in_the_file_and_must_not_overlap() {
    let scratch = Scratch::of(SINGLE);
    let mut offsets = (0, 0);
    scratch.edit_header(FILE, |header| {
        offsets = serde_json::from_value(header[PROJ]["data_offsets"].clone()).expect("a pair");
    });
    let (begin, end): (u64, u64) = offsets;
    let size = end - begin;
    let big = 1u64 << 62;
    let wrong = [
        ("backwards", end, begin),
        ("beyond the end", big, big + size),
        ("to the last number", u64::MAX - size, u64::MAX),
        ("over its neighbour", begin + 64, end + 64),
        ("over the neighbour before", begin - 64, end - 64),
    ];
    for (what, begin, end) in wrong {
        let scratch = Scratch::of(SINGLE);
        scratch.edit_header(FILE, |header| {
            header[PROJ]["data_offsets"] = json!([begin, end])
        });
        scratch.refused(what, &[FILE, "tensor `", "expected", "found"]);
    }
}

#[test]
fn two_tensors_on_the_same_bytes_are_refused() {
    let scratch = Scratch::of(SINGLE);
    scratch.edit_header(FILE, |header| {
        header[PROJ] = header["model.layers.0.mlp.down_proj.weight"].clone();
    });
    scratch.refused(
        "same bytes",
        &[FILE, "down_proj.weight", "expected", "found"],
    );
}

#[test]
fn a_tensor_that_the_model_does_not_use_does_no_harm() {
    // Old Llama checkpoints store the rotary frequencies, tied ones a copy of the embedding.
    let scratch = Scratch::of(SINGLE);
    let mut whole = scratch.read(FILE);
    let end = whole.len() - super::header_end(&whole);
    whole.extend([0; 32]);
    scratch.write(FILE, whole);
    scratch.edit_header(FILE, |header| {
        header.insert(
            "model.layers.0.self_attn.rotary_emb.inv_freq".into(),
            json!({"dtype": "F32", "shape": [8], "data_offsets": [end, end + 32]}),
        );
    });
    scratch.load().expect("loads");
}

#[test]
fn a_shard_is_checked_like_a_single_file() {
    let scratch = Scratch::of(SHARDED);
    let name = "model.layers.2.self_attn.q_norm.weight";
    let shard = scratch.shard_of(name);
    scratch.edit_header(&shard, |header| header[name]["shape"] = json!([12, 2]));
    let parts = [
        format!("tensor `{name}`"),
        "[24]".into(),
        "[12, 2]".to_owned(),
    ];
    scratch.refused(
        "q_norm",
        &[&shard, &parts[0], "expected", &parts[1], "found", &parts[2]],
    );
}
