//! Normalisation, activation, rotary embedding and block copies against float64.

mod common;

use common::*;
use rand::Rng;
use rand::seq::SliceRandom;
use tch::{Kind, Tensor};
use torch_ext::cpu::{
    RopeParams, add_rms_norm, copy_blocks, new_cache, rms_norm, rope_and_cache, set_num_threads,
    silu_mul,
};

fn exact_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let x = f64(x);
    let mean = x.square().mean_dim(-1, true, Kind::Double);
    &x / (mean + eps).sqrt() * f64(weight)
}

#[test]
fn norms_equal_float64() {
    let mut rng = rng();
    for (t, h) in [(1, 1), (3, 7), (5, 1024), (33, 1000), (2, 4099)] {
        let (x, residual) = (random(&mut rng, &[t, h]), random(&mut rng, &[t, h]));
        let weight = random(&mut rng, &[h]);
        poison(&[t, h]);
        let y = rms_norm(&x, &weight, 1e-6).unwrap();
        assert_close(&y, &exact_norm(&x, &weight, 1e-6), 2e-6, "rms_norm");

        let mut sum = residual.copy();
        let y = add_rms_norm(&mut sum, &x, &weight, 1e-6).unwrap();
        assert_same_bits(&sum, &(&residual + &x), "residual");
        assert_same_bits(&y, &rms_norm(&sum, &weight, 1e-6).unwrap(), "add_rms_norm");

        for threads in [1, 3] {
            set_num_threads(threads);
            for i in 0..t {
                let row = rms_norm(&x.narrow(0, i, 1), &weight, 1e-6).unwrap();
                let all = rms_norm(&x, &weight, 1e-6).unwrap();
                assert_same_bits(&row, &all.narrow(0, i, 1), "one row of many");
            }
        }
    }
}

#[test]
fn silu_equals_float64() {
    let mut rng = rng();
    for (t, i) in [(1, 1), (4, 13), (9, 3072), (2, 31)] {
        let x = random(&mut rng, &[t, 2 * i]) * 20.0;
        poison(&[t, i]);
        let y = silu_mul(&x).unwrap();
        let (gate, up) = (f64(&x.narrow(1, 0, i)), f64(&x.narrow(1, i, i)));
        let exact = &gate * gate.sigmoid() * &up;
        assert_within(&y, &exact, &(exact.abs() * 5e-7 + 1e-35), "silu_mul");
        for r in 0..t {
            let row = silu_mul(&x.narrow(0, r, 1)).unwrap();
            assert_same_bits(&row, &y.narrow(0, r, 1), "one row of many");
        }
    }
}

/// Rotation of `x` [T, H, D] in float64.
fn rotated(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let half = cos.size()[1];
    let (cos, sin) = (f64(cos).unsqueeze(1), f64(sin).unsqueeze(1));
    let (a, b) = (x.narrow(2, 0, half), x.narrow(2, half, half));
    let rest = x.narrow(2, 2 * half, x.size()[2] - 2 * half);
    Tensor::cat(&[&a * &cos - &b * &sin, &b * &cos + &a * &sin, rest], 2)
}

