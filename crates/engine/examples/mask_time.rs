//! What structured outputs cost the engine: a step of a model that takes no time, with and without
//! constraints, at a vocabulary of the usual size.
//!
//! `cargo run --release -p engine --example mask_time [SEQUENCES]`

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use batch_scheduler::{ModelRunner, Sampled, Scheduler, SchedulerConfig, StepOutput, StepPlan};
use engine::generation_config::GenerationConfig;
use engine::tokenizer::Tokenizer;
use engine::{
    Constraint, Engine, EngineCore, Frontend, GenerateRequest, Limits, SamplingParams,
    StructuredOutputs, TokenLogprobs,
};
use paged_kv::{BlockManager, BlockSize, Config};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Map, Value, json};
use tp_model::SeqParams;

const VOCAB: usize = 128_256;

/// Draws among the allowed tokens, at once; prefers short ones, so that answers are not all words.
struct Immediate {
    rng: StdRng,
    lengths: Vec<usize>,
}

impl ModelRunner for Immediate {
    type Params = Arc<SeqParams>;
    type Extra = TokenLogprobs;
    type Ticket = StepOutput<TokenLogprobs>;
    type Error = Infallible;

    fn launch(&mut self, plan: StepPlan<Self::Params>) -> Result<Self::Ticket, Infallible> {
        let masks: HashMap<u32, Vec<u32>> = plan
            .masks
            .into_iter()
            .map(|m| (m.sample, m.allowed))
            .collect();
        let mut draw = |sample: u32| {
            let Some(mask) = masks.get(&sample) else {
                return 300;
            };
            let allowed = |t: usize| mask[t / 32] >> (t % 32) & 1 == 1;
            let mut best = None;
            // From a place at random: the first few that are allowed.
            let from = self.rng.random_range(0..VOCAB);
            for at in (from..VOCAB).chain(0..from).filter(|t| allowed(*t)).take(8) {
                best = best.max(Some((usize::MAX - self.lengths[at], at)));
            }
            best.map_or(0, |(_, at)| at as u32)
        };
        let samples = (0..plan.samples.len() as u32).map(|sample| Sampled {
            tokens: [draw(sample)].into_iter().collect(),
            extras: Vec::new(),
            error: None,
        });
        Ok(StepOutput {
            step: plan.step,
            samples: samples.collect(),
            prompt_extras: Vec::new(),
        })
    }

    fn collect(&mut self, ticket: Self::Ticket) -> Result<Self::Ticket, Infallible> {
        Ok(ticket)
    }
}

/// 256 bytes, then words: letters with and without a space in front, numbers, punctuation.
fn words() -> Vec<Vec<u8>> {
    let mut rng = StdRng::seed_from_u64(1);
    let mut words: Vec<Vec<u8>> = (0..=255u8).map(|b| vec![b]).collect();
    let mut seen: std::collections::HashSet<Vec<u8>> = words.iter().cloned().collect();
    while words.len() < VOCAB - 1 {
        let letters = match rng.random_range(0..20) {
            0 => "0123456789".as_bytes(),
            1 => "\"{}[]:,. \n\\/-_()<>=;".as_bytes(),
            _ => "eeeetttaaooiinnsshhrrddllccuummwwffggyyppbbvvkkjxqz".as_bytes(),
        };
        let len = 1 + rng.random_range(0..5) + rng.random_range(0..5);
        let mut word: Vec<u8> = if rng.random() { vec![b' '] } else { Vec::new() };
        word.extend((0..len).map(|_| letters[rng.random_range(0..letters.len())]));
        if rng.random_ratio(1, 6) && word.len() > 1 {
            word[1] = word[1].to_ascii_uppercase();
        }
        if seen.insert(word.clone()) {
            words.push(word);
        }
    }
    words
}

/// The characters that stand for bytes in byte-level vocabularies, as GPT-2 defines them.
fn byte_chars() -> Vec<char> {
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || b >= 174;
    let mut next = 255;
    let mut code = |b: u32| match printable(b) {
        true => b,
        false => {
            next += 1;
            next
        }
    };
    (0..256).map(|b| char::from_u32(code(b)).unwrap()).collect()
}

fn tokenizer(words: &[Vec<u8>]) -> Tokenizer {
    let chars = byte_chars();
    let vocab: Map<String, Value> = (0..)
        .zip(words)
        .map(|(id, word)| {
            let text: String = word.iter().map(|b| chars[usize::from(*b)]).collect();
            (text, json!(id as u32))
        })
        .collect();
    let level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false
    });
    let json = json!({
        "version": "1.0",
        "added_tokens": [{"id": VOCAB - 1, "content": "<eos>", "single_word": false, "lstrip": false,
                          "rstrip": false, "normalized": false, "special": true}],
        "normalizer": null, "pre_tokenizer": level, "post_processor": null, "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []}
    });
    let inner = tokenizers::Tokenizer::from_bytes(json.to_string()).unwrap();
    let named = BTreeMap::from([("eos_token".to_owned(), "<eos>".to_owned())]);
    Tokenizer::new(inner, named).unwrap()
}

