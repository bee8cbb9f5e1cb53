//! Packed products, residual products and embeddings against float64.

mod common;

use common::*;
use rand::Rng;
use tch::{Kind, Tensor};
use torch_ext::cpu::{Dtype, PackedWeight, set_num_threads};

/// The weight as it is stored: rounded by libtorch, which rounds to nearest, ties to even.
fn stored(w: &Tensor, dtype: Dtype) -> Tensor {
    w.to_kind(dtype.kind()).to_kind(Kind::Float)
}

/// Error of a chain of `k` roundings: k eps sum |x| |w|.
fn bound(x: &Tensor, w: &Tensor) -> Tensor {
    let k = x.size()[1] as f64;
    f64(x).abs().matmul(&f64(w).abs().tr()) * ((k + 2.0) * f64::from(f32::EPSILON)) + 1e-30
}

#[test]
fn product_equals_float64_within_its_rounding() {
    let mut rng = rng();
    let shapes = [
        (1, 1, 1),
        (1, 33, 100),
        (2, 16, 64),
        (5, 47, 257),
        (6, 100, 31),
        (7, 19, 300),
        (13, 65, 513),
    ];
    for (m, n, k) in shapes.into_iter().chain([(97, 33, 770), (200, 130, 129)]) {
        let (w, b) = (random(&mut rng, &[n, k]), random(&mut rng, &[n]));
        let x = random(&mut rng, &[m, k]);
        for dtype in DTYPES {
            let packed = PackedWeight::from_tensor(&w, dtype).unwrap();
            let w = stored(&w, dtype);
            let exact = f64(&x).matmul(&f64(&w).tr());
            let what = format!("{dtype:?} {m}x{n}x{k}");
            poison(&[m, n]);
            let y = packed.linear(&x, None).unwrap();
            assert_within(&y, &exact, &bound(&x, &w), &what);

            poison(&[m, n]);
            let with_bias = packed.linear(&x, Some(&b)).unwrap();
            assert_same_bits(&with_bias, &(&y + &b), &what);
            let residual = random(&mut rng, &[m, n]);
            let mut sum = residual.copy();
            packed.linear_add(&x, Some(&b), &mut sum).unwrap();
            assert_same_bits(&sum, &(&residual + &with_bias), &what);
        }
    }
}

#[test]
fn rows_do_not_depend_on_the_batch_nor_on_threads() {
    let mut rng = rng();
    let (m, n, k) = (230, 53, 777);
    let x = random(&mut rng, &[m, k]);
    for dtype in DTYPES {
        let packed = PackedWeight::from_tensor(&random(&mut rng, &[n, k]), dtype).unwrap();
        set_num_threads(1);
        let alone: Vec<Tensor> = (0..m)
            .map(|i| packed.linear(&x.narrow(0, i, 1), None).unwrap())
            .collect();
        let alone = Tensor::cat(&alone, 0);
        for threads in [1, 2, 3] {
            set_num_threads(threads);
            for chunk in [2, 5, 6, 7, 12, 13, 31, 96, 97, m] {
                let parts: Vec<Tensor> = x
                    .split(chunk, 0)
                    .iter()
                    .map(|x| packed.linear(x, None).unwrap())
                    .collect();
                let what = format!("{dtype:?}, {threads} threads, chunks of {chunk}");
                assert_same_bits(&Tensor::cat(&parts, 0), &alone, &what);
            }
        }
    }
}