#[test]
fn rope_rotates_normalises_and_stores() {
    let mut rng = rng();
    for (hq, hkv, d, rotary, block_size) in [
        (4, 2, 128, 128, 16),
        (6, 2, 20, 20, 1),
        (3, 3, 64, 32, 7),
        (8, 1, 80, 0, 5),
    ] {
        for dtype in DTYPES {
            let (t, blocks, max_position) = (11, 9 * 11, 50);
            let qkv = random(&mut rng, &[t, (hq + 2 * hkv) * d]);
            let cos = random(&mut rng, &[max_position, rotary / 2]);
            let sin = random(&mut rng, &[max_position, rotary / 2]);
            let (q_norm, k_norm) = (random(&mut rng, &[d]), random(&mut rng, &[d]));
            let normed = rng.random_bool(0.5);
            let positions: Vec<i64> = (0..t).map(|_| rng.random_range(0..max_position)).collect();
            let mut slots: Vec<i64> = (0..blocks * block_size).collect();
            slots.shuffle(&mut rng);
            slots.truncate(t as usize);
            slots[3] = -1;
            let shape = [blocks, hkv, block_size, d];
            let before = random(&mut rng, &shape).to_kind(dtype.kind());
            let (mut k_cache, mut v_cache) = (before.copy(), before.copy());
            let params = RopeParams {
                num_q_heads: hq as usize,
                q_norm: normed.then_some(&q_norm),
                k_norm: normed.then_some(&k_norm),
                eps: 1e-6,
                cos: &cos,
                sin: &sin,
            };
            let positions = Tensor::from_slice(&positions);
            let slots_tensor = Tensor::from_slice(&slots).to_kind(Kind::Int);
            poison(&[t, hq, d]);
            let q = rope_and_cache(
                &qkv,
                &params,
                &positions,
                &slots_tensor,
                &mut k_cache,
                &mut v_cache,
            )
            .unwrap();

            let heads = f64(&qkv).view([t, hq + 2 * hkv, d]);
            let (cos, sin) = (
                cos.index_select(0, &positions),
                sin.index_select(0, &positions),
            );
            let mut exact_q = heads.narrow(1, 0, hq);
            let mut exact_k = heads.narrow(1, hq, hkv);
            if normed {
                exact_q = exact_norm(&exact_q, &q_norm, 1e-6);
                exact_k = exact_norm(&exact_k, &k_norm, 1e-6);
            }
            assert_close(&q, &rotated(&exact_q, &cos, &sin), 2e-6, "q");
            let exact_k = rotated(&exact_k, &cos, &sin);
            let exact_v = heads
                .narrow(1, hq + hkv, hkv)
                .to_kind(Kind::Float)
                .to_kind(dtype.kind());
            let tolerance = [2e-6, 0.0040, 0.0006][dtype as usize];
            let (mut rest_k, mut rest_v) = (k_cache.copy(), v_cache.copy());
            for (i, &slot) in slots.iter().enumerate().filter(|(_, s)| **s >= 0) {
                let (i, block, offset) = (i as i64, slot / block_size, slot % block_size);
                let at = |c: &Tensor| c.get(block).select(1, offset);
                assert_close(&at(&k_cache), &exact_k.get(i), tolerance, "k");
                assert_same_bits(&at(&v_cache), &exact_v.get(i), "v");
                at(&rest_k).copy_(&at(&before));
                at(&rest_v).copy_(&at(&before));
            }
            assert_same_bits(&rest_k, &before, "no other key is touched");
            assert_same_bits(&rest_v, &before, "no other value is touched");
            let _ = (&mut rest_k, &mut rest_v);
        }
    }
}

#[test]
fn blocks_are_copied_in_order() {
    let mut rng = rng();
    for dtype in DTYPES {
        let before = random(&mut rng, &[7, 2, 3, 5]).to_kind(dtype.kind());
        let mut cache = before.copy();
        copy_blocks(&mut cache, &[(1, 4), (4, 6), (2, 2), (0, 1)]).unwrap();
        for (block, from) in [(0, 0), (1, 0), (2, 2), (3, 3), (4, 1), (5, 5), (6, 1)] {
            assert_same_bits(&cache.get(block), &before.get(from), "block");
        }
    }
}

#[test]
fn a_new_cache_is_zero() {
    for dtype in DTYPES {
        // Larger than a huge page, and not a multiple of one.
        let cache = new_cache(301, 3, 7, 200, dtype).unwrap();
        assert_eq!(
            (cache.size(), cache.kind()),
            (vec![301, 3, 7, 200], dtype.kind())
        );
        assert_eq!(cache.count_nonzero(None).int64_value(&[]), 0);
    }
}