fn engine(tokenizer: Arc<Tokenizer>, lengths: Vec<usize>, seqs: usize) -> Engine<Immediate> {
    let limits = Limits {
        vocab_size: VOCAB,
        max_model_len: 4096,
        cache_tokens: 1 << 20,
        max_num_seqs: seqs,
        max_logprobs: 20,
        priorities: false,
        seed: 0,
    };
    let config = SchedulerConfig {
        max_num_seqs: seqs,
        max_num_batched_tokens: 8192.max(seqs),
        max_model_len: 4096,
        max_steps_in_flight: 1,
        ..SchedulerConfig::default()
    };
    let kv = Config::new((1 << 16) + 1, BlockSize::new(16).unwrap());
    let scheduler = Scheduler::new(config, BlockManager::new(kv).unwrap()).unwrap();
    let runner = Immediate {
        rng: StdRng::seed_from_u64(2),
        lengths,
    };
    let generation = GenerationConfig {
        eos_token_id: vec![VOCAB as u32 - 1],
        ..GenerationConfig::default()
    };
    let frontend = Frontend::new(Some(tokenizer), None, generation, limits);
    Engine::new(EngineCore::new(scheduler, runner), Arc::new(frontend))
}

fn cases() -> Vec<(&'static str, Option<Constraint>)> {
    let person = json!({
        "type": "object", "required": ["name", "age", "email", "friends"], "additionalProperties": false,
        "properties": {
            "name": {"type": "string", "maxLength": 60},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "email": {"type": "string", "pattern": "^[a-z0-9.]{1,20}@[a-z]{2,12}\\.(com|org)$"},
            "friends": {"type": "array", "minItems": 2, "maxItems": 9, "items": {"type": "object",
                "properties": {"name": {"type": "string"}, "since": {"type": "integer"}},
                "required": ["name", "since"], "additionalProperties": false}},
        },
    });
    let grammar = "start: expr\nexpr: term ((\"+\" | \"-\") term)*\nterm: atom ((\"*\" | \"/\") atom)*\n\
                   atom: NUMBER | NAME | \"(\" expr \")\"\nNUMBER: /[0-9]+(\\.[0-9]+)?/\nNAME: /[a-z]+/\n";
    vec![
        ("none", None),
        ("json schema", Some(Constraint::Json(person))),
        ("json object", Some(Constraint::JsonObject)),
        (
            "regex [a-zA-Z ]*",
            Some(Constraint::Regex("[a-zA-Z ]*".to_owned())),
        ),
        (
            "choice of 100",
            Some(Constraint::Choice(
                (0..100).map(|n| format!("option {n}")).collect(),
            )),
        ),
        ("grammar", Some(Constraint::Grammar(grammar.to_owned()))),
    ]
}

fn main() {
    let seqs: usize = std::env::args()
        .nth(1)
        .map_or(1, |n| n.parse().expect("a number"));
    let words = words();
    let mut lengths: Vec<usize> = words.iter().map(Vec::len).collect();
    lengths.push(1);
    let tokenizer = Arc::new(tokenizer(&words));
    let mut engine = engine(tokenizer, lengths, seqs);
    println!("{VOCAB} tokens, {seqs} sequences");
    for (name, constraint) in cases() {
        let mut steps: Vec<Duration> = Vec::new();
        let (mut first, mut again, mut tokens) = (Duration::ZERO, Duration::ZERO, 0);
        for round in 0..12 {
            let begin = Instant::now();
            for at in 0..seqs {
                let params = SamplingParams {
                    max_tokens: Some(300),
                    ignore_eos: constraint.is_some() && name.starts_with("regex"),
                    ..SamplingParams::default()
                };
                let mut request = GenerateRequest::new(at.to_string(), vec![5, 6, 7], params);
                request.structured = constraint.clone().map(StructuredOutputs::new);
                engine.add_request(request).unwrap();
            }
            match round {
                0 => first = begin.elapsed(),
                _ => again = begin.elapsed() / seqs as u32,
            }
            while engine.has_work() {
                let begin = Instant::now();
                let step = engine.step();
                let took = begin.elapsed();
                for (_, output) in &step.finished {
                    output.as_ref().unwrap();
                }
                tokens += step.deltas.len();
                steps.push(took);
            }
        }
        steps.sort();
        let total: Duration = steps.iter().sum();
        println!(
            "{name:18} first request {first:9.1?}, the next {again:9.1?}; step p50 {:8.1?}, p99 {:8.1?}, \
             most {:8.1?}; {:8.1?} a token of {tokens}",
            steps[steps.len() / 2],
            steps[steps.len() * 99 / 100],
            steps[steps.len() - 1],
            total / tokens.max(1) as u32,
        );
    }
}
