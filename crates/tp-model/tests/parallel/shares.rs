//! Each rank's share of the weights, and that together they are the model.

use std::path::PathBuf;
use std::thread;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tch::{Kind, Tensor};
use tp_model::comm::{Collective, CommError, Health, Threads};
use tp_model::{Backend, DtypeChoice, LoadOptions, Model};

use super::exchange::TIMEOUT;

pub fn fixture(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures", name]
        .iter()
        .collect()
}

pub fn options() -> LoadOptions<'static> {
    tch::set_num_threads(1);
    LoadOptions {
        dtype: DtypeChoice::Float32,
        backend: Backend::Cpu,
        ..LoadOptions::default()
    }
}

/// Loads a share without anybody to exchange with.
#[derive(Debug)]
struct Pretend(usize, usize);

impl Collective for Pretend {
    fn rank(&self) -> usize {
        self.0
    }
    fn world_size(&self) -> usize {
        self.1
    }
    fn all_reduce_sum(&self, tensor: Tensor) -> Result<Tensor, CommError> {
        Ok(tensor)
    }
    fn all_gather(&self, tensor: Tensor) -> Result<Tensor, CommError> {
        Ok(tensor)
    }
    fn broadcast(&self, tensor: Tensor, _root: usize) -> Result<Tensor, CommError> {
        Ok(tensor)
    }
    fn send(&self, _tensor: &Tensor, _to: usize) -> Result<(), CommError> {
        Ok(())
    }
    fn recv(&self, like: &Tensor, _from: usize) -> Result<Tensor, CommError> {
        Ok(like.copy())
    }
}

pub fn share(name: &str, rank: usize, size: usize) -> Result<Model, tp_model::ModelError> {
    Model::load_shard(&fixture(name), &options(), Box::new(Pretend(rank, size)))
}

/// Logits of a prompt on `size` threads, in chunks.
fn logits(name: &str, size: usize, tokens: &[u32], chunk: usize, backend: Backend) -> Tensor {
    let options = LoadOptions {
        backend,
        ..options()
    };
    let group = Threads::group(size, TIMEOUT, &Health::default());
    thread::scope(|scope| {
        let start = |comm| {
            scope.spawn(move || {
                tch::set_num_threads(1);
                let model = Model::load_shard(&fixture(name), &options, Box::new(comm)).unwrap();
                model.forward_logits(tokens, chunk).unwrap()
            })
        };
        let threads: Vec<_> = group.into_iter().map(start).collect();
        let mut all = threads.into_iter().map(|t| t.join().unwrap());
        let first = all.next().unwrap();
        assert!(
            all.all(|other| other.size()[0] == 0),
            "only rank 0 has logits"
        );
        first
    })
}

fn relative_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let norm = |x: &Tensor| x.to_kind(Kind::Double).norm().double_value(&[]);
    norm(&(a - b)) / norm(b)
}

#[test]
fn logits_do_not_depend_on_the_number_of_ranks() {
    let mut rng = StdRng::seed_from_u64(3);
    let mut worst: f64 = 0.0;
    // Few heads, many, heads of other sizes, biases, tied embeddings, windows, more ranks than key
    // and value heads.
    for name in std::fs::read_dir(fixture("")).unwrap() {
        let name = name.unwrap().file_name().into_string().unwrap();
        let Ok(whole) = Model::load(&fixture(&name), &options()) else {
            continue;
        };
        let vocab = whole.config().vocab_size as u32;
        let tokens: Vec<u32> = (0..61).map(|_| rng.random_range(0..vocab)).collect();
        let expected = whole.forward_logits(&tokens, 61).unwrap();
        for size in [2, 4] {
            if share(&name, 0, size).is_err() {
                continue;
            }
            for backend in [Backend::Cpu, Backend::Torch] {
                let got = logits(&name, size, &tokens, 16, backend);
                let difference = relative_difference(&got, &expected);
                println!("{name} on {size} ranks, {backend:?}: {difference:.1e}");
                worst = worst.max(difference);
            }
            let again = logits(&name, size, &tokens, 7, Backend::Cpu);
            let first = logits(&name, size, &tokens, 61, Backend::Cpu);
            assert!(
                again.equal(&first),
                "{name}: chunks change no bit on {size} ranks, either"
            );
        }
    }
    assert!(worst > 0.0 && worst < 1e-5, "{worst:e}");
}

#[test]
fn ranks_hold_their_share_of_the_bytes() {
    for name in ["llama3-gqa4", "qwen2-tied", "llama2-mha", "qwen3-headdim"] {
        let whole = Model::load(&fixture(name), &options()).unwrap();
        for size in [2, 4] {
            let Ok(first) = share(name, 0, size) else {
                continue;
            };
            let config = first.config().clone();
            // Everything but key and value heads that several ranks hold.
            let replicas = (size / config.num_kv_heads).max(1);
            let kv = 2 * config.num_kv_heads * config.head_dim * config.hidden_size;
            let copies = kv * config.num_layers * 4 * (replicas - 1);
            // Panels of 16 columns round the rest up.
            let slack = 1.1;
            let least = (whole.weight_bytes() + copies) / size;
            for rank in 0..size {
                let bytes = share(name, rank, size).unwrap().weight_bytes();
                println!(
                    "{name}: rank {rank} of {size}: {bytes} of {}",
                    whole.weight_bytes()
                );
                assert!(
                    bytes >= least && bytes as f64 <= least as f64 * slack,
                    "{bytes} {least}"
                );
            }
            let tokens = 16;
            let heads = config.num_kv_heads * replicas / size;
            assert_eq!(
                first.kv_bytes_per_block(tokens) * config.num_kv_heads,
                whole.kv_bytes_per_block(tokens) * heads
            );
        }
    }
}

#[test]
fn a_size_that_does_not_divide_is_refused_with_those_that_do() {
    for (name, size) in [("llama3-gqa4", 3), ("qwen2-tied", 5), ("llama2-mha", 64)] {
        let error = share(name, 0, size).unwrap_err().to_string();
        assert!(
            error.contains(&format!("tensor_parallel_size {size}")),
            "{error}"
        );
        let (_, sizes) = error.split_once("sizes that do: ").expect("sizes");
        let sizes: Vec<usize> = sizes.split(", ").map(|s| s.parse().unwrap()).collect();
        assert_eq!(sizes[0], 1);
        for works in 1..=64 {
            assert_eq!(
                share(name, 0, works).is_ok(),
                sizes.contains(&works),
                "{name}: {works}"
            );
        }
    }
    assert!(
        share("llama3-gqa4", 2, 2)
            .unwrap_err()
            .to_string()
            .contains("rank 2 of 2")
    );
}
