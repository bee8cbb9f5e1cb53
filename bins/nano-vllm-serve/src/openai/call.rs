//! From a request body to requests for the engine.

use engine::{Frontend, GenerateRequest, Prompt, StructuredOutputs};
use sampler::SamplingParams;
use serde_json::{Value, json};

use super::chat::take_chat_input;
use super::fields::{read, shorten_text};
use super::forced::Forced;
use super::parts::Parsers;
use super::sampling::take_sampling;
use super::structured::{arguments_of, calls_of, take_structured};
use super::{ApiError, Fields};

/// Most prompts of one completion request (vLLM's `VLLM_MAX_COMPLETION_PROMPTS`).
const MAX_PROMPTS: usize = 1024;

/// Most choices of one request: prompts times `n`.
const MAX_CHOICES: usize = 1024;

/// Behind it a model that reasons begins its answer.
const END_OF_REASONING: &str = "</think>";

/// Who sent the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// A line of a batch file: nothing is streamed, and an unknown field is an error.
    Batch,
    /// An HTTP client: unknown fields are ignored, as in vLLM, and listed in [`Call::ignored`].
    /// Chats' answers are split as the server is told to.
    Http(Parsers),
}

/// How to stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamOptions {
    /// A last chunk with the request's usage.
    pub include_usage: bool,
    /// Usage so far in every chunk.
    pub continuous_usage_stats: bool,
}

/// The two generating endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/completions`
    Completions,
    /// `/v1/chat/completions`
    Chat,
}

impl Endpoint {
    /// The endpoint with this path.
    pub fn from_path(path: &str) -> Result<Self, ApiError> {
        match path {
            "/v1/completions" => Ok(Self::Completions),
            "/v1/chat/completions" => Ok(Self::Chat),
            other => Err(ApiError::not_found(
                Some("url"),
                format!(
                    "url '{other}' is not supported; use /v1/completions or /v1/chat/completions"
                ),
            )),
        }
    }
}

/// The names under which the model is served; the first one stands in answers.
#[derive(Clone, Debug)]
pub struct ModelNames(pub Vec<String>);

impl ModelNames {
    /// The name to answer with: `asked` if the model has it, the first one for none.
    pub fn resolve(&self, asked: Option<String>) -> Result<String, ApiError> {
        match asked {
            None => Ok(self.0[0].clone()),
            Some(name) if name.is_empty() => Ok(self.0[0].clone()),
            Some(name) if self.0.contains(&name) => Ok(name),
            Some(name) => Err(ApiError::not_found(
                Some("model"),
                format!("The model `{}` does not exist.", shorten_text(&name)),
            )),
        }
    }
}

/// A parsed request: what to generate and how to write the answer.
#[derive(Debug)]
pub struct Call {
    /// Where it was sent.
    pub endpoint: Endpoint,
    /// The model's name, for the answer.
    pub model: String,
    /// The request's own id, if it brought one.
    pub request_id: Option<String>,
    /// The prompts; each gets `params.n` choices.
    pub prompts: Vec<Prompt>,
    /// How to sample.
    pub params: SamplingParams,
    /// Completions: put the prompt before the text.
    pub echo: bool,
    /// `max_tokens` was 0 with `echo`: score the prompt, generate nothing.
    pub score_only: bool,
    /// Put token ids into the answer.
    pub return_token_ids: bool,
    /// Write tokens in log-probabilities as `token_id:N`.
    pub tokens_as_ids: bool,
    /// Stream the answer.
    pub stream: Option<StreamOptions>,
    /// How a chat's answer is split.
    pub parsers: Parsers,
    /// Which calls the answer must be, if any.
    pub forced: Option<Forced>,
    /// What the text must look like.
    pub structured: Option<StructuredOutputs>,
    /// Fields that nobody knows.
    pub ignored: Vec<String>,
    priority: i32,
    cache_salt: Option<String>,
    add_special_tokens: Option<bool>,
}

