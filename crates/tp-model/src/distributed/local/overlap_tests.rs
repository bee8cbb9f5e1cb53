//! That pipeline stages work at the same time, on a model whose attention takes its time.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use batch_scheduler::{Event, ModelRunner, Request, Scheduler, SchedulerConfig, StopCriteria};
use paged_kv::{BlockManager, BlockSize, Config};
use sampler::SamplingParams;
use tch::Tensor;

use super::*;
use crate::attention::{AttentionBackend, AttentionBatch, AttentionLayer};
use crate::kv_cache::LayerKv;
use crate::options::{Backend, DtypeChoice};
use crate::runner::{Runner, SeqParams};

/// Nothing here takes this long, unless it never comes.
const LONG: Duration = Duration::from_secs(60);
const TOKENS: u32 = 12;

/// When a stage computed which step.
#[derive(Clone, Copy, Debug)]
struct Span {
    stage: usize,
    step: usize,
    start: Instant,
    end: Option<Instant>,
}

#[derive(Debug)]
struct Log {
    spans: Mutex<Vec<Span>>,
    news: Condvar,
    /// In these many steps the last stage goes on only once the first is at the step after.
    gated: usize,
    pause: Duration,
}

impl Log {
    fn begin(&self, stage: usize) -> usize {
        let mut spans = self.spans.lock().unwrap();
        let step = spans.iter().filter(|span| span.stage == stage).count();
        spans.push(Span {
            stage,
            step,
            start: Instant::now(),
            end: None,
        });
        self.news.notify_all();
        if stage > 0 && step < self.gated {
            let next = |span: &Span| span.stage == 0 && span.step == step + 1;
            let waiting = |spans: &mut Vec<Span>| !spans.iter().any(next);
            let (spans, timeout) = self.news.wait_timeout_while(spans, LONG, waiting).unwrap();
            drop(spans);
            assert!(
                !timeout.timed_out(),
                "stage 0 waits for step {step} of stage 1"
            );
        }
        step
    }

    fn end(&self, stage: usize, step: usize) {
        let mut spans = self.spans.lock().unwrap();
        let mine = |span: &&mut Span| span.stage == stage && span.step == step;
        spans.iter_mut().find(mine).unwrap().end = Some(Instant::now());
    }
}

/// Attention of a stage of one layer, so that it is called once a step.
#[derive(Debug)]
struct Slow {
    inner: Box<dyn AttentionBackend>,
    stage: usize,
    log: Arc<Log>,
}

impl AttentionBackend for Slow {
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
        let step = self.log.begin(self.stage);
        std::thread::sleep(self.log.pause);
        let output = self.inner.attend(q, layer, kv, batch);
        self.log.end(self.stage, step);
        output
    }
}

/// Two stages of one layer each run four requests with so many steps in flight. Returns the
/// tokens, who computed when, and how long it took.
fn run(depth: usize, gated: usize, pause: Duration) -> (Vec<Vec<u32>>, Vec<Span>, Duration) {
    tch::set_num_threads(2);
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/qwen3-yarn");
    let options = LoadOptions {
        dtype: DtypeChoice::Float32,
        backend: Backend::Cpu,
        ..LoadOptions::default()
    };
    let parallel = ParallelConfig {
        pipeline_parallel_size: 2,
        ..ParallelConfig::SOLO
    };
    let (leader, mut ranks) =
        LocalRanks::load(&dir, &options, &parallel, LONG, Health::default()).unwrap();
    let log = Arc::new(Log {
        spans: Mutex::new(Vec::new()),
        news: Condvar::new(),
        gated,
        pause,
    });
    let slow = |stage| {
        let log = log.clone();
        move |inner| Box::new(Slow { inner, stage, log }) as Box<dyn AttentionBackend>
    };
    let leader = leader.map_attention(slow(0));
    let last = ranks.models.remove(0).map_attention(slow(1));
    assert_eq!(
        (leader.stage().layers(), last.stage().layers()),
        (0..1, 1..2)
    );
    ranks.models.push(last);

    let config = SchedulerConfig {
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        max_model_len: 64,
        max_steps_in_flight: depth,
        micro_batches: true,
        ..SchedulerConfig::default()
    };
    let sizes = RunnerConfig {
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        max_model_len: 64,
        block_size: 16,
        num_blocks: 40,
    };
    let followers = ranks.start(&sizes).unwrap();
    let mut runner = Runner::with_followers(leader, &sizes, followers).unwrap();
    let kv = Config::new(40, BlockSize::new(16).unwrap());
    let mut scheduler = Scheduler::new(config, BlockManager::new(kv).unwrap()).unwrap();
    for id in 0..4 {
        let params = Arc::new(SeqParams {
            sampling: Arc::new(SamplingParams {
                temperature: 0.9,
                ..SamplingParams::default()
            }),
            seed: id,
            eos_token_ids: Vec::new(),
        });
        let prompt = (1..6).map(|token| token + id as u32).collect();
        let request = Request::new(id, prompt, StopCriteria::max_tokens(TOKENS), params);
        scheduler.add(request).unwrap();
    }
    let mut tokens = vec![Vec::new(); 4];
    let (mut tickets, mut events) = (VecDeque::new(), Vec::new());
    let start = Instant::now();
    while scheduler.has_work() {
        while let Some(plan) = scheduler.schedule() {
            tickets.push_back(runner.launch(plan).unwrap());
        }
        let output = runner.collect(tickets.pop_front().unwrap()).unwrap();
        scheduler.apply(output, &mut events).unwrap();
        for event in events.drain(..) {
            if let Event::Tokens {
                id, tokens: new, ..
            } = event
            {
                tokens[id.0 as usize].extend(new);
            }
        }
    }
    let took = start.elapsed();
    drop(runner);
    let spans = log.spans.lock().unwrap().clone();
    (tokens, spans, took)
}

/// How many steps each stage computed while the other computed one, too.
fn together(spans: &[Span]) -> usize {
    let meets = |a: &Span, b: &Span| {
        a.stage != b.stage && a.start < b.end.unwrap() && b.start < a.end.unwrap()
    };
    let meeting = spans.iter().filter(|a| spans.iter().any(|b| meets(a, b)));
    meeting.count()
}

#[test]
fn stages_compute_at_the_same_time() {
    let pause = Duration::from_millis(5);
    let (expected, spans, one_by_one) = run(1, 0, pause);
    assert!(
        expected
            .iter()
            .all(|tokens| tokens.len() == TOKENS as usize)
    );
    assert_eq!(
        together(&spans),
        0,
        "one step in flight keeps one stage busy"
    );
    // The first stage's step n + 1 begins while the last stage is at n: else this never ends.
    let steps = 2 * TOKENS as usize;
    let (tokens, spans, _) = run(2, steps - 1, Duration::ZERO);
    assert_eq!(tokens, expected);
    assert_eq!(spans.len(), 2 * steps, "two micro-batches, two stages");
    let (tokens, spans, piped) = run(2, 0, pause);
    assert_eq!(tokens, expected);
    println!("{TOKENS} tokens of 4 sequences, 5 ms a step and stage:");
    println!("  1 step in flight: {one_by_one:?}; 2 in flight: {piped:?}");
    println!(
        "  {} of {} steps meet one of the other stage",
        together(&spans),
        spans.len()
    );
    let first = spans[0].start;
    for span in &spans[..12] {
        let [start, end] = [span.start, span.end.unwrap()].map(|at| (at - first).as_micros());
        println!(
            "  stage {} step {}: {start} .. {end} us",
            span.stage, span.step
        );
    }
}
