//! `bench latency`, `bench throughput` and `bench serve`, with vLLM's flags and JSON keys.

mod collective;
mod latency;
mod serve;
mod throughput;

use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::Context;
use clap::Subcommand;
use engine::{GenerateRequest, Limits};
use rand::{Rng, rngs::StdRng};
use sampler::SamplingParams;
use serde_json::Value;

use crate::args::EngineArgs;

/// Which bench.
#[derive(Subcommand, Debug)]
pub enum BenchCommand {
    /// Time of one batch from start to end, prompts of one length, answers of one length.
    Latency(latency::LatencyArgs),
    /// Requests and tokens a second with all requests there from the start.
    Throughput(throughput::ThroughputArgs),
    /// Time and bandwidth of the sums over ranks, by size.
    Collective(collective::CollectiveArgs),
    /// Load on a server over HTTP: throughput and latencies as its clients see them.
    Serve(serve::ServeBenchArgs),
}

/// Runs the command.
pub fn run(command: &BenchCommand) -> anyhow::Result<()> {
    match command {
        BenchCommand::Latency(args) => latency::run(args),
        BenchCommand::Throughput(args) => throughput::run(args),
        BenchCommand::Collective(args) => collective::run(args),
        BenchCommand::Serve(args) => serve::run(args),
    }
}

impl BenchCommand {
    /// The engine that it runs, if it runs one.
    pub fn engine(&mut self) -> Option<&mut EngineArgs> {
        match self {
            BenchCommand::Latency(args) => Some(&mut args.engine),
            BenchCommand::Throughput(args) => Some(&mut args.engine),
            BenchCommand::Collective(args) => Some(&mut args.engine),
            BenchCommand::Serve(_) => None,
        }
    }
}

/// Random token ids below `vocab_size`.
fn random_prompt(rng: &mut StdRng, vocab_size: usize, len: usize) -> Vec<u32> {
    let id = |_| rng.random_range(0..vocab_size as u32);
    (0..len).map(id).collect()
}

/// A request that generates exactly `output_len` tokens.
fn request(prompt: Vec<u32>, output_len: usize, temperature: f32, seed: u64) -> GenerateRequest {
    let params = SamplingParams {
        temperature,
        max_tokens: Some(u32::try_from(output_len).unwrap_or(u32::MAX)),
        ignore_eos: true,
        seed: Some(seed),
        ..SamplingParams::default()
    };
    GenerateRequest::new("bench", prompt, params)
}

/// Answers that the model's length cuts short would make every figure wrong.
fn check_lengths(input: usize, output: usize, limits: &Limits) -> anyhow::Result<()> {
    let longest = input.saturating_add(output);
    anyhow::ensure!(
        longest <= limits.max_model_len,
        "prompts and answers of up to {longest} tokens do not fit --max-model-len {}",
        limits.max_model_len
    );
    Ok(())
}

/// Where `--output-json` puts the figures; created before anything is measured, so that a wrong
/// path costs no run.
struct JsonFile<'a>(Option<(&'a Path, File)>);

impl<'a> JsonFile<'a> {
    fn create(path: Option<&'a Path>) -> anyhow::Result<Self> {
        let Some(path) = path else {
            return Ok(Self(None));
        };
        let file =
            File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self(Some((path, file))))
    }

    fn write(self, value: &Value) -> anyhow::Result<()> {
        let Some((path, mut file)) = self.0 else {
            return Ok(());
        };
        file.write_all(format!("{value:#}\n").as_bytes())
            .with_context(|| format!("cannot write {}", path.display()))
    }
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

/// Seconds since this process was started, loading of libraries included, to a hundredth
/// (Linux; `None` elsewhere): field 22 of proc(5)'s `stat`, in ticks of 1/100 s since boot.
fn process_age() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is the command's name in brackets, which may hold spaces.
    let (_, fields) = stat.rsplit_once(')')?;
    let started: f64 = fields.split_whitespace().nth(19)?.parse().ok()?;
    let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
    let now: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    Some(now - started / 100.0)
}
