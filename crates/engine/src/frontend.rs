//! From a user's request to the core's: tokenize, check, fill in.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use batch_scheduler::{Request, RequestId, StopCriteria};
use paged_kv::Salt;
use sampler::SamplingParams;
use tp_model::SeqParams;

use crate::chat_template::ChatTemplate;
use crate::error::RequestError;
use crate::generation_config::GenerationConfig;
use crate::request::{GenerateRequest, Prompt};
use crate::state::RequestState;
use crate::structured::{Compiler, Grammar, StructuredOutputs};
use crate::tokenizer::Tokenizer;

/// What requests are checked against. Plain figures, so that tests need no model.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Tokens that the model knows.
    pub vocab_size: usize,
    /// Longest sequence, prompt and output together.
    pub max_model_len: usize,
    /// Tokens that the KV cache holds.
    pub cache_tokens: usize,
    /// Sequences that run at once.
    pub max_num_seqs: usize,
    /// Most log-probabilities a token; -1 for no limit.
    pub max_logprobs: i32,
    /// Whether the scheduling policy reads priorities.
    pub priorities: bool,
    /// Seed from which requests without one get theirs.
    pub seed: u64,
}

/// Prepares requests. Shared by all callers; holds nothing that a step needs.
#[derive(Debug)]
pub struct Frontend {
    tokenizer: Option<Arc<Tokenizer>>,
    chat_template: Option<ChatTemplate>,
    generation_config: GenerationConfig,
    limits: Limits,
    /// For structured outputs; `None` without a tokenizer.
    compiler: Option<Compiler>,
    /// Requests so far: names them in the core, and tells their seeds apart.
    counter: AtomicU64,
}

/// A request, ready for the core, and what turns its events into output.
pub(crate) struct Prepared {
    pub(crate) request: Request<Arc<SeqParams>>,
    pub(crate) state: RequestState,
    pub(crate) grammar: Option<Grammar>,
}

impl Frontend {
    /// A front end for a model with these limits. Without a tokenizer it takes token ids only.
    pub fn new(
        tokenizer: Option<Arc<Tokenizer>>,
        chat_template: Option<ChatTemplate>,
        mut generation_config: GenerationConfig,
        limits: Limits,
    ) -> Self {
        if generation_config.eos_token_id.is_empty() {
            let eos = tokenizer.as_ref().and_then(|t| t.eos_token_id());
            generation_config.eos_token_id.extend(eos);
        }
        // A checkpoint may name tokens beyond the model's vocabulary; they can never come up.
        generation_config
            .eos_token_id
            .retain(|id| (*id as usize) < limits.vocab_size);
        let compiler = tokenizer.as_ref().map(|tokenizer| {
            let eos = &generation_config.eos_token_id;
            Compiler::new(tokenizer.clone(), limits.vocab_size, eos)
        });
        Frontend {
            compiler,
            tokenizer,
            chat_template,
            generation_config,
            limits,
            counter: AtomicU64::new(0),
        }
    }

