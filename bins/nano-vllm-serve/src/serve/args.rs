//! The flags of `serve`, named as in vLLM where vLLM has them.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};

use engine::Prompt;

use super::traces::Endpoint;
use crate::args::EngineArgs;
use crate::openai::parts::{Parsers, Reasoning};
use crate::sizes::{parse_count, parse_size};

/// Serves the OpenAI API over HTTP; `/` shows a chat and the live engine. SIGTERM drains: `/ready`
/// turns 503, open requests end, then the process does.
#[derive(Args, Clone, Debug)]
pub struct ServeArgs {
    /// The model; same as --model.
    #[arg(value_name = "MODEL", group = "named")]
    pub model_tag: Option<String>,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub server: ServerArgs,
}

/// How logs look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Pretty,
    /// One JSON object a line.
    Json,
}

/// Formats of tool calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ToolCallParser {
    /// `<tool_call>` and JSON: Qwen, Hermes.
    Hermes,
}

/// Formats of reasoning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReasoningParser {
    /// From `<think>` to `</think>`.
    Qwen3,
    /// To `</think>`; the template has opened it.
    #[value(name = "deepseek_r1")]
    DeepseekR1,
}

/// What is about HTTP and not about the engine.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Server")]
pub struct ServerArgs {
    /// Address to listen on.
    #[arg(long, default_value = "0.0.0.0")]
    pub host: String,
    /// Port to listen on; 0: any that is free.
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Path of a Unix socket to listen on, instead of --host and --port.
    #[arg(long, value_name = "PATH")]
    pub uds: Option<PathBuf>,
    /// YAML file with flags as keys; flags on the command line win.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Key that clients must send as a bearer token, on every route but /health and /ready; may be
    /// given several times.
    #[arg(long, num_args = 1.., env = "VLLM_API_KEY", hide_env_values = true, value_delimiter = ',')]
    pub api_key: Vec<String>,
    /// File with one key a line, each of which may be followed by name=NAME and weight=N: what
    /// metrics call it, and its share when several keys compete.
    #[arg(long)]
    pub api_key_file: Option<PathBuf>,
    /// Certificate chain in PEM: serves HTTPS. SIGHUP reads it and the key again.
    #[arg(long, requires = "ssl_keyfile")]
    pub ssl_certfile: Option<PathBuf>,
    /// Private key in PEM.
    #[arg(long, requires = "ssl_certfile")]
    pub ssl_keyfile: Option<PathBuf>,
    /// Authorities of clients' certificates, in PEM; see --ssl-cert-reqs. SIGHUP reads them again.
    #[arg(long, requires = "ssl_certfile")]
    pub ssl_ca_certs: Option<PathBuf>,
    /// Clients' certificates: 0 none is asked for, 1 one that comes must be of --ssl-ca-certs, 2 there
    /// must be one.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=2))]
    pub ssl_cert_reqs: u8,
    /// Read certificates again whenever their files change, without SIGHUP.
    #[arg(long, requires = "ssl_certfile")]
    pub enable_ssl_refresh: bool,
    /// Origins whose pages may call the API from a browser; * for all. Also a JSON list, as in vLLM.
    #[arg(long, num_args = 1..)]
    pub allowed_origins: Vec<String>,
    /// Most requests that wait for their first step; more get 503. 0: no limit. Unset: 1024, or
    /// four times --max-num-seqs if that is more.
    #[arg(long)]
    pub max_num_queued_reqs: Option<usize>,
    /// Most prompt tokens that wait for their first step; more get 503. 0 or unset: no limit.
    #[arg(long)]
    pub max_num_queued_tokens: Option<usize>,
    /// Seconds until a request is given up, queueing included; 0: never.
    #[arg(long, default_value = "0", value_parser = parse_seconds)]
    pub request_timeout: Duration,
    /// Seconds until a request that no step has touched is given up; 0: never.
    #[arg(long, default_value = "0", value_parser = parse_seconds)]
    pub queue_timeout: Duration,
    /// Seconds that open requests have to end after SIGTERM.
    #[arg(long, default_value = "30", value_parser = parse_seconds)]
    pub shutdown_timeout: Duration,
    /// /health says 503 once work has waited so many seconds without a step that ends; 0: never.
    #[arg(long, default_value = "60", value_parser = parse_seconds)]
    pub watchdog_timeout: Duration,
    /// Seconds that a client has for a request's head, and again for its body.
    #[arg(long, default_value = "30", value_parser = parse_seconds)]
    pub client_timeout: Duration,
    /// Seconds that a client may take no byte of an answer; 0: for ever.
    #[arg(long, default_value = "60", value_parser = parse_seconds)]
    pub write_timeout: Duration,
    /// Most connections at once; more wait to be accepted.
    #[arg(long, default_value_t = 16384)]
    pub max_connections: usize,
    /// Most bytes of a request's body (accepts 16M, ...).
    #[arg(long, default_value = "16M", value_parser = parse_size)]
    pub max_body_size: u64,
    /// Most tokens that one request may ask for: prompts times n times max_tokens (accepts 16M, ...);
    /// more get 400. 0: no limit.
    #[arg(long, default_value = "16M", value_parser = parse_size)]
    pub max_tokens_per_request: u64,
    /// Most bytes of a request's head.
    #[arg(long, default_value = "64K", value_parser = parse_size)]
    pub h11_max_incomplete_event_size: u64,
    /// Most header fields of a request.
    #[arg(long, default_value_t = 100)]
    pub h11_max_header_count: usize,
    /// Let models call tools; needs --tool-call-parser.
    #[arg(long, requires = "tool_call_parser")]
    pub enable_auto_tool_choice: bool,
    /// How the model writes tool calls.
    #[arg(long, value_enum, requires = "enable_auto_tool_choice")]
    pub tool_call_parser: Option<ToolCallParser>,
    /// How the model writes reasoning; it is then a field of its own.
    #[arg(long, value_enum)]
    pub reasoning_parser: Option<ReasoningParser>,
    /// Tell in usages how many tokens of the prompt the prefix cache had.
    #[arg(long)]
    pub enable_prompt_tokens_details: bool,
    /// Tokens of a streamed chunk. The first token comes at once, whatever this is.
    #[arg(long, default_value = "1", value_parser = parse_count)]
    pub stream_interval: usize,
    /// End every stream with its usage, whether the client asks for it or not.
    #[arg(long)]
    pub enable_force_include_usage: bool,
    /// Write tokens in log-probabilities as `token_id:N` also where a request does not ask for it.
    #[arg(long)]
    pub return_tokens_as_token_ids: bool,
    /// Defaults of chat_template_kwargs, as a JSON object; a request's own win.
    #[arg(long, value_name = "JSON", value_parser = parse_object)]
    pub default_chat_template_kwargs: Option<JsonObject>,
    /// Seconds between comments that keep a silent stream alive; 0: none.
    #[arg(long, default_value = "0", value_parser = parse_seconds)]
    pub sse_keep_alive_interval: Duration,
    /// Put each request's id into its answer's X-Request-Id.
    #[arg(long)]
    pub enable_request_id_headers: bool,
    /// Log every request, with its id.
    #[arg(long)]
    pub enable_log_requests: bool,
    /// OpenTelemetry collector that gets a span of every prompt, over OTLP/HTTP in JSON:
    /// `http://HOST[:4318][/v1/traces]`.
    #[arg(long, value_name = "URL")]
    pub otlp_traces_endpoint: Option<Endpoint>,
    /// pretty or json.
    #[arg(long, value_enum, default_value = "pretty")]
    pub log_format: LogFormat,
    /// Threads that speak HTTP.
    #[arg(long, default_value_t = 2)]
    pub http_threads: usize,
    /// Instead of a model: tokens at once, which cost nothing. To measure the server itself.
    #[arg(long, hide = true, conflicts_with_all = ["model", "model_tag"])]
    pub fake_runner: bool,
    /// With --fake-runner: milliseconds that a step takes.
    #[arg(long, hide = true, default_value = "0", value_parser = parse_millis)]
    pub fake_step_ms: Duration,
    /// With --fake-runner: panic in this step, to test what clients see of it.
    #[arg(long, hide = true, requires = "fake_runner")]
    pub fake_runner_panic_at_step: Option<u64>,
    /// With --fake-runner: each step takes a byte from standard input before it begins, so that a
    /// test can let one after the other pass; the input's end lets all of them pass.
    #[arg(long, hide = true, requires = "fake_runner")]
    pub fake_steps_from_stdin: bool,
}

