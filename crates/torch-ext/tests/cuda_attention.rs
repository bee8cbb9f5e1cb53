//! The GPU's attention kernels against float64 on fresh random inputs, at odd sizes.
#![cfg(feature = "cuda")]

mod paged_case;

use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use tch::{Device, Kind, Tensor};
use torch_ext::cuda::{self, Graph, GraphPool, Heads, Kernels, PagedKv, Scores, WriteKv};

use paged_case::{Case, distance, heads, tolerance};

fn kernels() -> Option<Kernels> {
    if cuda::is_available() {
        return Some(Kernels::new(0).unwrap());
    }
    println!("skipped: no CUDA device");
    None
}

const SHAPES: &[(usize, usize, usize, usize)] = &[
    // heads, KV heads, head size, block size
    (16, 8, 128, 16),
    (32, 8, 128, 32),
    (8, 8, 64, 16),
    (12, 4, 96, 32),
    (15, 3, 80, 16),
    (16, 1, 128, 64),
    (9, 1, 64, 48),
    (8, 1, 256, 16),
    (20, 1, 128, 16),
    (16, 1, 256, 16),
    (6, 2, 128, 8),
    (4, 2, 64, 1),
];

#[test]
fn decode_equals_float64_and_does_not_depend_on_the_batch() {
    let Some(kernels) = kernels() else { return };
    let mut rng = StdRng::seed_from_u64(2);
    for (i, &(h, kv, dim, block)) in SHAPES.iter().enumerate() {
        for round in 0..2 {
            let kind = [Kind::BFloat16, Kind::Half][(i + round) % 2];
            let most = [40, 300, 700, 3000][rng.random_range(0..4)];
            let n = [1, 3, 11, 70][rng.random_range(0..4)];
            let mut lens: Vec<_> = (0..n).map(|_| (1, rng.random_range(1..=most))).collect();
            lens[n - 1] = (1, if n > 2 { 0 } else { most });
            let window = [None, Some(1), Some(17), Some(333)][rng.random_range(0..4)];
            let cap = (round == 1).then_some(20.0);
            let heads = heads(h, kv, dim);
            let case = Case::new(&mut rng, heads, block, kind, lens, window, cap);
            let longest = most + rng.random_range(0..2) * 5000;
            let mut order: Vec<i32> = (0..n as i32).collect();
            order.shuffle(&mut rng);
            let want = case.expected();
            for invariant in [true, false] {
                let workspace = kernels.decode_workspace(heads, n, longest, invariant);
                let workspace = workspace.unwrap();
                let run = |seqs: &[i32], out: &Tensor| {
                    let seqs = Tensor::from_slice(seqs).to_device(kernels.device());
                    let (q, kv, scores) = (&case.q, case.kv(), &case.scores);
                    kernels
                        .attention_decode(q, &kv, &seqs, out, scores, longest, 1, &workspace)
                        .unwrap();
                };
                let (all, again, alone) = (case.poison(), case.poison(), case.poison());
                run(&order, &all);
                run(&order, &again);
                let (d, what) = (distance(&all, &want), case.describe());
                assert!(d < tolerance(kind), "{d:.1e}: {what}, {invariant}");
                assert!(all.equal(&again), "not repeatable: {what}, {invariant}");
                run(&order[..1], &alone);
                let row = i64::from(order[0]);
                let same = alone.get(row).equal(&all.get(row));
                assert!(!invariant || same, "{what}");
            }
        }
    }
}

