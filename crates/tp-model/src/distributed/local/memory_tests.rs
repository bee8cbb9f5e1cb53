//! Memory that runs out in a step: one rank can go on, several end with an error that names the rank.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use batch_scheduler::{ModelRunner, Request, Scheduler, SchedulerConfig, StopCriteria};
use paged_kv::{BlockManager, BlockSize, Config};
use sampler::SamplingParams;
use tch::{Kind, Tensor};

use super::*;
use crate::attention::{AttentionBackend, AttentionBatch, AttentionLayer};
use crate::error::RunnerError;
use crate::kv_cache::LayerKv;
use crate::options::{Backend, DtypeChoice};
use crate::runner::SeqParams;

/// Nothing here takes this long, unless it never comes.
const LONG: Duration = Duration::from_secs(60);
const TOKENS: u32 = 6;

/// Attention that finds no memory the fifth time.
#[derive(Debug)]
struct Greedy {
    inner: Box<dyn AttentionBackend>,
    calls: AtomicUsize,
}

impl AttentionBackend for Greedy {
    fn write_kv(
        &self,
        qkv: &Tensor,
        layer: &AttentionLayer,
        kv: &LayerKv,
        batch: &AttentionBatch,
    ) -> Tensor {
        self.inner.write_kv(qkv, layer, kv, batch)
    }

    fn attend(
        &self,
        q: &Tensor,
        layer: &AttentionLayer,
        kv: &LayerKv,
        batch: &AttentionBatch,
    ) -> Tensor {
        if self.calls.fetch_add(1, Ordering::Relaxed) == 4 {
            // libtorch's own failure, more bytes than there are addresses.
            let _ = Tensor::zeros([1 << 59], (Kind::Float, q.device()));
        }
        self.inner.attend(q, layer, kv, batch)
    }
}

/// One request on these ranks, of which `doomed` finds no memory in the third step or so. Returns how
/// many steps were taken back and the number of tokens, or the error.
fn run(parallel: &ParallelConfig, doomed: usize) -> Result<(usize, usize), RunnerError> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/qwen3-yarn");
    let options = LoadOptions {
        dtype: DtypeChoice::Float32,
        backend: Backend::Cpu,
        ..LoadOptions::default()
    };
    let (mut leader, mut ranks) =
        LocalRanks::load(&dir, &options, parallel, LONG, Health::default()).unwrap();
    let greedy = |inner| -> Box<dyn AttentionBackend> {
        let calls = AtomicUsize::new(0);
        Box::new(Greedy { inner, calls })
    };
    match doomed {
        0 => leader = leader.map_attention(greedy),
        rank => {
            let model = ranks.models.remove(rank - 1).map_attention(greedy);
            ranks.models.insert(rank - 1, model);
        }
    }
    let config = SchedulerConfig {
        max_num_seqs: 1,
        max_num_batched_tokens: 64,
        max_model_len: 64,
        max_steps_in_flight: 1,
        ..SchedulerConfig::default()
    };
    let sizes = RunnerConfig {
        max_num_seqs: 1,
        max_num_batched_tokens: 64,
        max_model_len: 64,
        block_size: 16,
        num_blocks: 8,
    };
    let mut runner = match parallel.world_size() {
        1 => Runner::new(leader, &sizes).unwrap(),
        _ => {
            let followers = ranks.start(&sizes).unwrap();
            Runner::with_followers(leader, &sizes, followers).unwrap()
        }
    };
    let kv = Config::new(8, BlockSize::new(16).unwrap());
    let mut scheduler = Scheduler::new(config, BlockManager::new(kv).unwrap()).unwrap();
    let params = Arc::new(SeqParams {
        sampling: Arc::new(SamplingParams::default()),
        seed: 0,
        eos_token_ids: Vec::new(),
    });
    let stop = StopCriteria::max_tokens(TOKENS);
    scheduler
        .add(Request::new(0, vec![5, 6, 7], stop, params))
        .unwrap();
    let (mut taken_back, mut tokens, mut events) = (0, 0, Vec::new());
    while let Some(plan) = scheduler.schedule() {
        let step = plan.step;
        let done = runner.launch(plan);
        match done.and_then(|ticket| runner.collect(ticket)) {
            Ok(output) => {
                tokens += output.samples.iter().map(|s| s.tokens.len()).sum::<usize>();
                scheduler.apply(output, &mut events).unwrap();
            }
            Err(error) if runner.is_out_of_memory(&error) => {
                scheduler.abandon(step).unwrap();
                taken_back += 1;
            }
            Err(error) => {
                let known = runner.health().unwrap().failure().unwrap();
                assert_eq!(error.to_string(), known.to_string(), "what all ranks hear");
                return Err(error);
            }
        }
    }
    Ok((taken_back, tokens))
}

#[test]
fn one_rank_goes_on() {
    assert_eq!(run(&ParallelConfig::SOLO, 0).unwrap(), (1, TOKENS as usize));
}

#[test]
fn several_ranks_end_and_name_the_one_without_memory() {
    let stages = ParallelConfig {
        pipeline_parallel_size: 2,
        ..ParallelConfig::SOLO
    };
    for parallel in [ParallelConfig::tensor(2), stages] {
        for doomed in 0..2 {
            let error = run(&parallel, doomed).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("rank {doomed} of 2: step ")),
                "{error}"
            );
            assert!(
                error.contains("out of memory, which several ranks cannot go on from"),
                "{error}"
            );
            assert!(error.contains("can't allocate memory"), "{error}");
        }
    }
}
