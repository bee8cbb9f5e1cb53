//! `bench serve`: load on a server over HTTP, with vLLM's flags and JSON keys.

mod connection;
mod report;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Map, Value, json};
use tokio::sync::Semaphore;

use super::{JsonFile, random_prompt};
use crate::sizes::{Lengths, parse_count};
use connection::{Outcome, Pool};

/// Arguments of `bench serve`.
#[derive(Args, Debug)]
pub struct ServeBenchArgs {
    /// Where the server is; http only [default: http://HOST:PORT].
    #[arg(long, conflicts_with_all = ["host", "port"])]
    base_url: Option<String>,
    /// Address of the server.
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Port of the server.
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// What the server speaks; one of vLLM's names for it.
    #[arg(long, default_value = "openai", value_parser = ["openai", "vllm"])]
    backend: String,
    /// What prompts are.
    #[arg(long, default_value = "random", value_parser = ["random"])]
    dataset_name: String,
    /// Path that prompts are sent to.
    #[arg(long, default_value = "/v1/completions")]
    endpoint: String,
    /// Model to name in requests; the server's first unless given.
    #[arg(long)]
    model: Option<String>,
    /// Number of requests.
    #[arg(long, default_value = "1000", value_parser = parse_count)]
    num_prompts: usize,
    /// Requests a second; inf: all at once.
    #[arg(long, default_value_t = f64::INFINITY)]
    request_rate: f64,
    /// Most requests at once.
    #[arg(long, value_parser = parse_count)]
    max_concurrency: Option<usize>,
    /// Tokens of each prompt: a number or a range.
    #[arg(long, alias = "input-len", default_value = "1024", value_parser = Lengths::parse)]
    random_input_len: Lengths,
    /// Tokens of each answer: a number or a range.
    #[arg(long, alias = "output-len", default_value = "128", value_parser = Lengths::parse)]
    random_output_len: Lengths,
    /// Prompts are random token ids below this.
    #[arg(long, default_value = "1000", value_parser = parse_count)]
    random_vocab_size: usize,
    /// Answers have their full length (the default).
    #[arg(long, overrides_with = "no_ignore_eos")]
    ignore_eos: bool,
    /// Let answers end at an end-of-sequence token.
    #[arg(long)]
    no_ignore_eos: bool,
    /// Sampling temperature.
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Further fields of every request, as a JSON object.
    #[arg(long)]
    extra_body: Option<String>,
    /// Percentiles to report besides the median, separated by commas.
    #[arg(long, default_value = "99", value_delimiter = ',')]
    metric_percentiles: Vec<f64>,
    /// Key to send.
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Seed of prompts, lengths and arrivals.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Threads that speak HTTP.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Where to write the figures as JSON.
    #[arg(long, alias = "result-filename")]
    output_json: Option<PathBuf>,
}

/// A request, made before the clock starts.
struct Prepared {
    body: String,
    input_len: usize,
}

pub fn run(args: &ServeBenchArgs) -> anyhow::Result<()> {
    anyhow::ensure!(
        args.request_rate > 0.0,
        "--request-rate must be greater than 0"
    );
    let file = JsonFile::create(args.output_json.as_deref())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(args.threads.max(1))
        .enable_all()
        .build()?;
    let (outcomes, elapsed) = runtime.block_on(measure(args))?;
    let figures = report::print(&outcomes, elapsed, &args.metric_percentiles)?;
    file.write(&figures)?;
    let failed = outcomes.iter().filter(|o| o.error.is_some()).count();
    anyhow::ensure!(
        failed == 0,
        "{failed} requests failed: {}",
        report::first_error(&outcomes)
    );
    Ok(())
}

async fn measure(args: &ServeBenchArgs) -> anyhow::Result<(Vec<Outcome>, Duration)> {
    let url = match &args.base_url {
        Some(url) => url.clone(),
        None => format!("http://{}:{}", args.host, args.port),
    };
    let pool = Arc::new(Pool::new(&url, &args.endpoint, args.api_key.as_deref())?);
    let model = match &args.model {
        Some(model) => model.clone(),
        None => pool.first_model().await?,
    };
    let mut rng = StdRng::seed_from_u64(args.seed);
    let prepared = prepare(args, &model, &mut rng)?;
    let places = Arc::new(Semaphore::new(
        args.max_concurrency.unwrap_or(prepared.len()),
    ));
    let outcomes = Arc::new(Mutex::new(Vec::with_capacity(prepared.len())));
    let start = Instant::now();
    let mut arrival = start;
    let mut tasks = Vec::with_capacity(prepared.len());
    for request in prepared {
        if args.request_rate.is_finite() {
            // A Poisson process: the times between arrivals are exponential.
            let draw: f64 = rng.random_range(f64::EPSILON..1.0);
            arrival += Duration::from_secs_f64(-draw.ln() / args.request_rate);
            tokio::time::sleep_until(arrival.into()).await;
        }
        let place = places.clone().acquire_owned().await?;
        let (pool, outcomes) = (pool.clone(), outcomes.clone());
        tasks.push(tokio::spawn(async move {
            let outcome = pool.send(request.body, request.input_len).await;
            drop(place);
            if let Ok(mut all) = outcomes.lock() {
                all.push(outcome);
            }
        }));
    }
    for task in tasks {
        task.await?;
    }
    let elapsed = start.elapsed();
    let outcomes = std::mem::take(&mut *outcomes.lock().expect("no task has panicked"));
    Ok((outcomes, elapsed))
}

fn prepare(args: &ServeBenchArgs, model: &str, rng: &mut StdRng) -> anyhow::Result<Vec<Prepared>> {
    let extra: Map<String, Value> = match &args.extra_body {
        None => Map::new(),
        Some(text) => serde_json::from_str(text).context("--extra-body is no JSON object")?,
    };
    let vocab = args.random_vocab_size;
    anyhow::ensure!(
        u32::try_from(vocab).is_ok(),
        "--random-vocab-size {vocab} is more than token ids can be"
    );
    let one = |_| {
        let input_len = args.random_input_len.draw(rng);
        let output_len = args.random_output_len.draw(rng);
        let ids = random_prompt(rng, vocab, input_len);
        let mut body = json!({
            "model": model,
            "prompt": ids,
            "max_tokens": output_len,
            "temperature": args.temperature,
            "ignore_eos": !args.no_ignore_eos,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        for (name, value) in &extra {
            body[name] = value.clone();
        }
        Prepared {
            body: body.to_string(),
            input_len,
        }
    };
    Ok((0..args.num_prompts).map(one).collect())
}
