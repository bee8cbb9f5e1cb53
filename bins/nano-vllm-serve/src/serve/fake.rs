//! `--fake-runner`: tokens at once, so that what is measured is the server and not a model.

use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use batch_scheduler::{
    ModelRunner, Sampled, Scheduler, SchedulerConfig, SchedulingPolicy, StepOutput, StepPlan,
};
use engine::{AsyncEngine, AsyncOptions, Engine, EngineCore, TokenLogprobs};
use paged_kv::{BlockManager, BlockSize, Config};
use tp_model::SeqParams;

use super::args::ServerArgs;

/// Blocks of the cache that nothing is stored in: 4 million tokens.
const BLOCKS: usize = 1 << 18;
const BLOCK_SIZE: u32 = 16;

/// Answers every step with tokens that depend on the slot and the step only, and on what may come.
struct FakeRunner {
    vocab_size: u32,
    step_time: Duration,
    panic_at: Option<u64>,
    /// Each step takes a byte of standard input.
    wait_for_stdin: bool,
}

impl ModelRunner for FakeRunner {
    type Params = Arc<SeqParams>;
    type Extra = TokenLogprobs;
    type Ticket = StepOutput<TokenLogprobs>;
    type Error = std::convert::Infallible;

    fn launch(&mut self, plan: StepPlan<Arc<SeqParams>>) -> Result<Self::Ticket, Self::Error> {
        if self.wait_for_stdin {
            // At its end nothing holds the steps back any more.
            let _ = std::io::stdin().read(&mut [0]);
        }
        if !self.step_time.is_zero() {
            std::thread::sleep(self.step_time);
        }
        assert_ne!(Some(plan.step), self.panic_at, "as asked for");
        let sample = |slot: u32| {
            // From the middle of the vocabulary: no special token.
            let token = self.vocab_size / 2 + (slot + plan.step as u32) % (self.vocab_size / 4);
            Sampled {
                tokens: [token].into_iter().collect(),
                extras: Vec::new(),
                error: None,
            }
        };
        let mut samples: Vec<_> = plan.samples.iter().map(|s| sample(s.slot.0)).collect();
        for mask in &plan.masks {
            // The next token from there on that may come.
            let tokens = &mut samples[mask.sample as usize].tokens;
            let from = tokens[0];
            let mut all = (from..self.vocab_size).chain(0..from);
            let allowed = |t: &u32| mask.allowed[*t as usize / 32] >> (t % 32) & 1 == 1;
            tokens[0] = all.find(allowed).unwrap_or(from);
        }
        Ok(StepOutput {
            step: plan.step,
            samples,
            prompt_extras: Vec::new(),
        })
    }

    fn collect(&mut self, ticket: Self::Ticket) -> Result<Self::Ticket, Self::Error> {
        Ok(ticket)
    }
}

/// `engine` with its tokenizer, templates and limits, but without its model. Log-probabilities
/// that are asked for do not come.
pub fn start<R: engine::Runner>(
    engine: Engine<R>,
    server: &ServerArgs,
    policy: Box<dyn SchedulingPolicy>,
    options: AsyncOptions,
) -> anyhow::Result<AsyncEngine> {
    let (core, frontend) = engine.into_parts();
    let config: SchedulerConfig = core.scheduler().config().clone();
    drop(core);
    let kv = Config::new(BLOCKS, BlockSize::new(BLOCK_SIZE)?).prefix_caching(false);
    let scheduler = Scheduler::with_policy(config, BlockManager::new(kv)?, policy)?;
    let runner = FakeRunner {
        vocab_size: u32::try_from(frontend.limits().vocab_size)?,
        step_time: server.fake_step_ms,
        panic_at: server.fake_runner_panic_at_step,
        wait_for_stdin: server.fake_steps_from_stdin,
    };
    let core = EngineCore::new(scheduler, runner);
    Ok(AsyncEngine::start_with(core, frontend, options)?)
}
