//! `bench collective` on GPUs: NCCL's exchanges, our own, and the sum fused with the norm behind it.

use std::thread;

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use torch_ext::cuda::{self, Kernels};
use tp_model::comm::{Collective, Health, Members, Nccl, OneShot, Threads};

use super::super::JsonFile;
use super::CollectiveArgs;
use super::rank::{Counts, KIND, Rank, joined};
use crate::say::say;

const HIDDEN: [i64; 2] = [4096, 8192];
const ROWS: [i64; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];
const EPS: f64 = 1e-5;

/// The time of one way to do something.
struct Figure {
    how: &'static str,
    /// Seconds.
    median: f64,
    p99: f64,
}

/// One message, and the ways that it can go.
struct Line<T> {
    what: T,
    figures: Vec<Figure>,
}

/// What a rank measured.
struct Report {
    /// By bytes.
    all_reduce: Vec<Line<u64>>,
    /// By bytes of the result.
    all_gather: Vec<Line<u64>>,
    /// By hidden size and rows.
    norm: Vec<Line<(i64, i64)>>,
}

pub(super) fn run(args: &CollectiveArgs) -> anyhow::Result<()> {
    let ranks = args.engine.tensor_parallel_size;
    let leads = args.engine.world.as_ref().is_none_or(|w| w.rank() == 0);
    let path = args.output_json.as_deref().filter(|_| leads);
    let file = JsonFile::create(path)?;
    let (transport, report) = match &args.engine.world {
        Some(world) => {
            let device = world.launcher().local_rank;
            let rank = Rank {
                device,
                nccl: Some(world.nccl(device)?),
                one_shot: None,
                meeting: Box::new(world.collective()?),
                health: world.health().clone(),
            };
            let report = measure(&rank, args).map_err(|error| rank.tell(&error))?;
            if !leads {
                return Ok(());
            }
            ("processes", report)
        }
        None => ("threads", on_threads(args)?),
    };
    say(format_args!("{ranks} GPUs, {transport}, {KIND:?}"))?;
    print_sizes("AllReduce", &report.all_reduce, sum_share(ranks))?;
    print_sizes("AllGather", &report.all_gather, gather_share(ranks))?;
    print_norms(&report.norm)?;
    file.write(&json!({
        "ranks": ranks,
        "transport": transport,
        "dtype": "bfloat16",
        "all_reduce": sizes_json(&report.all_reduce, sum_share(ranks)),
        "all_gather": sizes_json(&report.all_gather, gather_share(ranks)),
        "all_reduce_norm": norms_json(&report.norm),
    }))
}

/// As nccl-tests count: what each rank must send and receive at least, of the message's bytes.
fn sum_share(ranks: usize) -> f64 {
    2.0 * gather_share(ranks)
}

fn gather_share(ranks: usize) -> f64 {
    (ranks - 1) as f64 / ranks as f64
}

