//! The same source compiled for another instruction set computes the same function: every set that
//! this CPU has, side by side. (The public tests run the widest one against float64.)

use tch::{Device, Kind, Tensor};

use super::ffi::under_test::with_each_set;
use super::*;

fn random(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu))
}

#[track_caller]
fn assert_all_close(results: Vec<(InstructionSet, Tensor)>, tolerance: f64) {
    let (_, expected) = &results[0];
    for (set, found) in &results[1..] {
        let error = ((found - expected).abs() / (expected.abs() + 1.0))
            .max()
            .double_value(&[]);
        assert!(error <= tolerance, "{set:?} is off by {error}");
    }
}

#[test]
fn packing_is_one_layout() {
    for (source, dtype) in ALL.into_iter().flat_map(|s| ALL.map(|d| (s, d))) {
        let w = random(&[53, 37]).to_kind(source.kind());
        let expected = w
            .to_kind(Kind::Float)
            .to_kind(dtype.kind())
            .to_kind(Kind::Float);
        let packed = with_each_set(|| PackedWeight::from_tensor(&w, dtype).unwrap());
        for (writer, packed) in &packed {
            for (reader, found) in with_each_set(|| packed.to_tensor()) {
                assert_eq!(
                    found, expected,
                    "{source:?} to {dtype:?}, {writer:?} to {reader:?}"
                );
            }
        }
    }
}

const ALL: [Dtype; 3] = [Dtype::F32, Dtype::Bf16, Dtype::F16];

#[test]
fn products_agree() {
    for dtype in ALL {
        let packed = PackedWeight::from_tensor(&random(&[35, 301]), dtype).unwrap();
        for m in [1, 3, 7, 12, 13, 25, 110] {
            let (x, bias) = (random(&[m, 301]), random(&[35]));
            let run = || {
                let whole = packed.linear(&x, Some(&bias)).unwrap();
                for i in 0..m {
                    let row = packed.linear(&x.narrow(0, i, 1), Some(&bias)).unwrap();
                    assert_eq!(row, whole.narrow(0, i, 1), "batch of {m}, row {i}");
                }
                whole
            };
            assert_all_close(with_each_set(run), 1e-4);
        }
    }
}

#[test]
fn rows_agree() {
    let (x, w) = (random(&[5, 1003]), random(&[1003]));
    assert_all_close(with_each_set(|| rms_norm(&x, &w, 1e-6).unwrap()), 3e-6);
    let x = random(&[5, 202]) * 10.0;
    assert_all_close(with_each_set(|| silu_mul(&x).unwrap()), 1e-6);
}

#[test]
fn attention_agrees() {
    let (hq, hkv, block) = (6, 2, 5);
    for (d, dtype) in [20, 64, 80].into_iter().flat_map(|d| ALL.map(|t| (d, t))) {
        let qkv = random(&[90, (hq + 2 * hkv) * d]);
        let (cos, sin) = (random(&[90, d / 2]), random(&[90, d / 2]));
        let norm = random(&[d]);
        let index = Tensor::arange(90, (Kind::Int64, Device::Cpu));
        let params = RopeParams {
            num_q_heads: hq as usize,
            q_norm: Some(&norm),
            k_norm: Some(&norm),
            eps: 1e-6,
            cos: &cos,
            sin: &sin,
        };
        let run = || {
            let [mut k, mut v] =
                [0, 1].map(|_| Tensor::zeros([18, hkv, block, d], (dtype.kind(), Device::Cpu)));
            let q = rope_and_cache(&qkv, &params, &index, &index, &mut k, &mut v).unwrap();
            let table = Tensor::arange(18, (Kind::Int, Device::Cpu)).view([1, 18]);
            let starts = Tensor::from_slice(&[0i64, 90]);
            let context = Tensor::from_slice(&[90i64]);
            let params = AttentionParams {
                scale: 0.2,
                sliding_window: Some(77),
                soft_cap: Some(20.0),
            };
            paged_attention(&q, &k, &v, &table, &starts, &context, &params).unwrap()
        };
        // A key that two sets round apart in a narrow cache moves the result by that much.
        let tolerance = [1e-4, 0.05, 0.01][dtype as usize];
        assert_all_close(with_each_set(run), tolerance);
    }
}