impl Call {
    /// Reads a body. What it leaves out comes from the model's defaults.
    pub fn parse(
        endpoint: Endpoint,
        body: Value,
        frontend: &Frontend,
        names: &ModelNames,
        dialect: Dialect,
    ) -> Result<Self, ApiError> {
        let mut f = Fields::new(body, "the body")?;
        let model = names.resolve(f.take_as("model", "a string")?)?;
        let stream = match dialect {
            Dialect::Batch => {
                f.refuse_unless("stream", &[json!(false)], " here")?;
                f.refuse_unless("stream_options", &[json!({})], " here")?;
                None
            }
            Dialect::Http(_) => take_stream(&mut f)?,
        };
        let mut defaults = frontend.default_sampling_params();
        if endpoint == Endpoint::Chat && defaults.max_tokens == SamplingParams::default().max_tokens
        {
            defaults.max_tokens = None; // a chat fills the context unless told otherwise
        }
        let params = take_sampling(&mut f, &defaults)?;
        if stream.is_some() && params.prompt_logprobs.is_some_and(|count| count != 0) {
            return Err(ApiError::bad_form(
                "prompt_logprobs",
                "prompt_logprobs is not available with stream = true",
            ));
        }
        let mut call = Self {
            endpoint,
            model,
            request_id: f.take_as("request_id", "a string")?,
            prompts: Vec::new(),
            params,
            echo: f.take_bool("echo", false)?,
            score_only: false,
            return_token_ids: f.take_bool("return_token_ids", false)?,
            tokens_as_ids: f.take_bool("return_tokens_as_token_ids", false)?,
            stream,
            parsers: match dialect {
                Dialect::Batch => Parsers::default(),
                Dialect::Http(parsers) => parsers,
            },
            forced: None,
            structured: take_structured(&mut f)?,
            ignored: Vec::new(),
            priority: f.take_as("priority", "an integer")?.unwrap_or(0),
            cache_salt: f.take_as("cache_salt", "a string")?,
            add_special_tokens: f.take_as("add_special_tokens", "true or false")?,
        };
        match endpoint {
            Endpoint::Completions => call.take_completion(&mut f)?,
            Endpoint::Chat => call.take_chat(&mut f, dialect)?,
        }
        if let Some(limit) = frontend.max_tokens_limit() {
            let asked = call.params.max_tokens.unwrap_or(limit);
            call.params.max_tokens = Some(asked.min(limit));
        }
        let choices = call.prompts.len().saturating_mul(call.params.n as usize);
        if choices > MAX_CHOICES {
            return Err(ApiError::bad_value(
                "n",
                format!("prompts times n may be at most {MAX_CHOICES}, got {choices}"),
            ));
        }
        match dialect {
            Dialect::Batch => f.finish()?,
            Dialect::Http(_) => call.ignored = f.unknown(),
        }
        Ok(call)
    }

    fn take_completion(&mut self, f: &mut Fields) -> Result<(), ApiError> {
        self.prompts = take_prompts(f)?;
        self.params.logprobs = f.take_as("logprobs", "an integer of at least -1")?;
        f.refuse_unless("suffix", &[json!("")], "")?;
        if let Some(max) = f.take_as("max_tokens", "an integer of at least 0")? {
            self.params.max_tokens = Some(max);
        }
        if self.params.max_tokens == Some(0) && self.echo {
            self.score_only = true;
            self.params.max_tokens = Some(1);
        }
        if self.echo && self.params.logprobs.is_some() {
            // The prompt's log-probabilities stand before those of the output.
            self.params.prompt_logprobs = self.params.prompt_logprobs.or(self.params.logprobs);
        }
        Ok(())
    }

    fn take_chat(&mut self, f: &mut Fields, dialect: Dialect) -> Result<(), ApiError> {
        if self.echo {
            return Err(ApiError::bad_value(
                "echo",
                "echo = true is not supported for chats",
            ));
        }
        let max: Option<u32> = f.take_as("max_completion_tokens", "a positive integer")?;
        let deprecated: Option<u32> = f.take_as("max_tokens", "a positive integer")?;
        self.params.max_tokens = max.or(deprecated).or(self.params.max_tokens);
        let logprobs = f.take_bool("logprobs", false)?;
        let top: Option<i32> = f.take_as("top_logprobs", "an integer of at least 0")?;
        self.params.logprobs = match (logprobs, top) {
            (true, top) => Some(top.unwrap_or(0)),
            (false, None | Some(0)) => None,
            (false, Some(_)) => {
                return Err(ApiError::bad_form(
                    "top_logprobs",
                    "top_logprobs needs logprobs = true",
                ));
            }
        };
        let tools = self.take_tools(f, dialect)?;
        if let (Some(structured), Some(_)) = (&mut self.structured, self.parsers.reasoning) {
            structured.after = Some(END_OF_REASONING.to_owned());
        }
        f.refuse_unless("include_reasoning", &[json!(true)], "")?;
        self.prompts = vec![Prompt::Chat(take_chat_input(f, tools)?)];
        Ok(())
    }

    /// Tools go into the prompt; calls of them are parsed if the server knows how.
    fn take_tools(
        &mut self,
        f: &mut Fields,
        dialect: Dialect,
    ) -> Result<Option<Vec<Value>>, ApiError> {
        let able = self.parsers.tools;
        self.parsers.tools = false;
        let choice = f.take("tool_choice");
        let parallel = f.take_bool("parallel_tool_calls", true)?;
        let Some(tools) = f.take("tools") else {
            return match choice {
                None => Ok(None),
                Some(choice) if choice == "none" || choice == "auto" => Ok(None),
                Some(_) => Err(ApiError::bad_form("tool_choice", "tool_choice needs tools")),
            };
        };
        let wrong = || {
            ApiError::bad_form(
                "tools",
                "tools must be a list of {\"type\": \"function\", \"function\": {\"name\": …}}, \
                 and not empty",
            )
        };
        let Value::Array(tools) = tools else {
            return Err(wrong());
        };
        let is_tool = |t: &Value| t["type"] == "function" && t["function"]["name"].is_string();
        if tools.is_empty() || !tools.iter().all(is_tool) {
            return Err(wrong());
        }
        match choice {
            Some(choice) if choice == "none" => {}
            Some(choice) if choice != "auto" => self.force(&choice, &tools, parallel)?,
            _ if dialect == Dialect::Batch => {
                return Err(ApiError::bad_value(
                    "tool_choice",
                    "tool_choice = \"auto\" is not supported in batches; `serve` parses tool calls, \
                     and calls that are forced need no parser",
                ));
            }
            _ if able && !parallel => {
                return Err(ApiError::bad_value(
                    "parallel_tool_calls",
                    "parallel_tool_calls = false is not supported",
                ));
            }
            _ if able => self.parsers.tools = true,
            _ => {
                return Err(ApiError::bad_value(
                    "tool_choice",
                    "\"auto\" tool choice requires --enable-auto-tool-choice and \
                     --tool-call-parser to be set",
                ));
            }
        }
        Ok(Some(tools))
    }