/// Rank 0's figures, of a group of threads of this process.
fn on_threads(args: &CollectiveArgs) -> anyhow::Result<Report> {
    let ranks = args.engine.tensor_parallel_size;
    let timeout = args.engine.distributed_timeout;
    let given = args.engine.device_ids.clone();
    let devices = given.unwrap_or_else(|| (0..ranks).collect());
    anyhow::ensure!(
        devices.len() == ranks,
        "device_ids: {devices:?} are not one GPU for each of {ranks} ranks"
    );
    let count = cuda::device_count();
    if let Some(missing) = devices.iter().find(|device| **device >= count) {
        anyhow::bail!("there is no GPU {missing}: libtorch sees {count}; set --tp to at most that");
    }
    let health = Health::default();
    let members = Members::all(ranks);
    let shared = (1..ranks).any(|at| devices[..at].contains(&devices[at]));
    let mut nccl = match shared {
        true => Vec::new(),
        false => Nccl::local_group(&devices, &members, timeout, &health)?,
    }
    .into_iter();
    let mut one_shot = match OneShot::group(&devices, &members, timeout, &health) {
        Ok(group) => group,
        Err(error) => {
            say(format_args!("without our own exchanges: {error}"))?;
            Vec::new()
        }
    }
    .into_iter();
    let meetings = Threads::group(ranks, timeout, &health);
    let members = devices.iter().zip(meetings).map(|(device, meeting)| Rank {
        device: *device,
        nccl: nccl.next(),
        one_shot: one_shot.next(),
        meeting: Box::new(meeting),
        health: health.clone(),
    });
    let members: Vec<Rank> = members.collect();
    let results: Vec<_> = thread::scope(|scope| {
        let start = |rank: Rank| {
            scope.spawn(move || measure(&rank, args).map_err(|error| rank.tell(&error)))
        };
        let threads: Vec<_> = members.into_iter().map(start).collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    let mut first = None;
    for result in results {
        let report = joined(result)??;
        first.get_or_insert(report);
    }
    first.ok_or_else(|| anyhow::anyhow!("there were no ranks"))
}

fn measure(rank: &Rank, args: &CollectiveArgs) -> anyhow::Result<Report> {
    let _no_grad = tch::no_grad_guard();
    let kernels = rank.start()?;
    let samples = args.num_iters.unwrap_or(30);
    let (mut all_reduce, mut all_gather, mut norm) = (Vec::new(), Vec::new(), Vec::new());
    // Our kernels move 16 bytes at a time.
    let mut bytes = args
        .min_bytes
        .unwrap_or(4 << 10)
        .max(16)
        .next_multiple_of(16);
    while bytes <= args.max_bytes.unwrap_or(256 << 20) {
        let repeats = match bytes {
            0..=0x10_0000 => 50,
            0x10_0001..=0x100_0000 => 10,
            _ => 3,
        };
        let counts = Counts { repeats, samples };
        all_reduce.push(sums(rank, bytes, counts)?);
        all_gather.push(gathers(rank, bytes, counts)?);
        bytes *= 4;
    }
    let counts = Counts {
        repeats: 50,
        samples,
    };
    for hidden in HIDDEN {
        for rows in ROWS {
            norm.push(norms(rank, &kernels, hidden, rows, counts)?);
        }
    }
    Ok(Report {
        all_reduce,
        all_gather,
        norm,
    })
}

/// A sum over ranks of a message of `bytes`.
fn sums(rank: &Rank, bytes: u64, counts: Counts) -> anyhow::Result<Line<u64>> {
    let size = [bytes as i64 / 2];
    let world = rank.world_size();
    let total = (world * (world + 1) / 2) as f64;
    let mut figures = Vec::new();
    let mut add = |how, (median, p99)| figures.push(Figure { how, median, p99 });
    let mut message = rank.full(&size, (rank.rank() + 1) as f64)?;
    if let Some(one_shot) = &rank.one_shot {
        let sum = one_shot.all_reduce_sum(message.shallow_clone())?;
        rank.expect("the one-shot sum", &sum, total)?;
        drop(sum);
        add(
            "one-shot",
            rank.time_graph(counts, || {
                drop(one_shot.all_reduce_sum(message.shallow_clone())?);
                Ok(())
            })?,
        );
    }
    if let Some(nccl) = &rank.nccl {
        let sum = nccl.all_reduce_sum(message.shallow_clone())?;
        rank.expect("NCCL's sum", &sum, total)?;
        // In place: the sums of sums would not stay numbers for long.
        let _ = message.zero_();
        let mut op = || {
            drop(nccl.all_reduce_sum(message.shallow_clone())?);
            Ok(())
        };
        add("nccl", rank.time_graph(counts, &mut op)?);
        add("nccl eager", rank.time_eager(counts, &mut op)?);
    }
    Ok(Line {
        what: bytes,
        figures,
    })
}

/// All ranks' parts of a message of `bytes`, on all ranks.
fn gathers(rank: &Rank, bytes: u64, counts: Counts) -> anyhow::Result<Line<u64>> {
    let world = rank.world_size() as i64;
    // Parts begin at multiples of 16 bytes.
    let part = (bytes / 2 / world as u64).next_multiple_of(8) as i64;
    let message = rank.full(&[part], (rank.rank() + 1) as f64)?;
    let mut figures = Vec::new();
    let mut add = |how, (median, p99)| figures.push(Figure { how, median, p99 });
    let all = |comm: &dyn Collective| comm.all_gather(message.shallow_clone());
    let check = |what, gathered: &Tensor| {
        (0..world).try_for_each(|r| {
            rank.expect(what, &gathered.narrow(0, r * part, part), (r + 1) as f64)
        })
    };
    if let Some(one_shot) = &rank.one_shot {
        check("the one-shot AllGather", &all(one_shot)?)?;
        add(
            "one-shot",
            rank.time_graph(counts, || {
                drop(all(one_shot)?);
                Ok(())
            })?,
        );
    }
    if let Some(nccl) = &rank.nccl {
        check("NCCL's AllGather", &all(nccl)?)?;
        let mut op = || {
            drop(all(nccl)?);
            Ok(())
        };
        add("nccl", rank.time_graph(counts, &mut op)?);
        add("nccl eager", rank.time_eager(counts, &mut op)?);
    }
    Ok(Line {
        what: (part * world * 2) as u64,
        figures,
    })
}

/// What a layer does after each of its two sums: the sum of `[rows, hidden]` over ranks, added to
/// the residual, normalized.
fn norms(
    rank: &Rank,
    kernels: &Kernels,
    hidden: i64,
    rows: i64,
    counts: Counts,
) -> anyhow::Result<Line<(i64, i64)>> {
    let size = [rows, hidden];
    let device = Device::Cuda(rank.device);
    let x = Tensor::f_randn(size, (Kind::Float, device))?.to_kind(KIND);
    let weight = rank.full(&[hidden], 1.0)?;
    let mut residual = rank.full(&size, 0.5)?;
    let mut figures = Vec::new();
    let mut add = |how, (median, p99)| figures.push(Figure { how, median, p99 });
    if let Some(one_shot) = &rank.one_shot {
        check_fused(rank, kernels, one_shot, &x, &weight)?;
        let _ = residual.zero_();
        let zero = x.zeros_like();
        add(
            "fused",
            rank.time_graph(counts, || {
                let mut residual = residual.shallow_clone();
                drop(one_shot.all_reduce_norm(&zero, &mut residual, &weight, EPS)?);
                Ok(())
            })?,
        );
        add(
            "one-shot, then norm",
            rank.time_graph(counts, || {
                let sum = one_shot.all_reduce_sum(zero.shallow_clone())?;
                let mut residual = residual.shallow_clone();
                drop(kernels.add_rms_norm(&mut residual, &sum, &weight, EPS)?);
                Ok(())
            })?,
        );
    }
    if let Some(nccl) = &rank.nccl {
        let zero = x.zeros_like();
        let _ = residual.zero_();
        add(
            "nccl, then norm",
            rank.time_graph(counts, || {
                let sum = nccl.all_reduce_sum(zero.shallow_clone())?;
                let mut residual = residual.shallow_clone();
                drop(kernels.add_rms_norm(&mut residual, &sum, &weight, EPS)?);
                Ok(())
            })?,
        );
    }
    Ok(Line {
        what: (hidden, rows),
        figures,
    })
}

/// Fails unless the fused kernel does what its parts do.
fn check_fused(
    rank: &Rank,
    kernels: &Kernels,
    one_shot: &OneShot,
    x: &Tensor,
    weight: &Tensor,
) -> anyhow::Result<()> {
    let before = x * 0.25;
    let (mut fused, mut parts) = (before.copy(), before.copy());
    let got = one_shot.all_reduce_norm(x, &mut fused, weight, EPS)?;
    let got = got.ok_or_else(|| anyhow::anyhow!("{:?} is not for the fused norm", x.size()))?;
    let sum = one_shot.all_reduce_sum(x.shallow_clone())?;
    let want = kernels.add_rms_norm(&mut parts, &sum, weight, EPS)?;
    let wide = |x: &Tensor| x.to_kind(Kind::Float);
    // The sum of squares is added in another order: a last bit of a bfloat16 may differ.
    let bound = wide(&want).abs() / 64.0 + 1e-3;
    let close = (wide(&got) - wide(&want)).abs().le_tensor(&bound).all();
    anyhow::ensure!(
        fused.equal(&parts) && close.int64_value(&[]) != 0,
        "the fused norm of {:?} on rank {} is not what its parts make",
        x.size(),
        rank.rank()
    );
    Ok(())
}

/// Microseconds and bus bandwidth of each way, by size.
fn print_sizes(title: &str, lines: &[Line<u64>], share: f64) -> anyhow::Result<()> {
    const WAYS: [&str; 3] = ["nccl eager", "nccl", "one-shot"];
    say(format_args!(
        "{title}: median of one in microseconds, bus bandwidth in GB/s (nccl and one-shot: graphs)"
    ))?;
    let mut head = format!("{:>11}", "bytes");
    for way in WAYS {
        head += &format!("{way:>13} us {:>9}", "GB/s");
    }
    say(head)?;
    for line in lines {
        let mut text = format!("{:>11}", line.what);
        for way in WAYS {
            text += &match line.figure(way) {
                Some(figure) => {
                    let bus = line.what as f64 * share / figure.median / 1e9;
                    format!("{:>16.1} {bus:>9.1}", figure.median * 1e6)
                }
                None => format!("{:>16} {:>9}", "-", "-"),
            };
        }
        say(text)?;
    }
    Ok(())
}

fn print_norms(lines: &[Line<(i64, i64)>]) -> anyhow::Result<()> {
    const WAYS: [&str; 3] = ["nccl, then norm", "one-shot, then norm", "fused"];
    say("AllReduce, residual addition and RMSNorm in graphs: median of one in microseconds")?;
    let mut head = format!("{:>8} {:>6}", "hidden", "rows");
    for way in WAYS {
        head += &format!("{way:>21}");
    }
    say(head + "   nccl / fused")?;
    for line in lines {
        let (hidden, rows) = line.what;
        let mut text = format!("{hidden:>8} {rows:>6}");
        for way in WAYS {
            text += &match line.figure(way) {
                Some(figure) => format!("{:>21.1}", figure.median * 1e6),
                None => format!("{:>21}", "-"),
            };
        }
        if let (Some(apart), Some(fused)) = (line.figure(WAYS[0]), line.figure(WAYS[2])) {
            text += &format!("{:>15.2}", apart.median / fused.median);
        }
        say(text)?;
    }
    Ok(())
}

impl<T> Line<T> {
    fn figure(&self, how: &str) -> Option<&Figure> {
        self.figures.iter().find(|figure| figure.how == how)
    }
}

fn sizes_json(lines: &[Line<u64>], share: f64) -> Vec<Value> {
    let figures = lines.iter().flat_map(|line| {
        line.figures.iter().map(move |figure| {
            let algorithm = line.what as f64 / figure.median / 1e9;
            json!({
                "bytes": line.what,
                "how": figure.how,
                "median_s": figure.median,
                "p99_s": figure.p99,
                "algbw_gb_per_s": algorithm,
                "busbw_gb_per_s": algorithm * share,
            })
        })
    });
    figures.collect()
}

fn norms_json(lines: &[Line<(i64, i64)>]) -> Vec<Value> {
    let figures = lines.iter().flat_map(|line| {
        line.figures.iter().map(move |figure| {
            json!({
                "hidden": line.what.0,
                "rows": line.what.1,
                "how": figure.how,
                "median_s": figure.median,
                "p99_s": figure.p99,
            })
        })
    });
    figures.collect()
}
