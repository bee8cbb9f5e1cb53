//! Incremental detokenization against decoding the whole, for random tokens.

mod common;

use std::sync::Arc;

use common::{byte_chars, byte_tokenizer_model};
use engine::detokenizer::Detokenizer;
use engine::tokenizer::Tokenizer;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::json;
use tokenizers::Tokenizer as Inner;

fn tokenizer(inner: Inner) -> Arc<Tokenizer> {
    Arc::new(Tokenizer::new(inner, Default::default()).unwrap())
}

/// The pieces, put together.
fn stream(tokenizer: &Arc<Tokenizer>, prompt: &[u32], ids: &[u32], skip: bool) -> Vec<String> {
    let mut detokenizer = Detokenizer::new(tokenizer.clone(), prompt, skip);
    let mut pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(*id)).collect();
    pieces.push(detokenizer.flush());
    assert_eq!(detokenizer.flush(), "", "a flush leaves nothing");
    pieces
}

/// Words of a byte-level vocabulary: single bytes, parts of characters, whole words.
fn byte_level() -> Inner {
    let chars = byte_chars();
    let text = |bytes: &[u8]| bytes.iter().map(|b| chars[*b as usize]).collect::<String>();
    let mut json: serde_json::Value =
        serde_json::from_str(&byte_tokenizer_model().to_string(false).unwrap()).unwrap();
    let longer: [&[u8]; 8] = [
        b" the",
        b"ing",
        "漢".as_bytes(),
        &"🙂".as_bytes()[..2],
        &"🙂".as_bytes()[2..],
        &[b'a', 0xE6],
        &[0xBC, 0xA2, b'!'],
        "\u{FFFD}".as_bytes(),
    ];
    for (at, bytes) in longer.iter().enumerate() {
        json["model"]["vocab"][text(bytes)] = json!(256 + at);
    }
    // An added token is plain text, not byte characters.
    let added = json["added_tokens"].as_array_mut().unwrap();
    added[0]["id"] = json!(264);
    let mut plain = added[0].clone();
    plain["id"] = json!(265);
    plain["content"] = json!("<é日>");
    plain["special"] = json!(false);
    added.push(plain);
    Inner::from_bytes(json.to_string()).unwrap()
}

/// A vocabulary of the sentencepiece kind: `▁` for spaces, bytes as `<0xNN>`.
fn sentencepiece(decoder: serde_json::Value) -> Inner {
    let mut vocab = serde_json::Map::new();
    for byte in 0..=255 {
        vocab.insert(format!("<0x{byte:02X}>"), json!(byte));
    }
    for token in ["<s>", "▁the", "▁", "▁▁", "ing", "漢", "é", ".", "a▁b"] {
        vocab.insert(token.to_string(), json!(vocab.len()));
    }
    let json = json!({
        "version": "1.0", "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "added_tokens": [{"id": 256, "content": "<s>", "single_word": false, "lstrip": false,
                          "rstrip": false, "normalized": false, "special": true}],
        "decoder": decoder,
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true}
    });
    Inner::from_bytes(json.to_string()).unwrap()
}

fn llama_decoder() -> serde_json::Value {
    json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})
}

fn metaspace() -> serde_json::Value {
    json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true})
}

fn wordpiece() -> Inner {
    let words = ["[UNK]", "play", "##ing", "##ed", "the", ".", "é", "##漢"];
    let vocab: serde_json::Map<_, _> = words
        .iter()
        .enumerate()
        .map(|(id, w)| (w.to_string(), json!(id)))
        .collect();
    let json = json!({
        "version": "1.0", "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "added_tokens": [],
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": false},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocab}
    });
    Inner::from_bytes(json.to_string()).unwrap()
}

#[test]
fn pieces_of_byte_level_tokens_make_up_the_whole_broken_or_not() {
    let tokenizer = tokenizer(byte_level());
    let mut rng = StdRng::seed_from_u64(1);
    let mut broken = 0;
    for round in 0..4000 {
        let skip = rng.random();
        let whole_chars = round % 2 == 0;
        let mut ids: Vec<u32> = Vec::new();
        for _ in 0..rng.random_range(0..40) {
            if whole_chars && rng.random() {
                let text = ["é", "漢", "🙂", "a"][rng.random_range(0..4)];
                ids.extend(text.bytes().map(u32::from));
            } else {
                // 266 and more have no token.
                ids.push(rng.random_range(0..270));
            }
        }
        let pieces = stream(&tokenizer, &[], &ids, skip);
        let whole = tokenizer.decode(&ids, skip).unwrap();
        assert_eq!(pieces.concat(), whole, "round {round}: {ids:?}");
        broken += usize::from(whole.contains('\u{FFFD}'));
    }
    assert!((500..3900).contains(&broken), "{broken} broken texts");
}