#[test]
fn packing_rounds_like_libtorch() {
    let mut rng = rng();
    // Random bit patterns: subnormals, infinities, ties and NaNs among them.
    let (n, k) = (61, 203);
    let mut values: Vec<f32> = (0..n * k).map(|_| f32::from_bits(rng.random())).collect();
    for (i, v) in values.iter_mut().enumerate().filter(|(i, _)| i % 3 == 0) {
        // In the range of float16, with few bits set below its last: many ties.
        let exponent = rng.random_range(98u32..145);
        *v = f32::from_bits(
            (exponent << 23) | ((rng.random::<u32>() & 0x7ff) << 12) | (i as u32 & 1) << 31,
        );
    }
    let w = Tensor::from_slice(&values).view([n, k]);
    for source in DTYPES {
        let w = w.to_kind(source.kind());
        for dtype in DTYPES {
            let expected = w
                .to_kind(Kind::Float)
                .to_kind(dtype.kind())
                .to_kind(Kind::Float);
            let got = PackedWeight::from_tensor(&w, dtype).unwrap().to_tensor();
            for (i, (a, b)) in bits(&got).into_iter().zip(bits(&expected)).enumerate() {
                let (a, b) = (f32::from_bits(a), f32::from_bits(b));
                let same = a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
                assert!(
                    same,
                    "{source:?} to {dtype:?}, element {i}: {a:e} is not {b:e}"
                );
            }
        }
    }
}

/// A tensor's elements as a file would hold them, `offset` bytes into a buffer.
fn raw(t: &Tensor, dtype: Dtype, offset: usize) -> Vec<u8> {
    let values: Vec<f32> = bits(t).into_iter().map(f32::from_bits).collect();
    let mut bytes = vec![0xee; offset];
    for v in values {
        match dtype {
            Dtype::F32 => bytes.extend(v.to_ne_bytes()),
            Dtype::Bf16 => bytes.extend(half::bf16::from_f32(v).to_ne_bytes()),
            Dtype::F16 => bytes.extend(half::f16::from_f32(v).to_ne_bytes()),
        }
    }
    bytes
}

#[test]
fn stacked_slices_from_unaligned_bytes_and_column_shards() {
    let mut rng = rng();
    let k = 45;
    for (source, dtype) in DTYPES.into_iter().flat_map(|s| DTYPES.map(|d| (s, d))) {
        let parts = [
            random(&mut rng, &[32, k]),
            random(&mut rng, &[7, k]),
            random(&mut rng, &[50, k]),
        ];
        let mut packed = PackedWeight::zeros(89, k as usize, dtype).unwrap();
        let mut shard = PackedWeight::zeros(89, 13, dtype).unwrap();
        let mut row = 0;
        for (i, part) in parts.iter().enumerate() {
            let bytes = raw(part, source, i);
            packed.pack_rows(row, &bytes[i..], source).unwrap();
            shard
                .pack_columns(row, &bytes[i..], source, k as usize, 30..43)
                .unwrap();
            row += part.size()[0] as usize;
        }
        let expected = stored(&stored(&Tensor::cat(&parts, 0), source), dtype);
        assert_same_bits(&packed.to_tensor(), &expected, "stacked");
        assert_same_bits(
            &shard.to_tensor(),
            &expected.narrow(1, 30, 13).contiguous(),
            "shard",
        );
    }
}

#[test]
fn embedding_gathers_rows() {
    let mut rng = rng();
    let w = random(&mut rng, &[101, 67]);
    let ids: Vec<i64> = (0..40).map(|_| rng.random_range(0..101)).collect();
    for dtype in DTYPES {
        let packed = PackedWeight::from_tensor(&w, dtype).unwrap();
        let ids = Tensor::from_slice(&ids);
        poison(&[40, 67]);
        let y = packed.embedding(&ids).unwrap();
        assert_same_bits(&y, &stored(&w, dtype).index_select(0, &ids), "int64");
        assert_same_bits(
            &packed.embedding(&ids.to_kind(Kind::Int)).unwrap(),
            &y,
            "int32",
        );
    }
}

#[test]
fn no_rows_give_no_rows() {
    let packed = PackedWeight::zeros(5, 3, Dtype::F32).unwrap();
    let x = Tensor::zeros([0, 3], (Kind::Float, tch::Device::Cpu));
    assert_eq!(packed.linear(&x, None).unwrap().size(), [0, 5]);
    let ids = Tensor::zeros([0], (Kind::Int64, tch::Device::Cpu));
    assert_eq!(packed.embedding(&ids).unwrap().size(), [0, 3]);
}
