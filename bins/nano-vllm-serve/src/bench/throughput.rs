//! `bench throughput`.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use indicatif::ProgressBar;
use rand::{SeedableRng, rngs::StdRng};
use serde_json::json;

use super::{peak_rss_mib, random_request, write_json};
use crate::args::EngineArgs;
use crate::sizes::Lengths;

/// Arguments of `bench throughput`.
#[derive(Args, Debug)]
pub struct ThroughputArgs {
    /// Number of requests.
    #[arg(long, default_value_t = 1000)]
    num_prompts: usize,
    /// Tokens of each prompt: a number, or a range such as 100..1024 to draw from uniformly.
    #[arg(long, alias = "input-len", default_value = "1024", value_parser = Lengths::parse)]
    random_input_len: Lengths,
    /// Tokens of each answer: a number or a range.
    #[arg(long, alias = "output-len", default_value = "128", value_parser = Lengths::parse)]
    random_output_len: Lengths,
    /// Sampling temperature.
    #[arg(long, default_value_t = 1.0)]
    temperature: f32,
    /// Where to write the figures as JSON.
    #[arg(long)]
    output_json: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArgs,
}

pub fn run(args: &ThroughputArgs) -> anyhow::Result<()> {
    let (mut engine, _) = args.engine.load()?;
    let limits = engine.frontend().limits().clone();
    let longest = args.random_input_len.max() + args.random_output_len.max();
    anyhow::ensure!(
        longest <= limits.max_model_len,
        "prompts and answers of up to {longest} tokens do not fit --max-model-len {}",
        limits.max_model_len
    );
    let mut rng = StdRng::seed_from_u64(args.engine.seed);
    let (mut input, mut output) = (0, 0);
    let requests: Vec<_> = (0..args.num_prompts)
        .map(|_| {
            let (i, o) = (
                args.random_input_len.draw(&mut rng),
                args.random_output_len.draw(&mut rng),
            );
            input += i;
            output += o;
            random_request(&mut rng, limits.vocab_size, i, o, args.temperature)
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
    println!(
        "Throughput: {requests_per_second:.2} requests/s, {:.2} total tokens/s, {:.2} output tokens/s",
        total as f64 / elapsed,
        output as f64 / elapsed
    );
    println!("Total num prompt tokens:  {input}");
    println!("Total num output tokens:  {output}");
    write_json(
        args.output_json.as_deref(),
        &json!({
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
        }),
    )
}
