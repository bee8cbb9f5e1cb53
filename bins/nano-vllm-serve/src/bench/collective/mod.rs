//! `bench collective`: what the ranks of a model pay for every sum.

#[cfg(feature = "cuda")]
mod gpus;
#[cfg(feature = "cuda")]
mod rank;

use std::path::PathBuf;
use std::thread;
use std::time::Instant;

use clap::Args;
use engine::DeviceChoice;
use serde_json::json;
use tch::{Device, Kind, Tensor};
use tp_model::comm::{Collective, CommError, Health, Threads};

use super::JsonFile;
use crate::args::EngineArgs;
use crate::say::say;
use crate::sizes::{parse_count, parse_size};

/// Arguments of `bench collective`.
#[derive(Args, Debug)]
pub struct CollectiveArgs {
    /// Smallest message in bytes (accepts 4K, 1M, ...); each one is four times the one before
    /// [default: 1k; on GPUs 4K].
    #[arg(long, value_parser = parse_size)]
    min_bytes: Option<u64>,
    /// Largest message in bytes [default: 16M; on GPUs 256M].
    #[arg(long, value_parser = parse_size)]
    max_bytes: Option<u64>,
    /// Exchanges a size that count; a tenth as many come before them. On GPUs: replays of a graph
    /// of 3 to 50 exchanges [default: 100; on GPUs 30].
    #[arg(long, value_parser = parse_count)]
    num_iters: Option<usize>,
    /// Where to write the figures as JSON.
    #[arg(long)]
    output_json: Option<PathBuf>,
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// The figures of one size of message.
struct Figures {
    bytes: u64,
    /// Seconds of an exchange.
    median: f64,
    p99: f64,
}

pub fn run(args: &CollectiveArgs) -> anyhow::Result<()> {
    let ranks = args.engine.tensor_parallel_size;
    anyhow::ensure!(
        args.engine.pipeline_parallel_size == 1,
        "pipeline stages exchange no sums; give the ranks with --tp"
    );
    anyhow::ensure!(
        ranks > 1,
        "one rank exchanges nothing; set --tp to 2 or more"
    );
    if on_gpus(args)? {
        #[cfg(feature = "cuda")]
        return gpus::run(args);
    }
    let (transport, rows) = match &args.engine.world {
        Some(world) => ("tcp", measure(&world.collective()?, args)?),
        None => ("threads", on_threads(ranks, args)?),
    };
    if args
        .engine
        .world
        .as_ref()
        .is_some_and(|world| world.rank() > 0)
    {
        return Ok(());
    }
    // As nccl-tests count: what each rank must send and receive at least.
    let share = 2.0 * (ranks - 1) as f64 / ranks as f64;
    say(format_args!(
        "AllReduce of float32, {ranks} ranks, {transport}"
    ))?;
    say("      bytes   median us      p99 us   algbw GB/s   busbw GB/s")?;
    let mut lines = Vec::new();
    for row in &rows {
        let algorithm = row.bytes as f64 / row.median / 1e9;
        say(format_args!(
            "{:>11} {:>11.1} {:>11.1} {algorithm:>12.3} {:>12.3}",
            row.bytes,
            row.median * 1e6,
            row.p99 * 1e6,
            algorithm * share
        ))?;
        lines.push(json!({
            "bytes": row.bytes,
            "median_s": row.median,
            "p99_s": row.p99,
            "algbw_gb_per_s": algorithm,
            "busbw_gb_per_s": algorithm * share,
        }));
    }
    let file = JsonFile::create(args.output_json.as_deref())?;
    file.write(&json!({"ranks": ranks, "transport": transport, "all_reduce": lines}))
}

/// Whether ranks are GPUs: if that was asked for, or if there is one for each of them.
fn on_gpus(args: &CollectiveArgs) -> anyhow::Result<bool> {
    let ranks = args.engine.tensor_parallel_size;
    Ok(match args.engine.config()?.device {
        DeviceChoice::Cpu => false,
        DeviceChoice::Cuda => {
            torch_ext::cuda::load()?;
            true
        }
        // Only this machine's GPUs can be counted.
        DeviceChoice::Auto => {
            let here = match &args.engine.world {
                Some(world) => world.launcher().local_world_size,
                None => ranks,
            };
            torch_ext::cuda::device_count() >= here
        }
    })
}

/// Rank 0's figures.
fn on_threads(ranks: usize, args: &CollectiveArgs) -> anyhow::Result<Vec<Figures>> {
    let group = Threads::group(ranks, args.engine.distributed_timeout, &Health::default());
    let results: Vec<_> = thread::scope(|scope| {
        let start = |comm| scope.spawn(move || measure(&comm, args));
        let threads: Vec<_> = group.into_iter().map(start).collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    let mut first = None;
    for result in results {
        let rows = result.map_err(|_| anyhow::anyhow!("a rank's thread panicked"))??;
        first.get_or_insert(rows);
    }
    Ok(first.unwrap_or_default())
}

fn measure(comm: &dyn Collective, args: &CollectiveArgs) -> Result<Vec<Figures>, CommError> {
    torch_ext::cpu::set_num_threads(1);
    let num_iters = args.num_iters.unwrap_or(100);
    let mut rows = Vec::new();
    let mut bytes = args.min_bytes.unwrap_or(1000).max(4);
    while bytes <= args.max_bytes.unwrap_or(16 << 20) {
        let message = Tensor::ones([(bytes / 4) as i64], (Kind::Float, Device::Cpu));
        let mut times = Vec::with_capacity(num_iters);
        for turn in 0..num_iters + num_iters / 10 {
            let start = Instant::now();
            let sum = comm.all_reduce_sum(message.shallow_clone())?;
            let time = start.elapsed().as_secs_f64();
            drop(sum);
            if turn >= num_iters / 10 {
                times.push(time);
            }
        }
        let (median, p99) = percentiles(&mut times);
        rows.push(Figures { bytes, median, p99 });
        bytes *= 4;
    }
    Ok(rows)
}

/// Median and 99th percentile of at least one time.
fn percentiles(times: &mut [f64]) -> (f64, f64) {
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2], times[(times.len() - 1) * 99 / 100])
}
