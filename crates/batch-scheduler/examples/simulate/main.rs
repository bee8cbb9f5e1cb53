//! Replays a workload through the scheduler on a simulated clock, once for each policy, and
//! prints throughput, time to first token (TTFT), time per output token (TPOT), cache hits and
//! preemptions. No model: a step costs what `Cost` says, by the tokens it computes.
//!
//! ```text
//! cargo run --release --example simulate -- --requests 2000 --rate 45 --svg ttft.svg
//! cargo run --release --example simulate -- --trace trace.csv --policy fcfs,fair
//! ```
//!
//! A trace has a line for each request, `arrival_seconds,prompt_tokens,output_tokens` and
//! optionally `,class,shared_prefix_tokens`: requests of a class begin with the same tokens.

mod options;
mod replay;
mod svg;
mod trace;

use options::Options;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let options = Options::parse(std::env::args().skip(1))?;
    let trace = match &options.trace {
        Some(path) => trace::read(path)?,
        None => trace::generate(options.requests, options.rate, options.seed),
    };
    println!(
        "{} requests over {:.1} s, {} KV blocks of {} tokens",
        trace.len(),
        trace.last().map_or(0.0, |r| r.arrival),
        options.blocks,
        replay::BLOCK_SIZE,
    );
    println!(
        "{:>9} {:>9} {:>10} {:>10} {:>10} {:>10} {:>8} {:>9}",
        "policy", "tokens/s", "TTFT mean", "TTFT p50", "TTFT p99", "TPOT mean", "hits", "preempted"
    );
    let mut curves = Vec::new();
    for name in &options.policies {
        let result = replay::run(&trace, name, &options)?;
        println!(
            "{name:>9} {:>9.0} {:>8.3} s {:>8.3} s {:>8.3} s {:>7.1} ms {:>6.1} % {:>9}",
            result.throughput,
            result.ttft.iter().sum::<f64>() / result.ttft.len().max(1) as f64,
            result.quantile(0.5),
            result.quantile(0.99),
            result.tpot * 1e3,
            result.hit_rate * 100.0,
            result.preemptions,
        );
        curves.push((name.clone(), result.ttft));
    }
    if let Some(path) = &options.svg {
        std::fs::write(path, svg::cumulative(&curves))
            .map_err(|e| format!("cannot write the plot to {path}: {e}"))?;
        println!("share of requests by TTFT: {path}");
    }
    Ok(())
}
