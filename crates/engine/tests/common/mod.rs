//! A model that needs no weights, and a tokenizer in which a token is a byte.
#![allow(dead_code)]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use batch_scheduler::{
    Fcfs, ModelRunner, Priority, Sampled, Scheduler, SchedulerConfig, SchedulingPolicy, SlotId,
    StepOutput, StepPlan,
};
use engine::chat_template::ChatTemplate;
use engine::generation_config::GenerationConfig;
use engine::tokenizer::Tokenizer;
use engine::{Engine, EngineCore, Frontend, GenerateRequest, Limits, Prompt};
use paged_kv::{BlockManager, BlockSize, Config};
use sampler::{SamplingParams, TokenLogprobs};
use tp_model::SeqParams;

/// Token id of `<eos>`; ids below are bytes.
pub const EOS: u32 = 256;
pub const VOCAB: usize = 257;

/// A token after which the counting model reports an error instead of a token.
pub const POISON: u32 = b'!' as u32;

/// The characters that stand for bytes in byte-level vocabularies, as GPT-2 defines them.
pub fn byte_chars() -> Vec<char> {
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || b >= 174;
    let mut next = 256;
    (0..256u32)
        .map(|b| {
            let code = if printable(b) {
                b
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).unwrap()
        })
        .collect()
}

/// Byte `b` has id `b`; `<eos>` is special.
pub fn byte_tokenizer_model() -> tokenizers::Tokenizer {
    let vocab: serde_json::Map<String, serde_json::Value> = byte_chars()
        .into_iter()
        .enumerate()
        .map(|(b, c)| (c.to_string(), b.into()))
        .collect();
    let level = serde_json::json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false
    });
    let json = serde_json::json!({
        "version": "1.0",
        "added_tokens": [{"id": EOS, "content": "<eos>", "single_word": false, "lstrip": false,
                          "rstrip": false, "normalized": false, "special": true}],
        "normalizer": null, "pre_tokenizer": level, "post_processor": null, "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []}
    });
    tokenizers::Tokenizer::from_bytes(json.to_string()).unwrap()
}

pub fn byte_tokenizer() -> Tokenizer {
    let named = BTreeMap::from([("eos_token".to_string(), "<eos>".to_string())]);
    Tokenizer::new(byte_tokenizer_model(), named).unwrap()
}

/// How the fake model continues.
#[derive(Clone, Copy, PartialEq)]
pub enum Mode {
    /// The last token plus one: `abc` goes on `defg...`.
    Count,
    /// A hash of every token, of the seed and of the sequence's index: any wrong token, seed or
    /// index changes all that follows.
    Hash,
}

#[derive(Debug, thiserror::Error)]
pub enum Lost {
    #[error("the device is lost in step {0}")]
    Device(u64),
    #[error("no memory in step {0}")]
    Memory(u64),
}

struct Slot {
    tokens: Vec<u32>,
    num_prompt: usize,
    index: u32,
    params: Arc<SeqParams>,
    computed: usize,
}

pub struct FakeRunner {
    pub mode: Mode,
    /// Fail in this step.
    pub fail_at: Option<u64>,
    pub panic_at: Option<u64>,
    /// Tokens of the largest step that finds memory.
    pub memory_for: usize,
    /// Each launch takes a permit, if there is such a channel.
    pub permits: Option<Receiver<()>>,
    slots: Vec<Option<Slot>>,
}

impl FakeRunner {
    pub fn new(mode: Mode, max_num_seqs: usize) -> Self {
        FakeRunner {
            mode,
            fail_at: None,
            panic_at: None,
            memory_for: usize::MAX,
            permits: None,
            slots: (0..max_num_seqs).map(|_| None).collect(),
        }
    }

    fn slot(&mut self, slot: SlotId) -> &mut Slot {
        self.slots[slot.0 as usize].as_mut().expect("slot in use")
    }
}

