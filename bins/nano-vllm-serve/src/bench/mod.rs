//! `bench latency` and `bench throughput`, with vLLM's flags and JSON keys.

mod latency;
mod throughput;

use std::path::Path;

use anyhow::Context;
use clap::Subcommand;
use engine::GenerateRequest;
use rand::{Rng, rngs::StdRng};
use sampler::SamplingParams;
use serde_json::Value;

/// Which bench.
#[derive(Subcommand, Debug)]
pub enum BenchCommand {
    /// Time of one batch from start to end, prompts of one length, answers of one length.
    Latency(latency::LatencyArgs),
    /// Requests and tokens a second with all requests there from the start.
    Throughput(throughput::ThroughputArgs),
}

/// Runs the command.
pub fn run(command: &BenchCommand) -> anyhow::Result<()> {
    match command {
        BenchCommand::Latency(args) => latency::run(args),
        BenchCommand::Throughput(args) => throughput::run(args),
    }
}

/// A request of random token ids that generates exactly `output_len` tokens.
fn random_request(
    rng: &mut StdRng,
    vocab_size: usize,
    input_len: usize,
    output_len: usize,
    temperature: f32,
) -> GenerateRequest {
    let ids: Vec<u32> = (0..input_len)
        .map(|_| rng.random_range(0..vocab_size as u32))
        .collect();
    let params = SamplingParams {
        temperature,
        max_tokens: Some(u32::try_from(output_len).unwrap_or(u32::MAX)),
        ignore_eos: true,
        seed: Some(rng.random()),
        ..SamplingParams::default()
    };
    GenerateRequest::new("bench", ids, params)
}

fn write_json(path: Option<&Path>, value: &Value) -> anyhow::Result<()> {
    let Some(path) = path else { return Ok(()) };
    std::fs::write(path, format!("{value:#}\n"))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// This process's peak resident memory in MiB (Linux; `None` elsewhere).
fn peak_rss_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()
        .map(|kib| kib / 1024)
}
