//! Paged attention against dense float64 attention, and its independence of the path.

mod common;

use common::*;
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use tch::{Kind, Tensor};
use torch_ext::cpu::{AttentionParams, Dtype, paged_attention, set_num_threads};

/// Sequences whose keys and values are known densely.
struct Case {
    hq: i64,
    d: i64,
    /// Per sequence: queries of all positions [L, Hq, D], keys and values [L, Hkv, D].
    seqs: Vec<[Tensor; 3]>,
    params: AttentionParams,
}

impl Case {
    fn random(rng: &mut StdRng, hq: i64, hkv: i64, d: i64, lens: &[i64]) -> Self {
        let seqs = lens
            .iter()
            .map(|&l| [hq, hkv, hkv].map(|h| random(rng, &[l, h, d])))
            .collect();
        let scale = 1.0 / (d as f64).sqrt();
        Self {
            hq,
            d,
            seqs,
            params: AttentionParams {
                scale,
                sliding_window: None,
                soft_cap: None,
            },
        }
    }

    /// Runs the last `queries[i]` positions of sequence i, of which `context[i]` are in the cache.
    fn run(
        &self,
        rng: &mut StdRng,
        dtype: Dtype,
        block_size: i64,
        queries: &[i64],
        context: &[i64],
    ) -> Tensor {
        let hkv = self.seqs[0][1].size()[1];
        let needed: Vec<i64> = context
            .iter()
            .map(|c| (c + block_size - 1) / block_size)
            .collect();
        let max_blocks = needed.iter().max().unwrap() + 2;
        let blocks = needed.iter().sum::<i64>() + 3;
        let mut free: Vec<i32> = (0..blocks as i32).collect();
        free.shuffle(rng);
        // Whatever is not written holds NaN: reading it would show.
        let nan = |_| {
            Tensor::full(
                [blocks, hkv, block_size, self.d],
                f64::NAN,
                (dtype.kind(), tch::Device::Cpu),
            )
        };
        let [k_cache, v_cache] = [0, 1].map(nan);
        let mut tables = Vec::new();
        let (mut starts, mut q) = (vec![0i32], Vec::new());
        for (i, [all_q, k, v]) in self.seqs.iter().enumerate() {
            let table: Vec<i32> = free.split_off(free.len() - needed[i] as usize);
            for position in 0..context[i] {
                let block = i64::from(table[(position / block_size) as usize]);
                for (cache, dense) in [(&k_cache, k), (&v_cache, v)] {
                    let mut at = cache.get(block).select(1, position % block_size);
                    at.copy_(&dense.get(position));
                }
            }
            tables.extend(
                table
                    .iter()
                    .copied()
                    .chain(std::iter::repeat(-1))
                    .take(max_blocks as usize),
            );
            starts.push(starts[i] + queries[i] as i32);
            q.push(all_q.narrow(0, context[i] - queries[i], queries[i]));
        }
        let tables = Tensor::from_slice(&tables).view([self.seqs.len() as i64, max_blocks]);
        let (starts, context) = (Tensor::from_slice(&starts), Tensor::from_slice(context));
        let q = Tensor::cat(&q, 0);
        poison(&[q.size()[0], self.hq * self.d]);
        paged_attention(
            &q,
            &k_cache,
            &v_cache,
            &tables,
            &starts,
            &context,
            &self.params,
        )
        .unwrap()
    }

    /// All positions of all sequences in one call.
    fn whole(&self, rng: &mut StdRng, dtype: Dtype, block_size: i64) -> Vec<Tensor> {
        let lens: Vec<i64> = self.seqs.iter().map(|s| s[0].size()[0]).collect();
        let out = self.run(rng, dtype, block_size, &lens, &lens);
        let out = out.split_with_sizes(&lens[..], 0);
        assert!(
            out.iter()
                .all(|o| bool::try_from(o.isfinite().all()).unwrap())
        );
        out
    }

    fn exact(&self, dtype: Dtype, seq: usize) -> Tensor {
        let [q, k, v] = &self.seqs[seq];
        let l = q.size()[0];
        let group = self.hq / k.size()[1];
        let wide = |t: &Tensor| {
            f64(&t.to_kind(dtype.kind()))
                .repeat_interleave_self_int(group, 1, None)
                .transpose(0, 1)
        };
        let mut s = f64(q).transpose(0, 1).matmul(&wide(k).transpose(1, 2)) * self.params.scale;
        if let Some(cap) = self.params.soft_cap {
            s = (s / cap).tanh() * cap;
        }
        let ones = Tensor::ones([l, l], (Kind::Bool, tch::Device::Cpu));
        let mut seen = ones.tril(0);
        if let Some(w) = self.params.sliding_window {
            seen = seen.logical_and(&ones.triu(1 - w as i64));
        }
        let s = s.masked_fill(&seen.logical_not(), f64::NEG_INFINITY);
        s.softmax(-1, Kind::Double)
            .matmul(&wide(v))
            .transpose(0, 1)
            .reshape([l, self.hq * self.d])
    }
}