#[test]
fn text_is_shown_as_soon_as_a_character_is_complete() {
    let tokenizer = tokenizer(byte_level());
    let ids: Vec<u32> = "a漢🙂b".bytes().map(u32::from).collect();
    let pieces = stream(&tokenizer, &[], &ids, true);
    assert_eq!(pieces, ["a", "", "", "漢", "", "", "", "🙂", "b", ""]);
}

#[test]
fn sentencepiece_texts_make_up_the_whole() {
    for decoder in [llama_decoder(), metaspace()] {
        let tokenizer = tokenizer(sentencepiece(decoder.clone()));
        let fallback = decoder["type"] == "Sequence";
        let mut rng = StdRng::seed_from_u64(2);
        for round in 0..4000 {
            let mut ids: Vec<u32> = Vec::new();
            for _ in 0..rng.random_range(0..30) {
                if fallback && rng.random_range(0..3) == 0 {
                    let text = ["é", "漢", "🙂", "a"][rng.random_range(0..4)];
                    ids.extend(text.bytes().map(u32::from));
                } else {
                    ids.push(rng.random_range(257..266));
                }
            }
            let skip = rng.random();
            let pieces = stream(&tokenizer, &[], &ids, skip);
            let whole = tokenizer.decode(&ids, skip).unwrap();
            assert_eq!(pieces.concat(), whole, "round {round}: {ids:?} {decoder}");
        }
    }
}

#[test]
fn broken_fallback_bytes_show_one_by_one_and_spoil_nothing_around() {
    let tokenizer = tokenizer(sentencepiece(llama_decoder()));
    let mut rng = StdRng::seed_from_u64(3);
    for _ in 0..4000 {
        let bytes: Vec<u8> = (0..rng.random_range(0..12))
            .map(|_| [b'a', 0xE6, 0xBC, 0xA2, 0xFF, 0xF0][rng.random_range(0..6)])
            .collect();
        let ids: Vec<u32> = bytes.iter().map(|b| u32::from(*b)).collect();
        let pieces = stream(&tokenizer, &[], &ids, true);
        assert_eq!(pieces.concat(), String::from_utf8_lossy(&bytes));
    }
}

#[test]
fn the_first_piece_keeps_its_space_behind_a_prompt() {
    for decoder in [llama_decoder(), metaspace()] {
        let tokenizer = tokenizer(sentencepiece(decoder));
        let the = tokenizer.token_to_id("▁the").unwrap();
        let ing = tokenizer.token_to_id("ing").unwrap();
        assert_eq!(
            stream(&tokenizer, &[], &[the, ing], true).concat(),
            "theing"
        );
        assert_eq!(
            stream(&tokenizer, &[ing], &[the, ing], true).concat(),
            " theing"
        );
    }
}

#[test]
fn other_decoders_go_through_the_window() {
    let tokenizer = tokenizer(wordpiece());
    let mut rng = StdRng::seed_from_u64(4);
    for _ in 0..1000 {
        let ids: Vec<u32> = (0..rng.random_range(0..30))
            .map(|_| rng.random_range(0..9))
            .collect();
        let pieces = stream(&tokenizer, &[], &ids, false);
        assert_eq!(
            pieces.concat(),
            tokenizer.decode(&ids, false).unwrap(),
            "{ids:?}"
        );
    }
    let prompt = [1];
    assert_eq!(
        stream(&tokenizer, &prompt, &[2, 4, 5], false),
        ["ing", " the", " .", ""]
    );
}

#[test]
fn a_token_alone_is_its_bytes() {
    let tokenizer = tokenizer(byte_level());
    assert_eq!(tokenizer.token_bytes(0xE6), [0xE6]);
    assert_eq!(tokenizer.token_bytes(256), b" the");
    assert_eq!(tokenizer.token_bytes(265), "<é日>".as_bytes());
    assert_eq!(tokenizer.token_bytes(9999), b"");
    assert!(tokenizer.is_special(264) && !tokenizer.is_special(265));
}