/// With a mask, the hash chooses among the tokens that it allows.
fn next_token(mode: Mode, slot: &Slot, mask: Option<&[u32]>) -> u32 {
    match mode {
        Mode::Count => (slot.tokens.last().unwrap() + 1) % VOCAB as u32,
        Mode::Hash => {
            let mut hash = 0xcbf2_9ce4_8422_2325_u64;
            let seed = match slot.params.sampling.is_greedy() {
                true => 0,
                false => slot.params.seed ^ (u64::from(slot.index) << 32),
            };
            for word in slot.tokens.iter().map(|t| u64::from(*t)).chain([seed]) {
                hash = (hash ^ word).wrapping_mul(0x0100_0000_01b3);
                hash ^= hash >> 29;
            }
            match mask {
                None => (hash % 256) as u32,
                Some(mask) => {
                    let allowed = |t: &u32| mask[*t as usize / 32] >> (t % 32) & 1 == 1;
                    let allowed: Vec<u32> = (0..VOCAB as u32).filter(allowed).collect();
                    allowed[hash as usize % allowed.len()]
                }
            }
        }
    }
}

fn logprobs(token: u32) -> TokenLogprobs {
    TokenLogprobs {
        token,
        logprob: -(token as f32),
        rank: 1,
        top: vec![(token, -(token as f32))],
    }
}

impl ModelRunner for FakeRunner {
    type Params = Arc<SeqParams>;
    type Extra = TokenLogprobs;
    type Ticket = StepOutput<TokenLogprobs>;
    type Error = Lost;

    fn launch(&mut self, plan: StepPlan<Arc<SeqParams>>) -> Result<Self::Ticket, Lost> {
        if let Some(permits) = &self.permits {
            // A closed channel lets everything pass.
            let _ = permits.recv();
        }
        assert_ne!(self.panic_at, Some(plan.step), "told to panic");
        if self.fail_at == Some(plan.step) {
            return Err(Lost::Device(plan.step));
        }
        for slot in &plan.released {
            self.slots[slot.0 as usize] = None;
        }
        for seq in plan.admitted {
            let slot = &mut self.slots[seq.slot.0 as usize];
            assert!(slot.is_none(), "admitted to a slot in use");
            *slot = Some(Slot {
                tokens: seq.tokens,
                num_prompt: seq.num_prompt as usize,
                index: seq.index,
                params: seq.params,
                computed: seq.num_computed as usize,
            });
        }
        let tokens: u32 = plan.rows.iter().map(|row| row.len).sum();
        if tokens as usize > self.memory_for {
            return Err(Lost::Memory(plan.step));
        }
        let mut prompt_extras = Vec::new();
        for row in &plan.rows {
            let slot = self.slot(row.slot);
            assert_eq!(slot.computed, row.start as usize, "no position left out");
            let end = (row.start + row.len) as usize;
            assert!(end <= slot.tokens.len(), "only known tokens are computed");
            if slot.params.sampling.prompt_logprobs.is_some() {
                let first = row.start as usize + 1;
                let last = (end + 1).min(slot.num_prompt);
                let entries = slot.tokens[first.min(last)..last]
                    .iter()
                    .map(|t| logprobs(*t));
                prompt_extras.push((row.slot, first as u32, entries.collect()));
            }
            slot.computed = end;
        }
        let mode = self.mode;
        let masks: HashMap<u32, &[u32]> = plan
            .masks
            .iter()
            .map(|mask| (mask.sample, mask.allowed.as_slice()))
            .collect();
        assert_eq!(masks.len(), plan.masks.len(), "one mask a sample");
        let samples = (0..).zip(&plan.samples).map(|(at, sample)| {
            let slot = self.slot(sample.slot);
            if mode == Mode::Count && slot.tokens.last() == Some(&POISON) {
                // Its next row may be planned already; keep the positions right.
                slot.tokens.push(POISON);
                return Sampled {
                    tokens: Default::default(),
                    extras: Vec::new(),
                    error: Some("the logits are not finite".to_string()),
                };
            }
            let token = next_token(mode, slot, masks.get(&at).copied());
            slot.computed = slot.tokens.len();
            slot.tokens.push(token);
            let wanted = slot.params.sampling.logprobs.is_some();
            Sampled {
                tokens: [token].into_iter().collect(),
                extras: wanted.then(|| logprobs(token)).into_iter().collect(),
                error: None,
            }
        });
        Ok(StepOutput {
            step: plan.step,
            samples: samples.collect(),
            prompt_extras,
        })
    }