    /// The tokenizer, if the checkpoint has one.
    pub fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        self.tokenizer.as_ref()
    }

    /// The chat template, if the checkpoint has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// What requests are checked against.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// End-of-sequence tokens.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.generation_config.eos_token_id
    }

    /// The parameters of a request that sets none: the checkpoint's `generation_config.json`, and
    /// the sampler's defaults where that is silent.
    pub fn default_sampling_params(&self) -> SamplingParams {
        self.generation_config.sampling_params()
    }

    /// Most tokens that a server should give one request, if the operator set a limit
    /// (`GenerationConfig::max_tokens_limit`).
    pub fn max_tokens_limit(&self) -> Option<u32> {
        self.generation_config.max_tokens_limit
    }

    /// The token ids of a prompt.
    pub fn tokenize(
        &self,
        prompt: &Prompt,
        add_special_tokens: Option<bool>,
    ) -> Result<Vec<u32>, RequestError> {
        let encode = |param, text: &str, special| {
            let tokenizer = self.need_tokenizer(param)?;
            tokenizer
                .encode(text, special)
                .map_err(|error| RequestError::unsupported(param, error))
        };
        match prompt {
            Prompt::TokenIds(ids) => Ok(ids.clone()),
            Prompt::Text(text) => encode("prompt", text, add_special_tokens.unwrap_or(true)),
            Prompt::Chat(chat) => {
                let template = self.chat_template.as_ref().ok_or_else(|| {
                    RequestError::unsupported(
                        "messages",
                        "the model has no chat template; send a plain prompt, or add a \
                         chat_template.jinja to the checkpoint",
                    )
                })?;
                let text = template.render(chat)?;
                encode("messages", &text, add_special_tokens.unwrap_or(false))
            }
        }
    }

    fn need_tokenizer(&self, param: &'static str) -> Result<&Arc<Tokenizer>, RequestError> {
        self.tokenizer.as_ref().ok_or_else(|| {
            RequestError::unsupported(
                param,
                "the checkpoint has no tokenizer.json, so only token-id prompts without stop \
                 strings and bad words can be served",
            )
        })
    }

    /// Checks a request and makes it ready for the core.
    pub(crate) fn prepare(&self, request: GenerateRequest) -> Result<Prepared, RequestError> {
        let GenerateRequest {
            id: name,
            prompt,
            mut params,
            structured,
            priority,
            class,
            cache_salt,
            add_special_tokens,
            arrival,
        } = request;
        params.validate()?;
        if !params.stop.is_empty() {
            self.need_tokenizer("stop")?;
        }
        self.resolve_bad_words(&mut params)?;
        let limits = &self.limits;
        params.validate_for(limits.vocab_size, limits.max_logprobs)?;
        if params.n as usize > limits.max_num_seqs {
            return Err(RequestError::Invalid {
                param: "n",
                expected: format!(
                    "at most max_num_seqs ({}), got {}",
                    limits.max_num_seqs, params.n
                ),
            });
        }
        if priority != 0 && !limits.priorities {
            return Err(RequestError::unsupported(
                "priority",
                "priorities need the engine to run with scheduling_policy = priority",
            ));
        }
        let salt = cache_salt.as_deref().map_or(Ok(Salt::NONE), salt_of)?;
        let prompt = self.tokenize(&prompt, add_special_tokens)?;
        self.check_prompt(&prompt)?;
        let grammar = match &structured {
            Some(structured) => Some(self.compile(structured, &params, &prompt)?),
            None => None,
        };

        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        let room = limits.max_model_len - prompt.len();
        let max_tokens = params.max_tokens.unwrap_or(u32::MAX);
        let stop = StopCriteria {
            max_tokens: max_tokens.min(u32::try_from(room).unwrap_or(u32::MAX)),
            min_tokens: params
                .min_tokens
                .min(u32::try_from(room).unwrap_or(u32::MAX)),
            stop_token_ids: params.stop_token_ids.clone(),
            eos_token_ids: self.generation_config.eos_token_id.clone(),
            ignore_eos: params.ignore_eos,
        };
        let state = RequestState::new(
            name,
            prompt.clone(),
            &params,
            &stop,
            self.tokenizer.as_ref(),
            arrival,
        );
        let (n, every_position) = (params.n, params.prompt_logprobs.is_some());
        let params = Arc::new(SeqParams {
            seed: params.seed.unwrap_or_else(|| mix(limits.seed, number)),
            eos_token_ids: match params.ignore_eos {
                true => Vec::new(),
                false => self.generation_config.eos_token_id.clone(),
            },
            sampling: Arc::new(params),
        });
        let mut request = Request::new(number, prompt, stop, params);
        request.id = RequestId(number);
        request.n = n;
        request.priority = priority;
        request.class = class;
        request.salt = salt;
        request.use_prefix_cache = !every_position;
        request.lockstep = grammar.is_some();
        Ok(Prepared {
            request,
            state,
            grammar,
        })
    }

    fn compile(
        &self,
        structured: &StructuredOutputs,
        params: &SamplingParams,
        prompt: &[u32],
    ) -> Result<Grammar, RequestError> {
        let compiler = self.compiler.as_ref().ok_or_else(|| {
            RequestError::unsupported(
                structured.param,
                "the checkpoint has no tokenizer.json, so it is not known what tokens stand for",
            )
        })?;
        let (ignore_eos, min_tokens) = (params.ignore_eos, params.min_tokens);
        let mut grammar = compiler.compile(structured, ignore_eos, min_tokens)?;
        if let (Some(after), Some(tokenizer)) = (&structured.after, &self.tokenizer) {
            // A template that closes the reasoning itself leaves no more than white space behind.
            let end = &prompt[prompt.len().saturating_sub(after.len() + 8)..];
            let end = tokenizer.decode(end, false).unwrap_or_default();
            if end.trim_end().ends_with(after.as_str()) {
                grammar.begin_at_once();
            }
        }
        Ok(grammar)
    }

    fn check_prompt(&self, prompt: &[u32]) -> Result<(), RequestError> {
        let limits = &self.limits;
        if prompt.is_empty() {
            return Err(RequestError::EmptyPrompt);
        }
        if prompt.len() >= limits.max_model_len {
            return Err(RequestError::PromptTooLong {
                max_model_len: limits.max_model_len,
                prompt_tokens: prompt.len(),
            });
        }
        if prompt.len() > limits.cache_tokens {
            return Err(RequestError::PromptExceedsCache {
                capacity: limits.cache_tokens,
                prompt_tokens: prompt.len(),
            });
        }
        let unknown = |id: &u32| *id as usize >= limits.vocab_size;
        match prompt.iter().position(unknown) {
            Some(position) => Err(RequestError::TokenOutOfRange {
                token: prompt[position],
                position,
                vocab_size: limits.vocab_size,
            }),
            None => Ok(()),
        }
    }

    /// Token sequences of the bad words, each with and without a leading space: a word is another
    /// token at the start of a line than in the middle of a sentence.
    fn resolve_bad_words(&self, params: &mut SamplingParams) -> Result<(), RequestError> {
        if params.bad_words.is_empty() {
            return Ok(());
        }
        let tokenizer = self.need_tokenizer("bad_words")?;
        for word in &params.bad_words {
            let word = word.trim_start();
            let encode = |text: &str| {
                tokenizer
                    .encode(text, false)
                    .map_err(|error| RequestError::unsupported("bad_words", error))
            };
            let plain = encode(word)?;
            let spaced = encode(&format!(" {word}"))?;
            // Tokenizers that split the space off give a longer sequence that bans nothing new.
            let differs = spaced.len() == plain.len() && spaced.first() != plain.first();
            let sequences = [Some(plain), differs.then_some(spaced)];
            let sequences = sequences
                .into_iter()
                .flatten()
                .filter(|ids| !ids.is_empty());
            params.bad_words_token_ids.extend(sequences);
        }
        Ok(())
    }
}

fn salt_of(salt: &str) -> Result<Salt, RequestError> {
    let fits = (1..=128).contains(&salt.chars().count());
    if !fits || salt.contains(['@', '/', '\\', '\0']) {
        return Err(RequestError::Invalid {
            param: "cache_salt",
            expected: "1 to 128 characters without @, /, \\ and NUL".to_string(),
        });
    }
    Ok(Salt::from_bytes(salt.as_bytes()))
}

/// A seed for request `number`: splitmix64, whose outputs for consecutive inputs look unrelated.
fn mix(seed: u64, number: u64) -> u64 {
    let step = 0x9E37_79B9_7F4A_7C15_u64;
    let mut z = seed.wrapping_add(step.wrapping_mul(number.wrapping_add(1)));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
