//! Random things to ask for, each with an oracle of its own: schemas, regular expressions, choices, a grammar.

use engine::{Constraint, StructuredOutputs};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use serde_json::{Value, json};

/// A schema whose values end soon, if they are made at random.
fn schema(rng: &mut StdRng, depth: usize) -> Value {
    let most = if depth == 0 { 7 } else { 10 };
    match rng.random_range(0..most) {
        0 => json!({"type": "boolean"}),
        1 => json!({"type": "null"}),
        2 => {
            let low = rng.random_range(-300..300);
            let high = low + rng.random_range(0..500);
            json!({"type": "integer", "minimum": low, "maximum": high})
        }
        3 => json!({"type": "string", "maxLength": rng.random_range(0..6)}),
        4 => {
            let patterns = [
                "^[a-c]{1,3}$",
                "^(yes|no)$",
                "^\\d{2}-x?$",
                "^[^\"\\\\]{2}$",
            ];
            json!({"type": "string", "pattern": patterns.choose(rng).unwrap()})
        }
        5 => json!({"enum": [1, "two", null, [true, "é"], {"k": -0.5}, "\"\\\n"]}),
        6 => json!({"const": ["x", 3.25, {"y": []}]}),
        7 => {
            let min = rng.random_range(0..3);
            let max = min + rng.random_range(0..3);
            json!({"type": "array", "items": schema(rng, depth - 1), "minItems": min, "maxItems": max})
        }
        8 => {
            let options: Vec<Value> = (0..3).map(|_| schema(rng, depth - 1)).collect();
            json!({"anyOf": options})
        }
        _ => {
            let names = ["a", "b", "ä ö", "\"q\"", "long_name", "$ref"];
            let count = rng.random_range(0..names.len());
            let mut names = names;
            names.shuffle(rng);
            let properties: serde_json::Map<String, Value> = names[..count]
                .iter()
                .map(|name| ((*name).to_owned(), schema(rng, depth - 1)))
                .collect();
            let required: Vec<&str> = names[..count]
                .iter()
                .filter(|_| rng.random())
                .copied()
                .collect();
            json!({
                "type": "object", "properties": properties, "required": required,
                "additionalProperties": false,
            })
        }
    }
}

/// A regular expression for at most some twenty characters.
fn regex(rng: &mut StdRng, depth: usize) -> String {
    let most = if depth == 0 { 5 } else { 9 };
    match rng.random_range(0..most) {
        0 => "a".to_owned(),
        1 => "[b-dé€]".to_owned(),
        2 => r"\d".to_owned(),
        3 => r"\.".to_owned(),
        4 => "😀".to_owned(),
        5 | 6 => regex(rng, depth - 1) + &regex(rng, depth - 1),
        7 => format!("(?:{}|{})", regex(rng, depth - 1), regex(rng, depth - 1)),
        _ => {
            let repeat = ["?", "{0,2}", "{2}", "{1,3}"].choose(rng).unwrap();
            format!("(?:{}){repeat}", regex(rng, depth - 1))
        }
    }
}

/// Whether a text is what was asked for.
pub type Check = Box<dyn Fn(&str) -> bool>;

/// Something to ask for, and whether a text is it.
pub fn constraint(rng: &mut StdRng) -> (StructuredOutputs, Check) {
    match rng.random_range(0..7) {
        0 => {
            let regex = regex(rng, 3);
            let oracle = format!("^(?:{})$", regex.replace(r"\d", "[0-9]"));
            let oracle = regex::Regex::new(&oracle).unwrap();
            let wanted = StructuredOutputs::new(Constraint::Regex(regex));
            (wanted, Box::new(move |text| oracle.is_match(text)))
        }
        1 => {
            let parts = ["a", "ab", "\"", "\\", "\n", "é😀", " ", "/x/", "|"];
            let choice = |rng: &mut StdRng| -> String {
                let count = rng.random_range(1..5);
                (0..count).map(|_| *parts.choose(rng).unwrap()).collect()
            };
            let choices: Vec<String> = (0..5).map(|_| choice(rng)).collect();
            let wanted = StructuredOutputs::new(Constraint::Choice(choices.clone()));
            (
                wanted,
                Box::new(move |text| choices.iter().any(|c| c == text)),
            )
        }
        2 => {
            let lark =
                "start: list\nlist: \"(\" (item (\",\" item)*)? \")\"\nitem: /[a-z]/ | list\n";
            let wanted = StructuredOutputs::new(Constraint::Grammar(lark.to_owned()));
            (
                wanted,
                Box::new(|text| list(text.as_bytes()) == Some(text.len())),
            )
        }
        3 => {
            let wanted = StructuredOutputs {
                disable_any_whitespace: true,
                ..StructuredOutputs::new(Constraint::JsonObject)
            };
            let is_object = |text: &str| match serde_json::from_str::<Value>(text) {
                Ok(value) => value.is_object(),
                // It is JSON all the same.
                Err(error) => error.to_string().starts_with("number out of range"),
            };
            (wanted, Box::new(is_object))
        }
        _ => {
            let mut schema = schema(rng, 3);
            if rng.random_bool(0.2) {
                schema = json!({
                    "$defs": {"node": schema},
                    "type": "array", "maxItems": 2, "items": {"$ref": "#/$defs/node"},
                });
            }
            let oracle = jsonschema::validator_for(&schema).unwrap();
            let wanted = StructuredOutputs {
                disable_any_whitespace: rng.random(),
                ..StructuredOutputs::new(Constraint::Json(schema))
            };
            let valid = move |text: &str| {
                serde_json::from_str::<Value>(text).is_ok_and(|value| oracle.is_valid(&value))
            };
            (wanted, Box::new(valid))
        }
    }
}

/// Length of the list at the beginning of `text`, if there is one.
fn list(text: &[u8]) -> Option<usize> {
    let mut at = 1;
    if text.first() != Some(&b'(') {
        return None;
    }
    if text.get(at) == Some(&b')') {
        return Some(2);
    }
    loop {
        at += match text.get(at)? {
            b'a'..=b'z' => 1,
            _ => list(&text[at..])?,
        };
        match text.get(at)? {
            b',' => at += 1,
            b')' => return Some(at + 1),
            _ => return None,
        }
    }
}