    /// Makes the answer a call: of any of `tools`, or of the one that `choice` names.
    fn force(&mut self, choice: &Value, tools: &[Value], parallel: bool) -> Result<(), ApiError> {
        let wrong = |what: &str| {
            let message = format!(
                "tool_choice must be \"none\", \"auto\", \"required\" or {{\"type\": \"function\", \
                 \"function\": {{\"name\": …}}}} of one of the tools{what}"
            );
            ApiError::bad_form("tool_choice", message)
        };
        if let Some(other) = &self.structured {
            let message = format!("a forced call leaves nothing for {} to say", other.param);
            return Err(ApiError::bad_value("tool_choice", message));
        }
        let (forced, structured) = if choice == "required" {
            (Forced::Required, calls_of(tools, parallel)?)
        } else {
            let name = match choice["type"] == "function" {
                true => choice["function"]["name"].as_str(),
                false => None,
            };
            let name = name.ok_or_else(|| wrong(""))?;
            let tool = tools.iter().find(|tool| tool["function"]["name"] == name);
            let tool = tool.ok_or_else(|| wrong("; there is none of this name"))?;
            (Forced::Named(name.to_owned()), arguments_of(tool))
        };
        self.forced = Some(forced);
        self.structured = Some(structured);
        Ok(())
    }

    /// One request for the engine per prompt.
    pub fn requests(&self, id: &str) -> Vec<GenerateRequest> {
        self.prompts
            .iter()
            .map(|prompt| {
                let mut r = GenerateRequest::new(id, prompt.clone(), self.params.clone());
                r.structured = self.structured.clone();
                r.priority = self.priority;
                r.cache_salt = self.cache_salt.clone();
                r.add_special_tokens = self.add_special_tokens;
                r
            })
            .collect()
    }
}

fn take_stream(f: &mut Fields) -> Result<Option<StreamOptions>, ApiError> {
    let stream = f.take_bool("stream", false)?;
    let options = f.take("stream_options").filter(|o| *o != json!({}));
    let Some(options) = options else {
        return Ok(stream.then(StreamOptions::default));
    };
    if !stream {
        let message = "stream_options needs stream = true";
        return Err(ApiError::bad_form("stream_options", message));
    }
    let mut options = Fields::new(options, "stream_options").map_err(|error| ApiError {
        param: Some("stream_options".to_owned()),
        ..error
    })?;
    Ok(Some(StreamOptions {
        include_usage: options.take_bool("include_usage", false)?,
        continuous_usage_stats: options.take_bool("continuous_usage_stats", false)?,
    }))
}

fn take_prompts(f: &mut Fields) -> Result<Vec<Prompt>, ApiError> {
    let error = |what: &str| ApiError::bad_form("prompt", format!("prompt {what}"));
    let value = f.take("prompt").ok_or_else(|| error("is missing"))?;
    let prompts = match value {
        Value::String(text) => vec![Prompt::Text(text)],
        Value::Array(items) if items.is_empty() => return Err(error("is empty")),
        Value::Array(items) if items[0].is_number() => vec![token_ids(Value::Array(items))?],
        Value::Array(items) => items
            .into_iter()
            .map(|item| match item {
                Value::String(text) => Ok(Prompt::Text(text)),
                ids @ Value::Array(_) => token_ids(ids),
                _ => Err(error(
                    "must be a string, a list of token ids, or a list of these",
                )),
            })
            .collect::<Result<_, _>>()?,
        _ => {
            return Err(error(
                "must be a string, a list of token ids, or a list of these",
            ));
        }
    };
    if prompts.len() > MAX_PROMPTS {
        return Err(error(&format!(
            "may hold at most {MAX_PROMPTS} prompts, got {}",
            prompts.len()
        )));
    }
    Ok(prompts)
}

fn token_ids(value: Value) -> Result<Prompt, ApiError> {
    read(value)
        .map(Prompt::TokenIds)
        .map_err(|_| ApiError::bad_form("prompt", "prompt holds a list that is not of token ids"))
}
