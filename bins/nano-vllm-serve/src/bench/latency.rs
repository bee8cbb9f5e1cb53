//! `bench latency`.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use engine::{Engine, Runner};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::json;

use super::{JsonFile, check_lengths, peak_rss_mib, process_age, random_prompt, request};
use crate::args::EngineArgs;
use crate::say::say;
use crate::sizes::parse_count;

/// Arguments of `bench latency`.
#[derive(Args, Debug)]
pub struct LatencyArgs {
    /// Tokens of each prompt.
    #[arg(long, default_value = "32", value_parser = parse_count)]
    input_len: usize,
    /// Tokens of each answer.
    #[arg(long, default_value = "128", value_parser = parse_count)]
    output_len: usize,
    /// Requests at once.
    #[arg(long, default_value = "8", value_parser = parse_count)]
    batch_size: usize,
    /// Runs before the clock counts.
    #[arg(long, default_value_t = 10)]
    num_iters_warmup: usize,
    /// Runs that count.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    num_iters: u32,
    /// Sampling temperature.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    temperature: f32,
    /// Where to write the figures as JSON.
    #[arg(long)]
    output_json: Option<PathBuf>,
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// One run, in seconds.
struct Iteration {
    /// From start to end.
    total: f64,
    /// From start until every request has its first token.
    prefill: f64,
    /// Age of the process at that moment.
    age: Option<f64>,
}

pub fn run(args: &LatencyArgs) -> anyhow::Result<()> {
    let json_file = JsonFile::create(args.output_json.as_deref())?;
    let start = Instant::now();
    let (mut engine, _) = args.engine.load()?;
    let load_time = start.elapsed().as_secs_f64();
    check_lengths(args.input_len, args.output_len, engine.frontend().limits())?;
    let mut rng = StdRng::seed_from_u64(args.engine.seed);
    let iterations = args.num_iters_warmup + args.num_iters as usize;
    let mut runs = (0..iterations)
        .map(|_| iteration(&mut engine, args, &mut rng))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let start_to_first_token = runs[0].age;
    runs.drain(..args.num_iters_warmup);

    let mut latencies: Vec<f64> = runs.iter().map(|r| r.total).collect();
    let average = latencies.iter().sum::<f64>() / latencies.len() as f64;
    latencies.sort_by(f64::total_cmp);
    let percentile =
        |p: f64| latencies[((latencies.len() - 1) as f64 * p / 100.0).round() as usize];
    let percentiles = [10.0, 25.0, 50.0, 75.0, 90.0, 99.0].map(|p| (p, percentile(p)));

    let batch = args.batch_size as f64;
    let prefill = median(runs.iter().map(|r| r.prefill));
    let steps = (args.output_len - 1) as f64;
    let decode =
        (args.output_len > 1).then(|| median(runs.iter().map(|r| (r.total - r.prefill) / steps)));
    say(format_args!("Avg latency: {average:.6} seconds"))?;
    for (p, value) in percentiles {
        say(format_args!("{p}% percentile latency: {value:.6} seconds"))?;
    }
    say(format_args!(
        "Prefill: {:.1} tokens/s",
        batch * args.input_len as f64 / prefill
    ))?;
    if let Some(itl) = decode {
        say(format_args!(
            "Inter-token latency: {:.3} ms ({:.1} tokens/s)",
            itl * 1e3,
            batch / itl
        ))?;
    }
    let by_name: serde_json::Map<_, _> = percentiles
        .iter()
        .map(|(p, v)| (format!("{p}"), json!(v)))
        .collect();
    json_file.write(&json!({
        "avg_latency": average,
        "latencies": runs.iter().map(|r| r.total).collect::<Vec<_>>(),
        "percentiles": by_name,
        "prefill_tokens_per_s": batch * args.input_len as f64 / prefill,
        "inter_token_latency_s": decode,
        "decode_tokens_per_s": decode.map(|itl| batch / itl),
        "load_time_s": load_time,
        "start_to_first_token_s": start_to_first_token,
        "peak_rss_mib": peak_rss_mib(),
    }))
}

/// Runs a batch of fresh random prompts, so that no run finds another's in the prefix cache.
fn iteration<R: Runner>(
    engine: &mut Engine<R>,
    args: &LatencyArgs,
    rng: &mut StdRng,
) -> anyhow::Result<Iteration> {
    let vocab_size = engine.frontend().limits().vocab_size;
    let requests: Vec<_> = (0..args.batch_size)
        .map(|_| {
            let prompt = random_prompt(rng, vocab_size, args.input_len);
            let seed = rng.random();
            request(prompt, args.output_len, args.temperature, seed)
        })
        .collect();
    let start = Instant::now();
    let mut waiting = std::collections::HashSet::new();
    for request in requests {
        waiting.insert(engine.add_request(request)?);
    }
    let (mut prefill, mut age) = (0.0, None);
    while engine.has_work() {
        let step = engine.step();
        for (id, delta) in &step.deltas {
            if !delta.token_ids.is_empty() && waiting.remove(id) && waiting.is_empty() {
                prefill = start.elapsed().as_secs_f64();
                age = process_age();
            }
        }
        for (_, result) in step.finished {
            result?;
        }
    }
    Ok(Iteration {
        total: start.elapsed().as_secs_f64(),
        prefill,
        age,
    })
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