#[test]
fn a_captured_decode_serves_other_contexts() {
    let Some(kernels) = kernels() else { return };
    let mut rng = StdRng::seed_from_u64(3);
    // More KV heads than thread blocks fit the GPU, so contexts of several splits are cut evenly.
    let (heads, n) = (heads(16, 8, 128), 45);
    let some = |rng: &mut StdRng, most: usize| -> Vec<(usize, usize)> {
        (0..n).map(|_| (1, rng.random_range(0..=most))).collect()
    };
    let lens = some(&mut rng, 900);
    let mut case = Case::new(&mut rng, heads, 16, Kind::BFloat16, lens, None, None);
    let seqs = Tensor::arange(n as i64, (Kind::Int, kernels.device()));
    for invariant in [true, false] {
        let workspace = kernels.decode_workspace(heads, n, 4096, invariant).unwrap();
        let out = case.poison();
        let launch = |case: &Case| {
            let (q, kv, scores) = (&case.q, case.kv(), &case.scores);
            kernels
                .attention_decode(q, &kv, &seqs, &out, scores, 4096, 1, &workspace)
                .unwrap();
        };
        launch(&case); // compiles
        let stream = cuda::Stream::new(0).unwrap();
        stream.make_current().unwrap();
        let (mut graph, ()) = Graph::capture(GraphPool::new().unwrap(), || launch(&case)).unwrap();
        // Of each context no more than it was made with; and behind some, padding.
        let all = usize::MAX;
        for (most, live) in [
            (all, n),
            (20, n),
            (400, n),
            (0, n),
            (700, n),
            (all, 37),
            (20, 1),
        ] {
            let len = |(i, &(_, len)): (usize, &(usize, usize))| match i < live {
                true => len.min(most),
                false => 0,
            };
            let lens: Vec<_> = case.lens.iter().enumerate().map(len).collect();
            let contexts: Vec<i32> = lens.iter().map(|&len| len as i32).collect();
            case.context_len.copy_(&Tensor::from_slice(&contexts));
            let whole = std::mem::replace(&mut case.lens, lens.iter().map(|&l| (1, l)).collect());
            graph.replay().unwrap();
            let d = distance(&out, &case.expected());
            let what = case.describe();
            assert!(d < tolerance(case.kind), "{d:.1e}: {what}, {invariant}");
            case.lens = whole;
        }
    }
}