#[test]
fn equals_dense_attention() {
    let mut rng = rng();
    for (hq, hkv, d) in [
        (4, 2, 128),
        (3, 3, 64),
        (8, 1, 80),
        (2, 1, 96),
        (2, 2, 256),
        (4, 1, 20),
        (2, 1, 24),
        (1, 1, 7),
    ] {
        for dtype in DTYPES {
            let mut case = Case::random(&mut rng, hq, hkv, d, &[1, 63, 64, 65, 200]);
            for (window, cap) in [
                (None, None),
                (Some(1), None),
                (Some(70), Some(5.0)),
                (Some(1000), None),
                (None, Some(0.7)),
            ] {
                case.params.sliding_window = window;
                case.params.soft_cap = cap;
                let block_size = [1, 5, 16, 64][rng.random_range(0..4)];
                for (i, out) in case.whole(&mut rng, dtype, block_size).iter().enumerate() {
                    let what =
                        format!("{dtype:?} heads {hq}/{hkv} of {d}, seq {i}, {window:?}, {cap:?}");
                    assert_close(out, &case.exact(dtype, i), 3e-6, &what);
                }
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_path() {
    let mut rng = rng();
    for (hq, hkv, d, window) in [(4, 2, 64, None), (6, 1, 20, None), (2, 2, 128, Some(50))] {
        let mut case = Case::random(&mut rng, hq, hkv, d, &[1, 40, 150, 333]);
        case.params.sliding_window = window;
        for dtype in DTYPES {
            set_num_threads(1);
            let expected = case.whole(&mut rng, dtype, 16);
            for (threads, block_size) in [(2, 1), (3, 7), (1, 64), (2, 16)] {
                set_num_threads(threads);
                let whole = case.whole(&mut rng, dtype, block_size);
                for (a, b) in whole.iter().zip(&expected) {
                    assert_same_bits(a, b, &format!("{threads} threads, blocks of {block_size}"));
                }
                // Random chunks of every sequence at once; some sequences sit a step out.
                let lens: Vec<i64> = case.seqs.iter().map(|s| s[0].size()[0]).collect();
                let mut done = vec![0; lens.len()];
                while done != lens {
                    let queries: Vec<i64> = lens
                        .iter()
                        .zip(&done)
                        .map(|(len, done)| [0, 1, 7, 90][rng.random_range(0..4)].min(len - done))
                        .collect();
                    let context: Vec<i64> = done.iter().zip(&queries).map(|(a, b)| a + b).collect();
                    let out = case.run(&mut rng, dtype, block_size, &queries, &context);
                    for (i, out) in out.split_with_sizes(&queries[..], 0).iter().enumerate() {
                        let part = expected[i].narrow(0, done[i], queries[i]);
                        assert_same_bits(out, &part, &format!("sequence {i} from {}", done[i]));
                    }
                    done = context;
                }
            }
        }
    }
}

#[test]
fn blocks_before_the_window_are_not_read() {
    let mut rng = rng();
    let mut case = Case::random(&mut rng, 2, 1, 32, &[300]);
    case.params.sliding_window = Some(40);
    let expected = case.exact(Dtype::F32, 0);
    let [q, k, v] = &case.seqs[0];
    let table: Vec<i32> = (0..300 / 4)
        .map(|b| if b < (299 - 39) / 4 { -1 } else { b })
        .collect();
    let pages = |t: &Tensor| t.view([75, 4, 1, 32]).transpose(1, 2).contiguous();
    let (k, v) = (pages(k), pages(v));
    for cache in [&k, &v] {
        let _ = cache.narrow(0, 0, (299 - 39) / 4).fill_(f64::NAN);
    }
    let out = paged_attention(
        &q.narrow(0, 299, 1),
        &k,
        &v,
        &Tensor::from_slice(&table).view([1, 75]),
        &Tensor::from_slice(&[0, 1]),
        &Tensor::from_slice(&[300]),
        &case.params,
    )
    .unwrap();
    assert_close(&out, &expected.narrow(0, 299, 1), 3e-6, "windowed decode");
}
