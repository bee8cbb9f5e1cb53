//! Broken checkpoints of every kind: each is refused with one line that names the file, the
//! tensor or field where there is one, what was expected and what was found. Nothing panics, and
//! nothing is allocated on the word of a broken file.

mod config;
mod scratch;
mod tensors;

use scratch::{SHARDED, SINGLE, Scratch, header_end};

const FILE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

#[test]
fn unbroken_copies_load() {
    for fixture in [SINGLE, SHARDED] {
        let scratch = Scratch::of(fixture);
        scratch.load().unwrap_or_else(|e| panic!("{fixture}: {e}"));
    }
}

#[test]
fn a_missing_file_is_named() {
    let scratch = Scratch::of(SINGLE);
    scratch.remove("config.json");
    scratch.refused("no config", &["config.json"]);

    let scratch = Scratch::of(SINGLE);
    scratch.remove(FILE);
    scratch.refused("no weights", &[FILE]);

    let scratch = Scratch::of(SHARDED);
    let shard = scratch.shard_of("model.norm.weight");
    scratch.remove(&shard);
    scratch.refused("no shard", &[&shard]);
}

#[test]
fn a_missing_folder_is_named() {
    let scratch = Scratch::of(SINGLE);
    let folder = scratch.path("nothing-here");
    let text = match tp_model::Model::load(&folder, &tp_model::LoadOptions::default()) {
        Ok(_) => panic!("loaded a folder that is not there"),
        Err(e) => e.to_string(),
    };
    assert!(text.contains("nothing-here"), "{text}");
}

#[test]
fn a_truncated_file_is_refused_wherever_it_ends() {
    let scratch = Scratch::of(SINGLE);
    let whole = scratch.read(FILE);
    let data = header_end(&whole);
    let ends = [
        0,
        1,
        7,
        8,
        9,
        data / 2,
        data - 1,
        data,
        data + 1,
        whole.len() / 2,
    ];
    for end in ends.into_iter().chain([whole.len() - 1]) {
        scratch.write(FILE, &whole[..end]);
        scratch.refused(&format!("cut at {end}"), &[FILE, "truncated", "expected"]);
    }

    let scratch = Scratch::of(SHARDED);
    let shard = scratch.shard_of("model.norm.weight");
    let length = scratch.read(&shard).len();
    scratch.truncate(&shard, length - 1);
    scratch.refused("cut shard", &[&shard, "tensor `", "truncated"]);
}

#[test]
fn a_header_length_that_lies_is_refused() {
    let scratch = Scratch::of(SINGLE);
    let whole = scratch.read(FILE);
    let true_length = header_end(&whole) as u64 - 8;
    let lies = [
        0,
        1,
        true_length - 1,
        true_length + 1,
        whole.len() as u64,
        1 << 40,
    ];
    for length in lies
        .into_iter()
        .chain([i64::MAX as u64, u64::MAX - 7, u64::MAX])
    {
        let mut bytes = whole.clone();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        scratch.write(FILE, bytes);
        scratch.refused(&format!("header of {length}"), &[FILE, "header"]);
    }
}

#[test]
fn a_header_that_is_not_a_json_object_is_refused() {
    let scratch = Scratch::of(SINGLE);
    let nested = "[".repeat(100_000);
    for header in [
        "", "{", "not json", "[]", "12", "null", "\"text\"", "{} {}", &nested,
    ] {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend([0; 64]);
        scratch.write(FILE, bytes);
        scratch.refused(&format!("header {header:.20}"), &[FILE, "header", "JSON"]);
    }
    let mut bytes = 4u64.to_le_bytes().to_vec();
    bytes.extend([b'{', 0xff, 0xfe, b'}']);
    scratch.write(FILE, bytes);
    scratch.refused("header is not UTF-8", &[FILE, "header", "JSON"]);
}

#[test]
fn something_else_under_the_name_of_weights_is_refused() {
    let scratch = Scratch::of(SINGLE);
    // A git-lfs pointer, what is left when a clone did not fetch the large files.
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
    scratch.write(FILE, pointer);
    scratch.refused("git-lfs pointer", &[FILE, "not a safetensors file"]);

    scratch.remove(FILE);
    std::fs::create_dir(scratch.path(FILE)).expect("folder");
    scratch.refused("a folder", &[FILE]);
}

#[test]
fn a_broken_index_is_refused() {
    let scratch = Scratch::of(SHARDED);
    let good = scratch.read(INDEX);
    for text in [
        "",
        "{",
        "[]",
        "{}",
        r#"{"weight_map": 3}"#,
        r#"{"weight_map": {"a": 1}}"#,
    ] {
        scratch.write(INDEX, text);
        scratch.refused(&format!("index {text}"), &[INDEX]);
    }
    scratch.write(INDEX, good);

    let shard = scratch.shard_of("model.norm.weight");
    let other = scratch.shard_of("model.embed_tokens.weight");
    assert_ne!(shard, other, "the fixture has at least two shards");

    scratch.map("model.norm.weight", None);
    scratch.refused(
        "unmapped tensor",
        &["tensor `model.norm.weight`", "expected"],
    );

    scratch.map("model.norm.weight", Some(&other));
    scratch.refused(
        "mapped to the wrong shard",
        &[&other, "tensor `model.norm.weight`"],
    );

    scratch.map(
        "model.norm.weight",
        Some("model-00009-of-00003.safetensors"),
    );
    scratch.refused("mapped to no shard", &["model-00009-of-00003.safetensors"]);

    // A shard is a file beside the index; an index does not get to name any file of the machine.
    for outside in [
        "../model.safetensors",
        "/etc/passwd",
        "a/../../b.safetensors",
        "",
        "..",
    ] {
        scratch.map("model.norm.weight", Some(outside));
        scratch.refused(
            &format!("mapped to {outside:?}"),
            &[INDEX, "model.norm.weight"],
        );
    }

    scratch.map("model.norm.weight", Some(&shard));
    scratch.load().expect("good again");
    scratch.map("model.layers.99.mlp.up_proj.weight", Some(&shard));
    scratch.refused(
        "an entry for a tensor that the shard lacks",
        &[&shard, "tensor `model.layers.99.mlp.up_proj.weight`"],
    );
}

impl Scratch {
    /// Sets where the index says a tensor is.
    fn map(&self, tensor: &str, shard: Option<&str>) {
        self.edit_json(INDEX, |index| {
            let map = index["weight_map"].as_object_mut().expect("weight_map");
            match shard {
                Some(shard) => map.insert(tensor.into(), shard.into()),
                None => map.remove(tensor),
            };
        });
    }
}