#[test]
fn prefill_equals_float64_and_does_not_depend_on_the_chunk() {
    let Some(kernels) = kernels() else { return };
    let mut rng = StdRng::seed_from_u64(4);
    for (i, &(h, kv, dim, block)) in SHAPES.iter().enumerate() {
        for round in 0..3 {
            let kind = [Kind::BFloat16, Kind::Half][(i + round) % 2];
            let lens: Vec<(usize, usize)> = (0..[1, 2, 4][round])
                .map(|_| {
                    let new = [1, 3, 16, 64, 129, 300][rng.random_range(0..6)];
                    (new, new + [0, 1, 77, 640][rng.random_range(0..4)])
                })
                .collect();
            let window = [None, None, Some(1), Some(100)][rng.random_range(0..4)];
            let cap = (round == 2).then_some(20.0);
            let heads = heads(h, kv, dim);
            let case = Case::new(&mut rng, heads, block, kind, lens, window, cap);
            let chunks: Vec<_> = case
                .lens
                .iter()
                .enumerate()
                .map(|(i, l)| (i, l.0, l.1))
                .collect();
            let tiles = |chunks: &[(usize, usize, usize)]| {
                let flat = kernels.prefill_tiles(heads, block, chunks);
                Tensor::from_slice(&flat)
                    .view([-1, 3])
                    .to_device(kernels.device())
            };
            let out = case.poison();
            kernels
                .attention_prefill(&case.q, &case.kv(), &tiles(&chunks), &out, &case.scores)
                .unwrap();
            let d = distance(&out, &case.expected());
            assert!(d < tolerance(kind), "{d:.1e}: {}", case.describe());

            // The second half of the first sequence's chunk, alone: the same bits.
            let (new, context) = case.lens[0];
            let skip = new / 2;
            let q = case
                .q
                .narrow(0, skip as i64, (new - skip) as i64)
                .contiguous();
            let part = Tensor::full(
                [q.size()[0], (h * dim) as i64],
                f64::NAN,
                (kind, q.device()),
            );
            let starts = Tensor::from_slice(&[0, q.size()[0] as i32]).to_device(q.device());
            let kv = PagedKv {
                block_tables: &case.block_tables.narrow(0, 0, 1),
                query_start: &starts,
                context_len: &case.context_len.narrow(0, 0, 1),
                ..case.kv()
            };
            let tiles = tiles(&[(0, new - skip, context)]);
            kernels
                .attention_prefill(&q, &kv, &tiles, &part, &case.scores)
                .unwrap();
            let whole = out.narrow(0, skip as i64, (new - skip) as i64);
            assert!(
                part.equal(&whole),
                "depends on the chunk: {}",
                case.describe()
            );
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(kernels) = kernels() else { return };
    let mut rng = StdRng::seed_from_u64(6);
    let case = |heads: Heads| {
        let lens = vec![(1, 5), (1, 9)];
        Case::new(
            &mut StdRng::seed_from_u64(1),
            heads,
            16,
            Kind::Half,
            lens,
            None,
            None,
        )
    };
    let right = case(heads(4, 2, 64));
    let workspace = kernels.decode_workspace(right.heads, 2, 64, true).unwrap();
    let seqs = Tensor::from_slice(&[0i32, 1]).to_device(kernels.device());
    let out = right.poison();
    let decode = |q: &Tensor, kv: &PagedKv, seqs: &Tensor, scores: &Scores, context| {
        kernels.attention_decode(q, kv, seqs, &out, scores, context, 1, &workspace)
    };
    let (q, kv, scores) = (&right.q, right.kv(), right.scores);
    decode(q, &kv, &seqs, &scores, 64).unwrap();
    let long = seqs.to_kind(Kind::Int64);
    let zero = Scores {
        window: Some(0),
        ..scores
    };
    let refused = [
        decode(&q.to_kind(Kind::BFloat16), &kv, &seqs, &scores, 64),
        decode(&q.transpose(0, 1), &kv, &seqs, &scores, 64),
        decode(&q.to_device(Device::Cpu), &kv, &seqs, &scores, 64),
        decode(q, &kv, &long, &scores, 64),
        decode(q, &kv, &seqs, &scores, 65),
        decode(q, &kv, &seqs, &zero, 64),
        decode(
            q,
            &PagedKv {
                query_start: &seqs,
                ..kv
            },
            &seqs,
            &scores,
            64,
        ),
        decode(q, &PagedKv { v: q, ..kv }, &seqs, &scores, 64),
    ];
    for (i, result) in refused.iter().enumerate() {
        println!("{}", result.as_ref().expect_err(&format!("case {i}")));
    }
    assert!(
        kernels
            .decode_workspace(heads(4, 2, 72), 2, 64, true)
            .is_err()
    );
    assert!(
        kernels
            .decode_workspace(heads(4, 3, 64), 2, 64, true)
            .is_err()
    );

    // Indices on the device that point outside lead nowhere, and fault nothing.
    let wild = Tensor::from_slice(&[7i32, -3, 1 << 30, 0]).to_device(kernels.device());
    let lost = PagedKv {
        block_tables: &Tensor::full_like(kv.block_tables, rng.random_range(1 << 20..1 << 30)),
        ..kv
    };
    let workspace = kernels.decode_workspace(right.heads, 4, 64, true).unwrap();
    kernels
        .attention_decode(q, &lost, &wild, &out, &scores, 64, 1, &workspace)
        .unwrap();
    let tiles = Tensor::cat(&[&wild, &wild.narrow(0, 0, 2)], 0).view([2, 3]);
    kernels
        .attention_prefill(q, &lost, &tiles, &out, &scores)
        .unwrap();
    cuda::synchronize(0).unwrap();
}

/// What `--deterministic` rests on: a prompt's tokens as rows of their own, which attend to keys
/// that the kernel just before writes, in one launch or several, have the same bits.
#[test]
fn tokens_of_a_prompt_as_rows_of_their_own() {
    let Some(kernels) = kernels() else { return };
    let on = kernels.device();
    let stream = cuda::Stream::new(0).unwrap();
    stream.make_current().unwrap();
    let (h, kv, dim, block) = (8i64, 2i64, 128i64, 16i64);
    let (tokens, kind) = (700i64, Kind::BFloat16);
    let blocks = (tokens + block - 1) / block;
    let heads = heads(h as usize, kv as usize, dim as usize);
    let size = [tokens, (h + 2 * kv) * dim];
    let mut qkv = Tensor::randn(size, (Kind::Float, on)).to_kind(kind);
    let weight = Tensor::randn([dim], (Kind::Float, on)).to_kind(kind);
    let [cos, sin] = [(); 2].map(|()| Tensor::randn([tokens, dim / 2], (Kind::Float, on)));
    let positions = Tensor::arange(tokens, (Kind::Int64, on));
    let cache = [blocks, kv, block, dim];
    let [k, v] = [(); 2].map(|()| Tensor::zeros(cache, (kind, on)));
    let table = Tensor::arange(blocks, (Kind::Int, on)).repeat([tokens, 1]);
    let rows = Tensor::arange(tokens + 1, (Kind::Int, on));
    let scores = Scores {
        scale: (dim as f64).powf(-0.5),
        window: None,
        soft_cap: None,
    };
    let n = tokens as usize;
    let workspace = kernels.decode_workspace(heads, n, n, true).unwrap();
    // Tokens `first..first + len`, which the cache does not know yet.
    let chunk = |qkv: &Tensor, first: i64, len: i64| {
        let part = |x: &Tensor| x.narrow(0, first, len);
        let q = kernels
            .write_kv(&WriteKv {
                qkv: &part(qkv),
                qk_norm: Some((&weight, &weight)),
                eps: 1e-6,
                cos: &cos,
                sin: &sin,
                rope_index: &part(&positions),
                slots: &part(&positions),
                k_cache: &k,
                v_cache: &v,
            })
            .unwrap();
        let out = Tensor::empty([len, h * dim], (kind, on));
        let (starts, seqs) = (rows.narrow(0, 0, len + 1), rows.narrow(0, 0, len));
        let paged = PagedKv {
            k: &k,
            v: &v,
            block_tables: &part(&table),
            query_start: &starts,
            context_len: &(part(&rows.narrow(0, 1, tokens))),
        };
        kernels
            .attention_decode(&q, &paged, &seqs, &out, &scores, n, usize::MAX, &workspace)
            .unwrap();
        out
    };
    drop(chunk(&qkv, 0, tokens)); // compiles both ways to write
    drop(chunk(&qkv, 0, 1));
    cuda::synchronize(0).unwrap();
    let (mut graph, out) =
        Graph::capture(GraphPool::new().unwrap(), || chunk(&qkv, 0, tokens)).unwrap();
    for round in 0..10 {
        qkv.copy_(&Tensor::randn(size, (Kind::Float, on)));
        for cache in [&k, &v] {
            let _ = cache.shallow_clone().fill_(f64::NAN);
        }
        graph.replay().unwrap();
        cuda::synchronize(0).unwrap();
        let whole = out.copy();
        // The same, one chunk after the other, and nothing starts early.
        let step = [1, 16, 33, 255, 256][round % 5];
        let mut first = 0;
        while first < tokens {
            let len = step.min(tokens - first);
            let part = chunk(&qkv, first, len);
            cuda::synchronize(0).unwrap();
            let want = whole.narrow(0, first, len);
            assert!(part.equal(&want), "chunks of {step}, from token {first}");
            first += len;
        }
    }
}

/// The kernel that also writes the newest token has the bits of the two kernels that it replaces.
#[test]
fn writing_and_attending_in_one_changes_no_bit() {
    let Some(kernels) = kernels() else { return };
    let on = kernels.device();
    let mut rng = StdRng::seed_from_u64(11);
    for (i, &(h, kv, dim, block)) in SHAPES.iter().enumerate() {
        for round in 0..3 {
            let kind = [Kind::BFloat16, Kind::Half][(i + round) % 2];
            let most = [40, 300, 700, 3000][rng.random_range(0..4)];
            let n = [1, 3, 11, 70][rng.random_range(0..4)];
            // More than one launch takes, once; on an H200 two to four heads a multiprocessor, once.
            let (most, n) = match (i, round) {
                (0, 0) => (40, 300),
                (1, 0) => (700, 50),
                _ => (most, n),
            };
            let mut lens: Vec<_> = (0..n).map(|_| (1, rng.random_range(1..=most))).collect();
            if n > 2 {
                lens[n - 1] = (1, 0);
            }
            let window = [None, Some(1), Some(17), Some(333)][rng.random_range(0..4)];
            let cap = (round == 1).then_some(20.0);
            let heads = heads(h, kv, dim);
            let case = Case::new(&mut rng, heads, block, kind, lens, window, cap);
            let randn = |size: &[i64]| Tensor::randn(size, (Kind::Float, on));
            let rotary = if round == 2 { 32 } else { dim as i64 };
            let qkv = randn(&[n as i64, ((h + 2 * kv) * dim) as i64]).to_kind(kind);
            let weights = [(); 2].map(|()| (randn(&[dim as i64]) * 0.2 + 1.0).to_kind(kind));
            let angle = randn(&[50, rotary / 2]) * 3.0;
            let (cos, sin) = (angle.cos(), angle.sin());
            let index = Tensor::randint(50, [n as i64], (Kind::Int64, on));
            let tables = case.block_tables.to_device(Device::Cpu);
            let slot = |(at, len): (usize, &(usize, usize))| match len.1 {
                0 => -1,
                context => {
                    let entry = tables.int64_value(&[at as i64, ((context - 1) / block) as i64]);
                    entry * block as i64 + ((context - 1) % block) as i64
                }
            };
            let slots: Vec<i64> = case.lens.iter().enumerate().map(slot).collect();
            let slots = Tensor::from_slice(&slots).to_device(on);
            let mut order: Vec<i32> = (0..n as i32).collect();
            order.shuffle(&mut rng);
            let seqs = Tensor::from_slice(&order).to_device(on);
            let run = |fused: bool, invariant: bool| {
                let workspace = kernels.decode_workspace(heads, n, most, invariant);
                let workspace = workspace.unwrap();
                let (k, v) = (case.k.copy(), case.v.copy());
                let write = WriteKv {
                    qkv: &qkv,
                    qk_norm: (round != 1).then_some((&weights[0], &weights[1])),
                    eps: 1e-6,
                    cos: &cos,
                    sin: &sin,
                    rope_index: &index,
                    slots: &slots,
                    k_cache: &k,
                    v_cache: &v,
                };
                let paged = PagedKv {
                    k: &k,
                    v: &v,
                    ..case.kv()
                };
                let out = case.poison();
                let scores = &case.scores;
                match fused {
                    true => kernels
                        .attention_decode_fused(&write, &paged, &out, scores, most, &workspace),
                    false => {
                        let q = kernels.write_kv(&write).unwrap();
                        kernels
                            .attention_decode(&q, &paged, &seqs, &out, scores, most, 1, &workspace)
                    }
                }
                .unwrap();
                cuda::synchronize(0).unwrap();
                [out, k, v]
            };
            for invariant in [true, false] {
                let (apart, fused) = (run(false, invariant), run(true, invariant));
                for (what, (a, b)) in ["out", "k", "v"].iter().zip(apart.iter().zip(&fused)) {
                    // As integers: NaN is equal to itself.
                    let same = a.view_dtype(Kind::Int16).equal(&b.view_dtype(Kind::Int16));
                    // As many thread blocks as fit may cut the contexts in other places.
                    let close = !invariant && *what == "out" && distance(a, b) < tolerance(kind);
                    let case = case.describe();
                    assert!(
                        same || close,
                        "{what}, rotary {rotary}: {case}, {invariant}"
                    );
                }
            }
        }
    }
}
