//! Arguments that do not fit get an error that names them, and nothing is written.

mod common;

use common::DTYPES;
use tch::{Device, Kind, Tensor};
use torch_ext::Error;
use torch_ext::cpu::*;

fn ones(shape: &[i64]) -> Tensor {
    Tensor::ones(shape, (Kind::Float, Device::Cpu))
}

fn ints(values: &[i64]) -> Tensor {
    Tensor::from_slice(values)
}

#[track_caller]
fn assert_refused<T>(result: Result<T, Error>, parts: &[&str]) {
    let message = result.err().expect("an error").to_string();
    assert!(
        parts.iter().all(|p| message.contains(p)),
        "{message:?} lacks one of {parts:?}"
    );
}

#[test]
fn linear() {
    let w = PackedWeight::from_tensor(&ones(&[5, 8]), Dtype::F32).unwrap();
    assert_refused(
        w.linear(&ones(&[2, 7]), None),
        &["linear", "`x`", "[2, 7]", "[_, 8]"],
    );
    assert_refused(w.linear(&ones(&[8]), None), &["`x`", "[8]"]);
    let double = ones(&[2, 8]).to_kind(Kind::Double);
    assert_refused(w.linear(&double, None), &["`x`", "Double", "Float"]);
    assert_refused(w.linear(&ones(&[8, 2]).tr(), None), &["`x`", "contiguous"]);
    assert_refused(
        w.linear(&ones(&[2, 8]), Some(&ones(&[4]))),
        &["`bias`", "[4]", "[5]"],
    );
    assert_refused(w.linear(&Tensor::new(), None), &["`x`"]);
    let sparse = ones(&[2, 8]).to_sparse(None, None::<&[i64]>, None);
    assert_refused(w.linear(&sparse, None), &["`x`"]);

    let mut residual = ones(&[2, 4]);
    assert_refused(
        w.linear_add(&ones(&[2, 8]), None, &mut residual),
        &["`residual`", "[2, 5]"],
    );
    assert_eq!(residual, ones(&[2, 4]));
    assert_refused(w.embedding(&ints(&[0, 5])), &["`ids`[1]", "5", "0..5"]);
    assert_refused(w.embedding(&ints(&[-1])), &["`ids`[0]", "-1"]);
    assert_refused(w.embedding(&ones(&[1])), &["`ids`", "Float"]);
}

#[test]
fn packing() {
    let mut w = PackedWeight::zeros(5, 8, Dtype::Bf16).unwrap();
    for dtype in DTYPES {
        let row = 8 * dtype.size();
        assert_refused(
            w.pack_rows(0, &vec![0; row + 1], dtype),
            &["`bytes`", "multiple"],
        );
        assert_refused(
            w.pack_rows(4, &vec![0; 2 * row], dtype),
            &["at most 1 rows from row 4"],
        );
        assert_refused(w.pack_rows(usize::MAX, &vec![0; row], dtype), &["`bytes`"]);
        assert_refused(
            w.pack_columns(0, &vec![0; row], dtype, 8, 1..9),
            &["`columns`", "1..9"],
        );
        assert_refused(
            w.pack_columns(0, &vec![0; row], dtype, 8, 0..7),
            &["8 columns"],
        );
        let huge = w.pack_columns(0, &vec![0; row], dtype, usize::MAX / 2 + 1, 0..8);
        assert_refused(huge, &["`columns`"]);
        assert!(w.pack_rows(5, &[], dtype).is_ok());
    }
    for (n, k) in [
        (0, 1),
        (1, 0),
        (usize::MAX, 1),
        (1, usize::MAX),
        (1 << 40, 1 << 40),
    ] {
        assert_refused(PackedWeight::zeros(n, k, Dtype::F32), &["n, k"]);
    }
    assert_refused(
        PackedWeight::from_tensor(&ones(&[3]), Dtype::F32),
        &["`tensor`", "[_, _]"],
    );
}

#[test]
fn rows() {
    assert_refused(
        rms_norm(&ones(&[2, 3]), &ones(&[4]), 1e-6),
        &["`weight`", "[4]", "[3]"],
    );
    for eps in [f64::NAN, -1.0, f64::INFINITY] {
        assert_refused(rms_norm(&ones(&[2, 3]), &ones(&[3]), eps), &["`eps`"]);
    }
    let mut residual = ones(&[1, 3]);
    let refused = add_rms_norm(&mut residual, &ones(&[2, 3]), &ones(&[3]), 1e-6);
    assert_refused(refused, &["add_rms_norm", "`residual`"]);
    assert_refused(silu_mul(&ones(&[2, 3])), &["`gate_up`", "even"]);
    for shape in [[usize::MAX, 2, 1, 1], [1 << 40, 1 << 10, 1 << 10, 1 << 10]] {
        let [blocks, heads, block_size, d] = shape;
        assert_refused(
            new_cache(blocks, heads, block_size, d, Dtype::F32),
            &["new_cache"],
        );
    }
    assert_refused(
        new_cache(1 << 30, 1 << 10, 1 << 10, 1, Dtype::F32),
        &["cannot map"],
    );
    let mut cache = ones(&[3, 1, 2, 4]);
    assert_refused(
        copy_blocks(&mut cache, &[(0, 1), (2, 3)]),
        &["`pairs`", "2 to 3", "below 3"],
    );
}

