//! The same bits whatever a sequence is batched with, however it is chunked, in blocks of any
//! size.

use batch_scheduler::SlotId;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sampler::SamplingParams;
use tch::{Kind, Tensor};
use tp_model::{Backend, DtypeChoice, LoadOptions, Model};

use super::plans::{admit, alone, bits, empty, fixture, load, params, row, run, runner};

const DTYPES: [DtypeChoice; 3] = [
    DtypeChoice::Float32,
    DtypeChoice::Bfloat16,
    DtypeChoice::Float16,
];

fn tokens(rng: &mut StdRng, len: usize, vocab: usize) -> Vec<u32> {
    (0..len)
        .map(|_| rng.random_range(0..vocab as u32))
        .collect()
}

fn equal_bits(a: &Tensor, b: &Tensor) -> bool {
    a.size() == b.size() && a.eq_tensor(b).all().int64_value(&[]) == 1
}

#[test]
fn chunked_prefill_is_whole_prefill() {
    let mut rng = StdRng::seed_from_u64(11);
    for name in [
        "qwen3-headdim",
        "mistral-window",
        "llama-dynamic",
        "qwen2-tied",
    ] {
        for dtype in DTYPES {
            let model = load(name, dtype);
            let prompt = tokens(&mut rng, 157, model.config().vocab_size);
            let whole = model.forward_logits(&prompt, usize::MAX).unwrap();
            assert!(whole.isfinite().all().int64_value(&[]) == 1);
            for block_size in [1, 16, 64] {
                for chunk in [1, 7, 64] {
                    let mut session = model
                        .session(prompt.len(), prompt.len(), block_size)
                        .unwrap();
                    let parts: Vec<Tensor> = prompt
                        .chunks(chunk)
                        .map(|part| session.forward(part).unwrap())
                        .collect();
                    let chunked = Tensor::cat(&parts, 0);
                    assert!(
                        equal_bits(&chunked, &whole),
                        "{name}, {dtype:?}, blocks of {block_size}, chunks of {chunk}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_sequence_does_not_depend_on_its_batch() {
    const SEQS: usize = 6;
    const STEPS: usize = 12;
    let mut rng = StdRng::seed_from_u64(12);
    for (name, dtype) in [
        ("qwen3-headdim", DtypeChoice::Float32),
        ("mistral-window", DtypeChoice::Bfloat16),
        ("llama-dynamic", DtypeChoice::Float32),
    ] {
        let mut single = runner(load(name, dtype), 1, 16);
        let mut batch = runner(load(name, dtype), SEQS, 5);
        let vocab = single.model().config().vocab_size;
        let prompts: Vec<Vec<u32>> = (0..SEQS)
            .map(|_| {
                let len = rng.random_range(1..120);
                tokens(&mut rng, len, vocab)
            })
            .collect();
        let all: Vec<_> = (0..SEQS)
            .map(|i| {
                params(SamplingParams {
                    temperature: if i % 2 == 0 { 0.0 } else { 1.0 },
                    seed: Some(i as u64),
                    logprobs: Some(0),
                    ..SamplingParams::default()
                })
            })
            .collect();
        let want: Vec<_> = prompts
            .iter()
            .zip(&all)
            .map(|(prompt, params)| alone(&mut single, prompt, params, STEPS))
            .collect();

        // Every step each sequence gets a random number of tokens, or none.
        let mut got = vec![Vec::new(); SEQS];
        let mut computed = [0usize; SEQS];
        let mut step = 0;
        while got.iter().any(|results| results.len() < STEPS) {
            let mut plan = empty(step);
            for slot in 0..SEQS {
                let have = prompts[slot].len() + got[slot].len();
                if got[slot].len() == STEPS || rng.random_bool(0.3) {
                    continue;
                }
                if computed[slot] == 0 {
                    admit(&mut plan, &batch, slot as u32, &prompts[slot], &all[slot]);
                }
                let len = rng.random_range(1..=40).min(have - computed[slot]);
                let sample = computed[slot] + len == have;
                row(&mut plan, slot as u32, computed[slot], len, sample);
                computed[slot] += len;
            }
            step += 1;
            let slots: Vec<SlotId> = plan.samples.iter().map(|s| s.slot).collect();
            for (slot, sample) in slots.into_iter().zip(run(&mut batch, plan)) {
                got[slot.0 as usize].push(bits(&sample));
            }
        }
        assert_eq!(got, want, "{name}, {dtype:?}");
    }
}

#[test]
fn sixteen_bit_weights_agree_with_the_reference() {
    let mut rng = StdRng::seed_from_u64(13);
    for name in ["qwen3-headdim", "llama-bias", "qwen2-tied"] {
        for dtype in DTYPES {
            let [ours, reference] = [Backend::Cpu, Backend::Reference].map(|backend| {
                let options = LoadOptions {
                    dtype,
                    backend,
                    ..LoadOptions::default()
                };
                let model = Model::load(&fixture(name), &options).unwrap();
                let prompt = tokens(&mut StdRng::seed_from_u64(5), 71, model.config().vocab_size);
                model
                    .forward_logits(&prompt, rng.random_range(1..80))
                    .unwrap()
            });
            let scale = reference.abs().max().double_value(&[]);
            let error = (ours - reference)
                .abs()
                .max()
                .to_kind(Kind::Double)
                .double_value(&[]);
            // Weights are the same bits on both sides; only the cache rounds differently.
            let allowed = if dtype == DtypeChoice::Float32 {
                2e-5
            } else {
                2e-2
            };
            assert!(
                error <= allowed * scale,
                "{name}, {dtype:?}: {error:.1e} of {scale:.1}"
            );
        }
    }
}