impl ServerArgs {
    /// Puts flags that may be written in several ways into one, and refuses those that do not fit
    /// together.
    pub fn settle(&mut self) -> anyhow::Result<()> {
        let mut origins = Vec::new();
        for origin in std::mem::take(&mut self.allowed_origins) {
            match origin.starts_with('[') {
                false => origins.push(origin),
                true => origins.extend(
                    serde_json::from_str::<Vec<String>>(&origin)
                        .with_context(|| format!("--allowed-origins {origin}"))?,
                ),
            }
        }
        self.allowed_origins = origins;
        anyhow::ensure!(
            (self.ssl_cert_reqs > 0) == self.ssl_ca_certs.is_some(),
            "--ssl-cert-reqs 1 or 2 and --ssl-ca-certs need each other"
        );
        Ok(())
    }

    /// Gives a chat what --default-chat-template-kwargs has and the request leaves out.
    pub fn complete_template_kwargs(&self, prompt: &mut Prompt) {
        if let (Prompt::Chat(chat), Some(defaults)) = (prompt, &self.default_chat_template_kwargs) {
            for (name, value) in defaults {
                let own = chat.template_kwargs.entry(name.clone());
                own.or_insert_with(|| value.clone());
            }
        }
    }

    /// How chats' answers are split.
    pub fn parsers(&self) -> Parsers {
        Parsers {
            reasoning: self.reasoning_parser.map(|parser| match parser {
                ReasoningParser::Qwen3 => Reasoning::AtTag,
                ReasoningParser::DeepseekR1 => Reasoning::AtOnce,
            }),
            tools: self.tool_call_parser.is_some(),
        }
    }
}