    fn is_out_of_memory(&self, error: &Lost) -> bool {
        matches!(error, Lost::Memory(_))
    }

    fn collect(&mut self, ticket: Self::Ticket) -> Result<Self::Ticket, Lost> {
        Ok(ticket)
    }
}

/// Limits of an engine on the fake model.
#[derive(Clone)]
pub struct Setup {
    pub mode: Mode,
    pub block_size: usize,
    pub blocks: usize,
    pub prefix_caching: bool,
    pub priority: bool,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    pub max_model_len: usize,
    pub overlap: bool,
    pub seed: u64,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            mode: Mode::Count,
            block_size: 4,
            blocks: 256,
            prefix_caching: true,
            priority: false,
            max_num_seqs: 8,
            max_num_batched_tokens: 64,
            max_model_len: 200,
            overlap: false,
            seed: 0,
        }
    }
}

impl Setup {
    pub fn runner(&self) -> FakeRunner {
        FakeRunner::new(self.mode, self.max_num_seqs)
    }

    pub fn scheduler(&self) -> Scheduler<BlockManager, Arc<SeqParams>> {
        let config = SchedulerConfig {
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: self.max_num_batched_tokens,
            max_model_len: self.max_model_len,
            max_steps_in_flight: if self.overlap { 2 } else { 1 },
            ..SchedulerConfig::default()
        };
        // Block 0 is not for sequences.
        let kv = Config::new(
            self.blocks + 1,
            BlockSize::new(self.block_size as u32).unwrap(),
        )
        .prefix_caching(self.prefix_caching);
        let policy: Box<dyn SchedulingPolicy> = match self.priority {
            true => Box::new(Priority::default()),
            false => Box::new(Fcfs::default()),
        };
        Scheduler::with_policy(config, BlockManager::new(kv).unwrap(), policy).unwrap()
    }

    pub fn frontend(&self) -> Arc<Frontend> {
        self.frontend_with(Some(Arc::new(byte_tokenizer())), None)
    }

    pub fn frontend_with(
        &self,
        tokenizer: Option<Arc<Tokenizer>>,
        template: Option<ChatTemplate>,
    ) -> Arc<Frontend> {
        let limits = Limits {
            vocab_size: VOCAB,
            max_model_len: self.max_model_len,
            cache_tokens: self.blocks * self.block_size,
            max_num_seqs: self.max_num_seqs,
            max_logprobs: 20,
            priorities: self.priority,
            seed: self.seed,
        };
        let config = GenerationConfig {
            eos_token_id: vec![EOS],
            ..GenerationConfig::default()
        };
        Arc::new(Frontend::new(tokenizer, template, config, limits))
    }

    pub fn core(&self) -> EngineCore<FakeRunner> {
        self.core_with(self.runner())
    }

    pub fn core_with(&self, runner: FakeRunner) -> EngineCore<FakeRunner> {
        EngineCore::new(self.scheduler(), runner)
    }

    pub fn engine(&self) -> Engine<FakeRunner> {
        Engine::new(self.core(), self.frontend())
    }
}

pub fn greedy(max_tokens: u32) -> SamplingParams {
    SamplingParams {
        max_tokens: Some(max_tokens),
        ..SamplingParams::greedy()
    }
}

pub fn request(prompt: impl Into<Prompt>, params: SamplingParams) -> GenerateRequest {
    GenerateRequest::new("r", prompt, params)
}

/// Every block is free or cached, and no sequence is left.
pub fn assert_empty(engine: &Engine<FakeRunner>) {
    let stats = engine.stats();
    assert_eq!(stats.kv_used_blocks, 0, "blocks leaked");
    assert_eq!(
        (stats.running, stats.waiting, stats.steps_in_flight),
        (0, 0, 0)
    );
    assert!(engine.kv_snapshot().sequences.is_empty());
}
