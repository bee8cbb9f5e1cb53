//! Pipeline stages: what each holds, and that together they are the model, to the bit.

use std::thread;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tch::Tensor;
use tp_model::comm::{Health, Threads};
use tp_model::{Backend, LoadOptions, Model, ModelConfig, ParallelConfig};

use super::exchange::{TIMEOUT, on_worlds};
use super::shares::{fixture, options, share};

fn grid(tp: usize, pp: usize) -> ParallelConfig {
    ParallelConfig {
        pipeline_parallel_size: pp,
        ..ParallelConfig::tensor(tp)
    }
}

/// Runs `work` on all ranks' models, each on a thread of its own.
fn on_ranks<T: Send>(
    name: &str,
    options: &LoadOptions<'_>,
    parallel: &ParallelConfig,
    work: impl Fn(Model) -> T + Sync,
) -> Vec<T> {
    let dir = fixture(name);
    let layers = ModelConfig::from_dir(&dir).unwrap().num_layers;
    let partition = parallel.partition(layers).unwrap();
    thread::scope(|scope| {
        let (work, dir, partition) = (&work, &dir, &partition);
        let start = |groups| {
            scope.spawn(move || {
                tch::set_num_threads(1);
                work(Model::load_stage(dir, options, groups, partition.clone()).unwrap())
            })
        };
        let ranks = Threads::grid(parallel, TIMEOUT, &Health::default());
        let threads: Vec<_> = ranks.into_iter().map(start).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// Logits of a prompt, in chunks.
fn logits(
    name: &str,
    parallel: &ParallelConfig,
    tokens: &[u32],
    chunk: usize,
    backend: Backend,
) -> Tensor {
    let options = LoadOptions {
        backend,
        ..options()
    };
    let mut all = on_ranks(name, &options, parallel, |model| {
        let logits = model.forward_logits(tokens, chunk).unwrap();
        assert_eq!(logits.size()[0] > 0, model.has_logits());
        logits
    });
    all.swap_remove(parallel.sampling_rank())
}

fn names() -> Vec<String> {
    let names = std::fs::read_dir(fixture("")).unwrap();
    let names = names.map(|name| name.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names
        .filter(|name| Model::load(&fixture(name), &options()).is_ok())
        .collect();
    names.sort();
    names
}

#[test]
fn stages_change_no_bit() {
    let mut rng = StdRng::seed_from_u64(4);
    let mut checked = 0;
    for name in names() {
        let config = ModelConfig::from_dir(&fixture(&name)).unwrap();
        let vocab = config.vocab_size as u32;
        let tokens: Vec<u32> = (0..37).map(|_| rng.random_range(0..vocab)).collect();
        for backend in [Backend::Cpu, Backend::Torch] {
            let whole = LoadOptions {
                backend,
                ..options()
            };
            let whole = Model::load(&fixture(&name), &whole).unwrap();
            let chunk = rng.random_range(1..40);
            let expected = whole.forward_logits(&tokens, chunk).unwrap();
            for stages in 2..=config.num_layers.min(3) {
                let got = logits(&name, &grid(1, stages), &tokens, chunk, backend);
                // libtorch's own kernels promise nothing to the bit.
                let same = match backend {
                    Backend::Cpu => got.equal(&expected),
                    _ => got.allclose(&expected, 1e-5, 1e-6, false),
                };
                assert!(same, "{name}, {stages} stages, {backend:?}");
                checked += 1;
            }
        }
        // Stages of several ranks are as good as one stage of so many.
        if config.num_layers > 1 && share(&name, 0, 2).is_ok() {
            let expected = logits(&name, &grid(2, 1), &tokens, 9, Backend::Cpu);
            let got = logits(&name, &grid(2, 2), &tokens, 9, Backend::Cpu);
            assert!(got.equal(&expected), "{name}, 2 x 2");
        }
    }
    assert!(checked > 10, "{checked}");
}

#[test]
fn a_stage_holds_its_layers_alone() {
    for name in ["llama3-gqa4", "qwen2-tied", "qwen3-headdim"] {
        let whole = Model::load(&fixture(name), &options()).unwrap();
        let config = whole.config().clone();
        let layers = config.num_layers;
        let even = on_ranks(name, &options(), &grid(1, 2), |m| m.weight_bytes());
        // What is there twice: a tied embedding, on the first stage and on the last.
        let table = even.iter().sum::<usize>() - whole.weight_bytes();
        assert_eq!(table > 0, config.tie_word_embeddings, "{name}");
        let partition = ParallelConfig {
            pp_layer_partition: Some(vec![1, layers - 1]),
            ..grid(1, 2)
        };
        let parts = on_ranks(name, &options(), &partition, |model| {
            let kv = (
                model.kv_bytes_per_block(4),
                model.most_kv_bytes_per_block(4),
            );
            (model.weight_bytes(), kv, model.stage().layers())
        });
        let whole_kv = whole.kv_bytes_per_block(4);
        let largest = whole_kv / layers * (layers - 1).max(1);
        assert_eq!(parts[0].1, (whole_kv / layers, largest));
        assert_eq!(parts[1].1, (whole_kv / layers * (layers - 1), largest));
        assert_eq!((parts[0].2.clone(), parts[1].2.clone()), (0..1, 1..layers));
        let sum: usize = parts.iter().map(|part| part.0).sum();
        assert_eq!(sum, whole.weight_bytes() + table);
        for (rank, part) in parts.iter().enumerate() {
            println!(
                "{name}, {} of {layers} layers: rank {rank} of 2 holds {} of {} bytes, {} of {} a block",
                part.2.len(),
                part.0,
                whole.weight_bytes(),
                part.1.0,
                whole_kv
            );
        }
        // Both ways of dividing at once.
        let four = on_ranks(name, &options(), &grid(2, 2), |m| m.weight_bytes());
        let least = (whole.weight_bytes() + table) / 4;
        assert!(four.iter().sum::<usize>() >= least * 4);
        assert!(
            four.iter()
                .all(|bytes| *bytes < whole.weight_bytes() * 2 / 3)
        );
    }
}

#[test]
fn connected_processes_are_stages() {
    let name = "llama3-gqa4";
    let tokens: Vec<u32> = (1..40).collect();
    let whole = Model::load(&fixture(name), &options()).unwrap();
    let layers = whole.config().num_layers;
    for (tp, pp) in [(1, 2), (2, 2)] {
        let parallel = grid(tp, pp);
        let expected = logits(name, &grid(tp, 1), &tokens, 8, Backend::Cpu);
        let results = on_worlds(tp * pp, TIMEOUT, |world| {
            tch::set_num_threads(1);
            world.agree(&fixture(name), &options(), &parallel).unwrap();
            let partition = parallel.partition(layers).unwrap();
            let groups = world.groups(&parallel).unwrap();
            let model = Model::load_stage(&fixture(name), &options(), groups, partition).unwrap();
            let logits = model.forward_logits(&tokens, 8).unwrap();
            // Nobody leaves while others still read.
            let all = world.collective().unwrap();
            let _ = tp_model::comm::Collective::all_gather(&all, Tensor::from_slice(&[0f32]));
            world.health().close();
            logits
        });
        assert!(results[parallel.sampling_rank()].equal(&expected));
    }
}

#[test]
fn groups_must_be_of_all_processes() {
    on_worlds(2, TIMEOUT, |world| {
        let error = world.groups(&grid(2, 2)).unwrap_err();
        assert!(
            error.what.contains("one of 4 ranks, but there are 2"),
            "{error}"
        );
        world.health().close();
    });
}

#[test]
fn what_differs_between_stages_is_named() {
    let results = on_worlds(2, TIMEOUT, |world| {
        let parallel = ParallelConfig {
            pp_layer_partition: (world.rank() == 1).then(|| vec![1, 1]),
            ..grid(1, 2)
        };
        let result = world.agree(&fixture("llama3-gqa4"), &options(), &parallel);
        // All have heard before any leaves.
        thread::sleep(std::time::Duration::from_millis(100));
        world.health().close();
        result.map_err(|error| error.to_string())
    });
    let told = results[0].as_ref().unwrap_err();
    let expected =
        "rank 1 of 2: was started with another pp_layer_partition ([1, 1]) than rank 0 (none)";
    assert_eq!(told, expected);
}
