use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use tch::{Device, Kind, Tensor};

use super::{Checkpoint, Dummy, LoadContext, Loader, Part, Shard, Source, Split, in_parallel};
use crate::error::ModelError;
use crate::layers::{Linear, Ops};

const HIDDEN: usize = 12;
const PARTS: [Part<'static>; 2] = [
    Part {
        name: "wide",
        out_features: 20,
        replicas: 1,
    },
    Part {
        name: "narrow",
        out_features: 8,
        replicas: 1,
    },
];

/// A directory with the tensors of [`PARTS`]; removed when dropped.
struct Files(PathBuf);

impl Files {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("tp-model-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let value = |i: usize| ((i * 7919 % 1000) as f32 / 500.0 - 1.0).to_le_bytes();
        let mut data = Vec::new();
        for part in PARTS {
            for (kind, shape) in [
                ("weight", vec![part.out_features, HIDDEN]),
                ("bias", vec![part.out_features]),
            ] {
                let count: usize = shape.iter().product();
                let seed = data.len() * 31;
                let bytes: Vec<u8> = (seed..seed + count).flat_map(value).collect();
                data.push((format!("{}.{kind}", part.name), shape, bytes));
            }
        }
        let views = data.iter().map(|(name, shape, bytes)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap();
            (name.as_str(), view)
        });
        serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
        Self(dir)
    }

    fn source(&self) -> Source {
        Source::Checkpoint(Checkpoint::open(&self.0).unwrap())
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn context(source: Source, ops: Ops, shard: Shard) -> LoadContext<'static> {
    LoadContext {
        source,
        shard,
        ops,
        weights: Kind::Float,
        activations: Kind::Float,
        device: Device::Cpu,
        progress: None,
        done: AtomicU64::new(0),
        total: 28 * (HIDDEN as u64 + 1) * 4,
    }
}

fn linear(source: Source, ops: Ops, shard: Shard, split: Split) -> Box<dyn Linear> {
    let context = context(source, ops, shard);
    let mut loader = Loader::new(&context);
    loader.linear(&PARTS, HIDDEN, split, true).unwrap()
}

fn close(a: &Tensor, b: &Tensor) {
    assert_eq!(a.size(), b.size());
    let worst = (a - b).abs().max().double_value(&[]);
    assert!(worst < 1e-5, "{worst}");
}

#[test]
fn ranks_hold_their_share_of_each_stacked_tensor() {
    let files = Files::new("shards");
    let x = Tensor::rand([5, HIDDEN as i64], (Kind::Float, Device::Cpu));
    for ops in [Ops::Torch, Ops::Cpu] {
        let whole = linear(files.source(), ops.clone(), Shard::WHOLE, Split::Out).forward(&x);
        assert_eq!(whole.size(), [5, 28]);
        for world_size in [2i64, 4] {
            let mut sum = Tensor::zeros_like(&whole);
            for rank in 0..world_size {
                let shard = Shard {
                    rank: rank as usize,
                    world_size: world_size as usize,
                };
                let got = linear(files.source(), ops.clone(), shard, Split::Out).forward(&x);
                let (wide, narrow) = (20 / world_size, 8 / world_size);
                let want = [
                    whole.narrow(1, rank * wide, wide),
                    whole.narrow(1, 20 + rank * narrow, narrow),
                ];
                close(&got, &Tensor::cat(&want, 1));

                let cols = HIDDEN as i64 / world_size;
                let mine = x.narrow(1, rank * cols, cols).contiguous();
                sum += linear(files.source(), ops.clone(), shard, Split::In).forward(&mine);
            }
            close(&sum, &whole);
        }
    }
}

#[test]
fn progress_rises_to_the_total() {
    let files = Files::new("progress");
    let Source::Checkpoint(checkpoint) = files.source() else {
        unreachable!()
    };
    let total = checkpoint.bytes();
    assert_eq!(total as usize, 28 * (HIDDEN + 1) * 4);
    let seen = Mutex::new(Vec::new());
    let progress = |done, of| seen.lock().unwrap().push((done, of));
    let context = LoadContext {
        progress: Some(&progress),
        ..context(files.source(), Ops::Cpu, Shard::WHOLE)
    };
    let mut loader = Loader::new(&context);
    loader.linear(&PARTS, HIDDEN, Split::Out, true).unwrap();
    assert_eq!(seen.lock().unwrap().last(), Some(&(total, total)));
    context.finish(&loader.into_used(), |_| false);
    drop(context);
    let seen = seen.into_inner().unwrap();
    assert!(seen.is_sorted() && seen.len() > 4 && seen.iter().all(|(_, of)| *of == total));
}

#[test]
fn dummy_weights_are_normal_and_follow_seed_and_name() {
    let x = Tensor::eye(HIDDEN as i64, (Kind::Float, Device::Cpu));
    let weight = |seed| {
        let source = Source::Dummy(Dummy::new(seed));
        linear(source, Ops::Cpu, Shard::WHOLE, Split::Out).forward(&x)
    };
    let (a, again, b) = (weight(1), weight(1), weight(2));
    assert!(a.equal(&again) && !a.equal(&b));

    let dummy = Dummy::new(3);
    let rows = dummy.rows("some.weight", 0, 500, 700).to_tensor();
    assert!(!rows.equal(&dummy.rows("other.weight", 0, 500, 700).to_tensor()));
    let (mean, std) = (rows.mean(Kind::Float), rows.std(true));
    assert!(mean.double_value(&[]).abs() < 3e-4);
    assert!((std.double_value(&[]) - 0.02).abs() < 3e-4);
    // A fifth lies beyond 1.2816 standard deviations.
    let beyond = rows
        .abs()
        .gt(0.02 * 1.2816)
        .to_kind(Kind::Float)
        .mean(Kind::Float);
    assert!((beyond.double_value(&[]) - 0.2).abs() < 0.01);
}

#[test]
fn jobs_run_once_each_and_the_first_error_is_told() {
    let runs: Vec<AtomicUsize> = (0..50).map(|_| AtomicUsize::new(0)).collect();
    let run = |index: usize| runs[index].fetch_add(1, Ordering::Relaxed);
    let threads = torch_ext::cpu::num_threads();
    let squares = in_parallel(50, |index| {
        run(index);
        assert_eq!(torch_ext::cpu::num_threads(), 1);
        Ok(index * index)
    });
    assert_eq!(squares.unwrap(), (0..50).map(|i| i * i).collect::<Vec<_>>());
    assert!(runs.iter().all(|n| n.load(Ordering::Relaxed) == 1));
    let failed = in_parallel(50, |index| match index % 7 {
        6 => Err(ModelError::Options(format!("job {index}"))),
        _ => Ok(()),
    });
    assert_eq!(failed.unwrap_err().to_string(), "job 6");
    assert_eq!(torch_ext::cpu::num_threads(), threads);
    assert!(in_parallel(0, |_| Ok(())).unwrap().is_empty());
}
