//! `bench throughput`.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use indicatif::ProgressBar;
use rand::{SeedableRng, rngs::StdRng};
use serde_json::json;

use super::{JsonFile, check_lengths, peak_rss_mib, random_prompt, request};
use crate::args::EngineArgs;
use crate::say::say;
use crate::sizes::{Lengths, parse_count};

/// Arguments of `bench throughput`.
#[derive(Args, Debug)]
pub struct ThroughputArgs {
    /// Number of requests.
    #[arg(long, default_value = "1000", value_parser = parse_count)]
    num_prompts: usize,
    /// Tokens of each prompt: a number, or a range such as 100..1024 to draw from uniformly.
    #[arg(long, alias = "input-len", default_value = "1024", value_parser = Lengths::parse)]
    random_input_len: Lengths,
    /// Tokens of each answer: a number or a range.
    #[arg(long, alias = "output-len", default_value = "128", value_parser = Lengths::parse)]
    random_output_len: Lengths,
    /// Prompts are random token ids below this [default: the model's vocabulary]. With `bench serve`'s
    /// sizes and seed they are its prompts.
    #[arg(long, value_parser = parse_count)]
    random_vocab_size: Option<usize>,
    /// Sampling temperature.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    temperature: f32,
    /// Where to write the figures as JSON.
    #[arg(long)]
    output_json: Option<PathBuf>,
    #[command(flatten)]
    pub engine: EngineArgs,
}

pub fn run(args: &ThroughputArgs) -> anyhow::Result<()> {
    let json_file = JsonFile::create(args.output_json.as_deref())?;
    let (mut engine, _) = args.engine.load()?;
    let limits = engine.frontend().limits().clone();
    check_lengths(
        args.random_input_len.max(),
        args.random_output_len.max(),
        &limits,
    )?;
    let vocab_size = args.random_vocab_size.unwrap_or(limits.vocab_size);
    anyhow::ensure!(
        vocab_size <= limits.vocab_size,
        "--random-vocab-size {vocab_size} is more than the model's {}",
        limits.vocab_size
    );
    let mut rng = StdRng::seed_from_u64(args.engine.seed);
    let (mut input, mut output) = (0, 0);
    let requests: Vec<_> = (0..args.num_prompts as u64)
        .map(|at| {
            let (i, o) = (
                args.random_input_len.draw(&mut rng),
                args.random_output_len.draw(&mut rng),
            );
            input += i;
            output += o;
            let prompt = random_prompt(&mut rng, vocab_size, i);
            let seed = args.engine.seed.wrapping_add(at);
            request(prompt, o, args.temperature, seed)
        })
        .collect();

    let bar = ProgressBar::new(args.num_prompts as u64);
    let start = Instant::now();
    let results = engine.generate_with(requests, |_| bar.inc(1));
    let elapsed = start.elapsed().as_secs_f64();
    bar.finish_and_clear();
    results.into_iter().collect::<Result<Vec<_>, _>>()?;

    let requests_per_second = args.num_prompts as f64 / elapsed;
    let total = input + output;
    say(format_args!(
        "Throughput: {requests_per_second:.2} requests/s, {:.2} total tokens/s, {:.2} output tokens/s",
        total as f64 / elapsed,
        output as f64 / elapsed
    ))?;
    say(format_args!("Total num prompt tokens:  {input}"))?;
    say(format_args!("Total num output tokens:  {output}"))?;
    json_file.write(&json!({
        "elapsed_time": elapsed,
        "num_requests": args.num_prompts,
        "total_num_tokens": total,
        "requests_per_second": requests_per_second,
        "tokens_per_second": total as f64 / elapsed,
        "output_tokens_per_second": output as f64 / elapsed,
        "total_input_tokens": input,
        "total_output_tokens": output,
        "num_preemptions": engine.stats().totals.preemptions,
        "peak_rss_mib": peak_rss_mib(),
    }))
}
