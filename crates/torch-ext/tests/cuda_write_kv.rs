//! Queries, and keys and values in the cache, from the QKV product: against float32 operation by operation, at odd sizes.
#![cfg(feature = "cuda")]

use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use tch::{Kind, Tensor};
use torch_ext::cuda::{self, Kernels, WriteKv};

fn kernels() -> Option<Kernels> {
    if cuda::is_available() {
        return Some(Kernels::new(0).unwrap());
    }
    println!("skipped: no CUDA device");
    None
}

/// ‖a - b‖ / ‖b‖; NaN if `a` holds any.
fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    let norm = |x: &Tensor| x.square().sum(Kind::Double).sqrt().double_value(&[]);
    norm(&(a - &b)) / norm(&b).max(1e-30)
}

#[test]
fn queries_keys_and_values_are_normalized_rotated_and_written() {
    let Some(kernels) = kernels() else { return };
    let on = kernels.device();
    let mut rng = StdRng::seed_from_u64(5);
    for &(tokens, h, kv, dim, rotary, block, norm) in &[
        (7i64, 5i64, 1i64, 128i64, 128i64, 16i64, true),
        (300, 16, 8, 128, 128, 16, true),
        (33, 4, 4, 80, 32, 8, false),
        (1, 16, 8, 128, 128, 16, false),
        (261, 3, 3, 96, 96, 1, true),
        (5, 2, 1, 256, 64, 16, true),
        (11, 2, 2, 64, 64, 32, false),
        (259, 7, 3, 64, 64, 16, true),
        (256, 48, 1, 128, 128, 32, false),
    ] {
        for kind in [Kind::BFloat16, Kind::Half] {
            let randn = |size: &[i64]| Tensor::randn(size, (Kind::Float, on));
            let qkv = randn(&[tokens, (h + 2 * kv) * dim]).to_kind(kind);
            let weights = [(); 2].map(|()| (randn(&[dim]) * 0.2 + 1.0).to_kind(kind));
            let angle = randn(&[50, rotary / 2]) * 3.0;
            let (cos, sin) = (angle.cos(), angle.sin());
            let index = Tensor::randint(50, [tokens], (Kind::Int64, on));
            let blocks = tokens / block + 4;
            let mut slots: Vec<i64> = (0..blocks * block).collect();
            slots.shuffle(&mut rng);
            slots.truncate(tokens as usize);
            // Padding: nothing is written.
            slots[tokens as usize / 2] = -1;
            let size = [blocks, kv, block, dim];
            let [k, v, k_want, v_want] = [(); 4].map(|()| Tensor::full(size, 7.0, (kind, on)));
            let q = kernels
                .write_kv(&WriteKv {
                    qkv: &qkv,
                    qk_norm: norm.then_some((&weights[0], &weights[1])),
                    eps: 1e-6,
                    cos: &cos,
                    sin: &sin,
                    rope_index: &index,
                    slots: &Tensor::from_slice(&slots).to_device(on),
                    k_cache: &k,
                    v_cache: &v,
                })
                .unwrap();

            let turned = |x: &Tensor, weight: &Tensor| {
                let mut x = x.shallow_clone();
                if norm {
                    let wide = x.to_kind(Kind::Float);
                    let square = wide.square().mean_dim(-1, true, Kind::Float);
                    x = (wide * (square + 1e-6).rsqrt()).to_kind(kind) * weight;
                }
                let parts = x.split_with_sizes([rotary / 2, rotary / 2, dim - rotary], 2);
                let [a, b] = [0, 1].map(|i: usize| parts[i].to_kind(Kind::Float));
                let [c, s] = [&cos, &sin].map(|t| t.index_select(0, &index).unsqueeze(1));
                let [a, b] = [&a * &c - &b * &s, &b * &c + &a * &s].map(|x| x.to_kind(kind));
                Tensor::cat(&[&a, &b, &parts[2]], 2)
            };
            let parts = qkv.view([tokens, -1, dim]).split_with_sizes([h, kv, kv], 1);
            let (q_want, k_new) = (
                turned(&parts[0], &weights[0]),
                turned(&parts[1], &weights[1]),
            );
            for (i, &slot) in slots.iter().enumerate().filter(|(_, slot)| **slot >= 0) {
                let place = |cache: &Tensor| cache.get(slot / block).select(1, slot % block);
                place(&k_want).copy_(&k_new.get(i as i64));
                place(&v_want).copy_(&parts[2].get(i as i64));
            }
            let what = format!("{tokens} tokens, {h}/{kv} heads of {dim}, {kind:?}");
            assert!(distance(&q, &q_want) < 2e-3, "q: {what}");
            assert!(distance(&k, &k_want) < 2e-3, "k: {what}");
            assert!(v.equal(&v_want), "v: {what}");
        }
    }
}

/// One kernel takes a few tokens, another many: what they write is the same to the last bit.
#[test]
fn the_number_of_tokens_changes_no_bit() {
    let Some(kernels) = kernels() else { return };
    let on = kernels.device();
    for (h, kv, dim, norm) in [
        (16, 8, 128, true),
        (5, 1, 128, true),
        (32, 8, 128, false),
        (9, 3, 64, true),
    ] {
        for kind in [Kind::BFloat16, Kind::Half] {
            let (tokens, block) = (600i64, 16i64);
            let randn = |size: &[i64]| Tensor::randn(size, (Kind::Float, on));
            let qkv = randn(&[tokens, (h + 2 * kv) * dim]).to_kind(kind);
            let weights = [(); 2].map(|()| (randn(&[dim]) * 0.2 + 1.0).to_kind(kind));
            let angle = randn(&[tokens, dim / 2]) * 3.0;
            let (cos, sin) = (angle.cos(), angle.sin());
            let index = Tensor::randperm(tokens, (Kind::Int64, on));
            let slots = Tensor::randperm(tokens, (Kind::Int64, on));
            let write = |piece: i64| {
                let size = [tokens / block + 1, kv, block, dim];
                let [k, v] = [(); 2].map(|()| Tensor::zeros(size, (kind, on)));
                let mut queries = Vec::new();
                for first in (0..tokens).step_by(piece as usize) {
                    let part = |x: &Tensor| x.narrow(0, first, piece.min(tokens - first));
                    let written = kernels.write_kv(&WriteKv {
                        qkv: &part(&qkv),
                        qk_norm: norm.then_some((&weights[0], &weights[1])),
                        eps: 1e-6,
                        cos: &cos,
                        sin: &sin,
                        rope_index: &part(&index),
                        slots: &part(&slots),
                        k_cache: &k,
                        v_cache: &v,
                    });
                    queries.push(written.unwrap());
                }
                [Tensor::cat(&queries, 0), k, v]
            };
            let (many, few) = (write(tokens), write(7));
            for (what, (many, few)) in ["q", "k", "v"].iter().zip(many.iter().zip(&few)) {
                assert!(many.equal(few), "{what}: {h}/{kv} heads of {dim}, {kind:?}");
            }
        }
    }
}