#[test]
fn rope() {
    let (cos, sin) = (ones(&[10, 2]), ones(&[10, 2]));
    let good = RopeParams {
        num_q_heads: 2,
        q_norm: None,
        k_norm: None,
        eps: 0.0,
        cos: &cos,
        sin: &sin,
    };
    let run = |params: &RopeParams<'_>, width, positions: &[i64], slots: &[i64]| {
        let (mut k, mut v) = (ones(&[3, 1, 2, 4]), ones(&[3, 1, 2, 4]));
        let (positions, slots) = (ints(positions), ints(slots));
        let result = rope_and_cache(
            &ones(&[1, width]),
            params,
            &positions,
            &slots,
            &mut k,
            &mut v,
        );
        if result.is_err() {
            assert_eq!((k, v), (ones(&[3, 1, 2, 4]), ones(&[3, 1, 2, 4])));
        }
        result
    };
    assert!(run(&good, 16, &[9], &[5]).is_ok());
    assert_refused(run(&good, 12, &[0], &[0]), &["`qkv`", "[_, 16]"]);
    assert_refused(run(&good, 16, &[10], &[0]), &["`positions`[0]", "0..10"]);
    assert_refused(run(&good, 16, &[-1], &[0]), &["`positions`[0]"]);
    assert_refused(run(&good, 16, &[0], &[6]), &["`slots`[0]", "-1..6"]);
    assert_refused(run(&good, 16, &[0], &[-2]), &["`slots`[0]"]);
    assert_refused(run(&good, 16, &[0], &[0, 1]), &["`slots`", "[2]", "[1]"]);
    let wide = ones(&[10, 3]);
    let bad = RopeParams {
        cos: &wide,
        sin: &wide,
        ..good
    };
    assert_refused(run(&bad, 16, &[0], &[0]), &["`cos`", "at most 2"]);
    let bad = RopeParams {
        q_norm: Some(&wide),
        ..good
    };
    assert_refused(run(&bad, 16, &[0], &[0]), &["`q_norm`", "[4]"]);
}

#[test]
fn attention() {
    let cache = ones(&[3, 2, 4, 8]);
    let good = AttentionParams {
        scale: 1.0,
        sliding_window: None,
        soft_cap: None,
    };
    let run = |q: &Tensor, tables: &[i32], starts: &[i64], context: &[i64], params: &_| {
        let tables = Tensor::from_slice(tables).view([context.len() as i64, -1]);
        paged_attention(
            q,
            &cache,
            &cache,
            &tables,
            &ints(starts),
            &ints(context),
            params,
        )
    };
    let q = ones(&[2, 4, 8]);
    assert!(run(&q, &[2, 0], &[0, 2], &[8], &good).is_ok());
    assert_refused(
        run(&ones(&[2, 3, 8]), &[0], &[0, 2], &[2], &good),
        &["`q`", "multiple of 2"],
    );
    assert_refused(
        run(&ones(&[2, 4, 9]), &[0], &[0, 2], &[2], &good),
        &["`q`", "[_, _, 8]"],
    );
    assert_refused(
        run(&q, &[0], &[0, 1], &[2], &good),
        &["`query_start`", "0 to 2"],
    );
    assert_refused(
        run(&q, &[0, 1], &[0, 3, 2], &[3, 2], &good),
        &["`query_start`"],
    );
    assert_refused(
        run(&q, &[0], &[0, 2], &[1], &good),
        &["`context_len`[0]", "2..=4"],
    );
    assert_refused(
        run(&q, &[0], &[0, 2], &[5], &good),
        &["`context_len`[0]", "is 5"],
    );
    assert_refused(
        run(&q, &[0, 3], &[0, 2], &[5], &good),
        &["`block_tables`[1]", "is 3", "0..3"],
    );
    assert_refused(
        run(&q, &[-1, 0], &[0, 2], &[5], &good),
        &["`block_tables`[0]", "is -1"],
    );
    let bad = AttentionParams {
        sliding_window: Some(0),
        ..good
    };
    assert_refused(run(&q, &[0], &[0, 2], &[2], &bad), &["`sliding_window`"]);
    for scale in [f64::NAN, f64::INFINITY] {
        let bad = AttentionParams { scale, ..good };
        assert_refused(run(&q, &[0], &[0, 2], &[2], &bad), &["`scale`"]);
    }
    let narrow = cache.to_kind(Kind::BFloat16);
    let tables = Tensor::from_slice(&[0i32]).view([1, 1]);
    let starts = ints(&[0, 2]);
    let mixed = paged_attention(&q, &cache, &narrow, &tables, &starts, &ints(&[2]), &good);
    assert_refused(mixed, &["`v_cache`", "Bf16", "F32"]);
}
