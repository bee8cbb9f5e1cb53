//! The step's inputs as the device builds them, against plain loops.
#![cfg(feature = "cuda")]

use rand::{Rng, SeedableRng, rngs::StdRng};
use tch::{Device, Kind, Tensor};
use torch_ext::cuda::{self, HostInts, Kernels, ROW_INTS, Readback, RowLimits, StepTensors};

const SLOTS: usize = 9;
const WIDTH: usize = 13;
const BLOCK: usize = 4;

fn ints(tensor: &Tensor) -> Vec<i64> {
    let flat = tensor
        .to_device(Device::Cpu)
        .to_kind(Kind::Int64)
        .reshape([-1]);
    Vec::<i64>::try_from(flat).unwrap()
}

#[test]
fn rows_become_the_tensors_of_the_model() {
    if !cuda::is_available() {
        println!("skipped: no CUDA device");
        return;
    }
    let kernels = Kernels::new(0).unwrap();
    let on = |values: &[i32]| Tensor::from_slice(values).to_device(kernels.device());
    let mut rng = StdRng::seed_from_u64(1);
    let tables = Tensor::zeros([SLOTS as i64, WIDTH as i64], (Kind::Int, kernels.device()));
    let mut mirror = vec![vec![0; WIDTH]; SLOTS];
    let mut uploaded = HostInts::new(ROW_INTS * SLOTS, 2, 0).unwrap();
    let mut readback = Readback::new(SLOTS, Kind::Int, 0).unwrap();
    for round in 0..30 {
        // Random pieces of tables change.
        let (mut segments, mut blocks) = (Vec::new(), Vec::new());
        for (slot, table) in mirror.iter_mut().enumerate() {
            let at = rng.random_range(0..WIDTH);
            let len = if round == 0 {
                WIDTH
            } else {
                rng.random_range(0..=WIDTH - at)
            };
            let at = if round == 0 { 0 } else { at };
            segments.extend([slot as i32, at as i32, blocks.len() as i32, len as i32]);
            for entry in &mut table[at..at + len] {
                *entry = rng.random_range(1..1000);
                blocks.push(*entry);
            }
        }
        blocks.push(-7);
        kernels
            .apply_tables(&segments, &on(&segments), &on(&blocks), &tables)
            .unwrap();

        let last: Vec<i32> = (0..SLOTS).map(|_| rng.random_range(0..500)).collect();
        let last_token = on(&last);
        let (mut rows, mut tokens, mut first) = (Vec::new(), Vec::new(), 0);
        let (mut ids, mut positions, mut places, mut starts) = (vec![], vec![], vec![], vec![]);
        let (mut contexts, mut ends, mut slots) = (vec![], vec![], vec![]);
        for slot in 0..SLOTS as i32 {
            let start = rng.random_range(0..40);
            let (len, source) = match slot % 3 {
                0 => (1, -1),
                _ => (
                    rng.random_range(1..=WIDTH as i32 * BLOCK as i32 - start),
                    tokens.len() as i32,
                ),
            };
            let padding = slot == 6;
            rows.extend([if padding { -1 } else { slot }, start, len, source, first]);
            starts.push(i64::from(first));
            for i in 0..len {
                let position = (start + i) as usize;
                let token = if source < 0 {
                    last[slot as usize]
                } else {
                    rng.random_range(0..500)
                };
                if source >= 0 {
                    tokens.push(token);
                }
                let block = i64::from(mirror[slot as usize][position / BLOCK]);
                ids.push(if padding { 0 } else { i64::from(token) });
                positions.push(if padding { 0 } else { position as i64 });
                places.push(if padding {
                    -1
                } else {
                    block * BLOCK as i64 + (position % BLOCK) as i64
                });
            }
            first += len;
            contexts.push(if padding { 0 } else { i64::from(start + len) });
            ends.push(i64::from(start + len));
            slots.push(if padding { -1 } else { i64::from(slot) });
        }
        starts.push(i64::from(first));
        tokens.push(-7);
        let limits = RowLimits {
            slots: SLOTS,
            width: WIDTH,
            block_size: BLOCK,
            batch: first as usize,
            uploaded: tokens.len(),
        };
        limits.check(&rows).unwrap();
        uploaded.put(&rows).unwrap();
        let samples: bool = rng.random();
        let mut out = StepTensors::new(first as usize, SLOTS, WIDTH, &kernels).unwrap();
        kernels
            .prepare_rows(
                SLOTS,
                &mut uploaded,
                &on(&tokens),
                &last_token,
                &tables,
                &limits,
                samples,
                Some((&mut readback, SLOTS - 2)),
                &mut out,
            )
            .unwrap();
        assert_eq!(ints(&out.ids), ids);
        assert_eq!(ints(&out.positions), positions);
        assert_eq!(ints(&out.cache_slots), places);
        assert_eq!(ints(&out.query_start), starts);
        assert_eq!(ints(&out.context_len), contexts);
        assert_eq!(ints(&out.row_ends), ends);
        assert_eq!(ints(&out.row_slots), slots);
        let sampled = if samples {
            slots.clone()
        } else {
            vec![-1; SLOTS]
        };
        assert_eq!(ints(&out.sample_slots), sampled);
        for (row, (table, &end)) in mirror.iter().zip(&contexts).enumerate() {
            let used = (end as usize).div_ceil(BLOCK);
            let got = ints(&out.block_tables.get(row as i64));
            let want: Vec<i64> = table[..used].iter().map(|b| i64::from(*b)).collect();
            assert_eq!(got[..used], want);
        }

        let sampled: Vec<i32> = (0..SLOTS).map(|_| rng.random_range(-2..500)).collect();
        let before = match round {
            0 => vec![0; SLOTS - 2],
            _ => ints(&readback.wait().unwrap()),
        };
        kernels
            .keep_tokens(&on(&sampled), &out.row_slots, &last_token, &out)
            .unwrap();
        readback.written(SLOTS - 2).unwrap();
        let told: Vec<i64> = (0..SLOTS - 2)
            .map(|s| if s == 6 { before[s] } else { sampled[s].into() })
            .collect();
        assert_eq!(ints(&readback.wait().unwrap()), told);
        let kept: Vec<i64> = (0..SLOTS)
            .map(|s| if s == 6 { last[s] } else { sampled[s].max(0) }.into())
            .collect();
        assert_eq!(ints(&last_token), kept);
    }
}

#[test]
fn rows_outside_of_the_limits_are_refused() {
    let limits = RowLimits {
        slots: 4,
        width: 2,
        block_size: 8,
        batch: 20,
        uploaded: 10,
    };
    let good = [3, 5, 11, -1, 0];
    assert!(limits.check(&[3, 5, 10, 0, 9]).is_ok());
    assert!(limits.check(&good).is_err(), "a sampled token is one");
    for bad in [
        [4, 0, 1, 0, 0],
        [0, -1, 1, 0, 0],
        [0, 16, 1, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 2, 9, 0],
        [0, 0, 1, 0, 20],
    ] {
        assert!(limits.check(&bad).is_err(), "{bad:?}");
    }
}
