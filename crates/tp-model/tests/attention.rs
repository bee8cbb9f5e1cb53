//! The attention backends against the reference, on random inputs of odd sizes.

use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use tch::{Device, Kind, Tensor};
use tp_model::attention::{
    AttentionBackend, AttentionBatch, AttentionLayer, Cpu, HostBatch, Reference, Sdpa,
};
use tp_model::kv_cache::{KvCache, KvShape};
use tp_model::layers::{Ops, RmsNorm, RopeRows};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

/// A step with caches that hold random contexts.
struct Scene {
    layer: AttentionLayer,
    batch: AttentionBatch,
    shape: KvShape,
    num_blocks: usize,
    qkv: Tensor,
    k: Tensor,
    v: Tensor,
}

fn scene(rng: &mut StdRng, kind: Kind) -> Scene {
    let num_kv_heads = rng.random_range(1..=3);
    let num_heads = num_kv_heads * [1, 2, 4, 7].choose(rng).unwrap();
    let head_dim = *[2, 16, 24, 64, 128].choose(rng).unwrap();
    let block_size = *[1, 3, 16, 32].choose(rng).unwrap();
    let window = [None, Some(1), Some(7), Some(40)].choose(rng).unwrap();
    let half = rng.random_range(1..=head_dim / 2) as i64;
    let norm = |ops| RmsNorm {
        weight: Tensor::rand([head_dim as i64], CPU) + 0.5,
        eps: 1e-6,
        ops,
    };
    let layer = AttentionLayer {
        num_heads,
        num_kv_heads,
        head_dim,
        window: *window,
        qk_norm: rng
            .random_bool(0.5)
            .then(|| (norm(Ops::Torch), norm(Ops::Torch))),
    };

    let num_seqs = rng.random_range(1..=5);
    let num_blocks = 1 + num_seqs * 90usize.div_ceil(block_size);
    let mut free: Vec<i32> = (1..num_blocks as i32).collect();
    free.shuffle(rng);
    let mut host = HostBatch {
        query_start: vec![0],
        ..HostBatch::default()
    };
    let (mut slots, mut positions, mut tables) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..num_seqs {
        let new: usize = *[1, 1, 2, 17, 33].choose(rng).unwrap();
        let context = new + rng.random_range(0..=50);
        let blocks = free.split_off(free.len() - context.div_ceil(block_size));
        for position in context - new..context {
            positions.push(position as i64);
            let block = blocks[position / block_size] as usize;
            slots.push((block * block_size + position % block_size) as i64);
        }
        host.query_start.push(slots.len() as i32);
        host.context_len.push(context as i32);
        tables.push(blocks);
    }
    host.table_width = tables.iter().map(Vec::len).max().unwrap();
    for table in &tables {
        host.block_tables.extend(table);
        host.block_tables.resize(
            host.block_tables.len().next_multiple_of(host.table_width),
            0,
        );
    }
    let angles = Tensor::rand([100, half], CPU) * 6.0;
    let batch = AttentionBatch {
        query_start: Tensor::from_slice(&host.query_start),
        context_len: Tensor::from_slice(&host.context_len),
        block_tables: Tensor::from_slice(&host.block_tables)
            .view([num_seqs as i64, host.table_width as i64]),
        slots: Tensor::from_slice(&slots),
        rope: RopeRows {
            cos: angles.cos(),
            sin: angles.sin(),
            index: Tensor::from_slice(&positions),
        },
        host,
        #[cfg(feature = "cuda")]
        work: None,
    };
    let width = (num_heads + 2 * num_kv_heads) * head_dim;
    let cache = [num_blocks, num_kv_heads, block_size, head_dim].map(|n| n as i64);
    Scene {
        layer,
        batch,
        shape: KvShape {
            num_layers: 1,
            num_kv_heads,
            head_dim,
            block_size,
            kind,
        },
        num_blocks,
        qkv: Tensor::randn([slots.len() as i64, width as i64], CPU),
        k: Tensor::randn(cache, CPU).to_kind(kind),
        v: Tensor::randn(cache, CPU).to_kind(kind),
    }
}

/// Output, and the cache's keys and values afterwards.
fn run(scene: &Scene, backend: &dyn AttentionBackend) -> [Tensor; 3] {
    let cache = KvCache::new(scene.shape, scene.num_blocks, Device::Cpu).unwrap();
    let mut kv = cache.layers.into_iter().next().unwrap();
    kv.k.copy_(&scene.k);
    kv.v.copy_(&scene.v);
    let q = backend.write_kv(&scene.qkv, &scene.layer, &kv, &scene.batch);
    let out = backend.attend(&q, &scene.layer, &kv, &scene.batch);
    [out, kv.k, kv.v]
}

fn worst(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let difference = a.to_kind(Kind::Double) - b.to_kind(Kind::Double);
    difference.abs().max().double_value(&[])
}

#[test]
fn backends_agree_with_the_reference() {
    let _no_grad = tch::no_grad_guard();
    tch::set_num_threads(1);
    tch::manual_seed(3);
    let mut rng = StdRng::seed_from_u64(3);
    for round in 0..120 {
        let kind = *[Kind::Float, Kind::BFloat16, Kind::Half]
            .choose(&mut rng)
            .unwrap();
        // A written key may round to the neighbour when the rotation differs in its last bit.
        let (cache, output) = match kind {
            Kind::Float => (2e-6, 5e-6),
            Kind::Half => (4e-3, 4e-3),
            _ => (4e-2, 3e-2),
        };
        let scene = scene(&mut rng, kind);
        let want = run(&scene, &Reference);
        for backend in [&Sdpa as &dyn AttentionBackend, &Cpu] {
            let got = run(&scene, backend);
            let errors: Vec<f64> = want.iter().zip(&got).map(|(w, g)| worst(w, g)).collect();
            let scale = want[1]
                .abs()
                .max()
                .to_kind(Kind::Double)
                .double_value(&[])
                .max(1.0);
            assert!(
                errors[0] <= output * scale && errors[1].max(errors[2]) <= cache * scale,
                "round {round}, {backend:?}, {kind:?}: {errors:?} in {:?}",
                scene.layer
            );
        }
    }
}

#[test]
fn copies_of_blocks_happen_in_order_and_within_bounds() {
    let shape = KvShape {
        num_layers: 2,
        num_kv_heads: 3,
        head_dim: 4,
        block_size: 5,
        kind: Kind::BFloat16,
    };
    assert_eq!(shape.bytes_per_block(), 2 * 2 * 3 * 4 * 5 * 2);
    let cache = KvCache::new(shape, 6, Device::Cpu).unwrap();
    for layer in &cache.layers {
        for block in 0..6 {
            let _ = layer.k.get(block).fill_(block as f64);
            let _ = layer.v.get(block).fill_(-block as f64);
        }
    }
    cache.copy_blocks(&[(1, 2), (2, 3), (5, 1)]).unwrap();
    for layer in &cache.layers {
        for (block, want) in [0.0, 5.0, 1.0, 1.0, 4.0, 5.0].into_iter().enumerate() {
            let k = layer.k.get(block as i64).to_kind(Kind::Double);
            let v = layer.v.get(block as i64).to_kind(Kind::Double);
            assert_eq!(k.min().double_value(&[]), want);
            assert_eq!(k.max().double_value(&[]), want);
            assert_eq!((&k + &v).abs().max().double_value(&[]), 0.0);
        }
    }
    assert!(
        cache
            .copy_blocks(&[(0, 6)])
            .unwrap_err()
            .contains("block 0 to 6")
    );
    assert!(KvCache::new(shape, 0, Device::Cpu).is_err());
}