/// A JSON object on the command line.
pub type JsonObject = serde_json::Map<String, serde_json::Value>;

fn parse_object(text: &str) -> Result<JsonObject, String> {
    serde_json::from_str(text).map_err(|error| format!("must be a JSON object: {error}"))
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    parse_duration(text, 1.0)
}

fn parse_millis(text: &str) -> Result<Duration, String> {
    parse_duration(text, 1e-3)
}

/// A century is as good as for ever, and no addition of it to a time overflows.
const MAX_SECONDS: f64 = 3.2e9;

fn parse_duration(text: &str, unit: f64) -> Result<Duration, String> {
    let value: f64 = text.parse().map_err(|_| "must be a number".to_owned())?;
    match (0.0..=MAX_SECONDS).contains(&(value * unit)) {
        true => Ok(Duration::from_secs_f64(value * unit)),
        false => Err("must be between 0 and a century".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        // With what its flags exclude.
        #[command(flatten)]
        all: ServeArgs,
    }

    fn settled(args: &[&str]) -> anyhow::Result<ServerArgs> {
        let all = [&["serve"], args].concat();
        let mut server = Flags::try_parse_from(all)?.all.server;
        server.settle().map(|()| server)
    }

    #[test]
    fn origins_are_words_or_a_json_list() {
        let args = ["--allowed-origins", "http://a", "[\"http://b\", \"*\"]"];
        let origins = settled(&args).unwrap().allowed_origins;
        assert_eq!(origins, ["http://a", "http://b", "*"]);
        assert!(settled(&["--allowed-origins", "[http://a]"]).is_err());
    }

    #[test]
    fn clients_certificates_need_an_authority_and_a_rule() {
        let tls = ["--ssl-certfile", "a", "--ssl-keyfile", "b"];
        let check = |more: &[&str]| settled(&[&tls[..], more].concat());
        assert!(check(&[]).is_ok());
        assert!(check(&["--ssl-ca-certs", "c", "--ssl-cert-reqs", "2"]).is_ok());
        for bad in [
            &["--ssl-ca-certs", "c"][..],
            &["--ssl-cert-reqs", "1"],
            &["--ssl-ca-certs", "c", "--ssl-cert-reqs", "3"],
        ] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
        assert!(settled(&["--enable-ssl-refresh"]).is_err());
    }
}
