//! A scheduler, a runner and what each request must come to.

use std::collections::{BTreeMap, VecDeque};

use batch_scheduler::{
    AddError, Event, FinishReason, ForkError, ModelRunner, Request, RequestId, Scheduler,
    SchedulerConfig, SchedulingPolicy, SeqParams, StopCriteria,
};
use paged_kv::{BlockManager, BlockSize, Config, TokenId};

use super::figures::{check_figures, check_views};
use super::model::{End, Params, sequential};
use super::runner::PagedRunner;

/// What is expected of one sequence, and what came.
struct Expected {
    params: Params,
    stop: StopCriteria,
    prompt: Vec<TokenId>,
    tokens: Vec<TokenId>,
    end: End,
    got: Vec<TokenId>,
    extras: usize,
    prompt_extras: u32,
    /// Each position of the prompt is reported: none comes from the cache or from another sequence.
    reports_all: bool,
    finished: Option<FinishReason>,
}

pub struct World {
    pub scheduler: Scheduler<BlockManager, Params>,
    pub runner: PagedRunner,
    tickets: VecDeque<u64>,
    expected: BTreeMap<(RequestId, u32), Expected>,
    events: Vec<Event<u64>>,
    pub num_blocks: usize,
    window: Option<u32>,
    pub steps: usize,
    pub preemptions: usize,
    pub abandoned: usize,
    ended: u64,
}

impl World {
    /// `num_blocks` are for sequences. Preemption by swap needs `host_blocks`.
    pub fn new(
        config: SchedulerConfig,
        num_blocks: usize,
        host_blocks: u32,
        block_size: u32,
        policy: Box<dyn SchedulingPolicy>,
    ) -> Self {
        let size = BlockSize::new(block_size).expect("block size");
        let kv = Config::new(num_blocks + 1, size).host_blocks(host_blocks);
        let kv = BlockManager::new(kv).expect("pool");
        let runner = PagedRunner::new(
            num_blocks + 1,
            host_blocks as usize,
            block_size as usize,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.sliding_window,
        );
        let window = config.sliding_window;
        Self {
            scheduler: Scheduler::with_policy(config, kv, policy).expect("config"),
            runner,
            tickets: VecDeque::new(),
            expected: BTreeMap::new(),
            events: Vec::new(),
            num_blocks,
            window,
            steps: 0,
            preemptions: 0,
            abandoned: 0,
            ended: 0,
        }
    }

    pub fn add(&mut self, request: Request<Params>) -> Result<(), AddError> {
        self.scheduler.add(request.clone())?;
        for index in 0..request.n {
            let params = match &request.params {
                SeqParams::Shared(p) => *p,
                SeqParams::PerSequence(p) => p[index as usize],
            };
            let (prompt, stop) = (request.prompt.clone(), request.stop.clone());
            let mut expected = self.expect(prompt, stop, params, Vec::new());
            expected.reports_all = index == 0 && !request.use_prefix_cache;
            self.expected.insert((request.id, index), expected);
        }
        Ok(())
    }

    /// What a sequence must come to that has said `got` so far.
    fn expect(
        &self,
        prompt: Vec<TokenId>,
        stop: StopCriteria,
        params: Params,
        got: Vec<TokenId>,
    ) -> Expected {
        let max_len = self.scheduler.max_len();
        let said = [&prompt[..], &got].concat();
        let (tokens, end) = sequential(&said, prompt.len(), &stop, &params, self.window, max_len);
        Expected {
            tokens,
            end,
            extras: got.len(),
            got,
            prompt_extras: 0,
            reports_all: false,
            finished: None,
            params,
            stop,
            prompt,
        }
    }

    /// Rewrites a sequence, or forks it if `to` names another: `keep` tokens of the output (as far
    /// as there are) and `tail`.
    pub fn branch(
        &mut self,
        (id, index): (u64, u32),
        to: u32,
        keep: usize,
        tail: &[TokenId],
        params: Params,
    ) -> Result<(), ForkError> {
        let id = RequestId(id);
        let of = &self.expected[&(id, index)];
        let keep = keep.min(of.got.len());
        let mut got = of.got[..keep].to_vec();
        got.extend_from_slice(tail);
        let (prompt, stop) = (of.prompt.clone(), of.stop.clone());
        let kept = prompt.len() + keep;
        let (params, prompt_extras, reports_all) = match to == index {
            true => (of.params, of.prompt_extras, of.reports_all),
            false => (params, 0, false),
        };
        match to == index {
            true => self.scheduler.rewrite(id, index, kept, tail)?,
            false => self.scheduler.fork(id, index, to, kept, tail, params)?,
        }
        let mut expected = self.expect(prompt, stop, params, got);
        expected.prompt_extras = prompt_extras;
        expected.reports_all = reports_all;
        self.expected.insert((id, to), expected);
        Ok(())
    }

    /// Plans and launches a step. Returns whether there was one.
    pub fn launch(&mut self) -> bool {
        let before = self.scheduler.stats();
        let Some(plan) = self.scheduler.schedule() else {
            return false;
        };
        self.steps += 1;
        check_figures(&before, &self.scheduler, &plan, &self.runner);
        for row in &plan.rows {
            let (id, index, _) = self.scheduler.occupant(row.slot).expect("taken");
            let seq = &self.expected[&(id, index)];
            let limit =
                (seq.prompt.len() + seq.stop.max_tokens as usize).min(self.scheduler.max_len());
            let end = (row.start + row.len) as usize;
            assert!(
                end < limit,
                "{id}.{index}: the last token is never computed"
            );
        }
        let stats = self.scheduler.stats().last_step;
        self.preemptions += stats.preemptions;
        if stats.preemptions > 0 {
            assert_eq!(stats.admitted, 0, "a step that preempts admits nobody");
        }
        let (step, tokens) = (
            plan.step,
            plan.rows.iter().map(|row| row.len as usize).sum(),
        );
        match self.runner.launch(plan) {
            Ok(ticket) => self.tickets.push_back(ticket),
            Err(_) => self.abandon(step, tokens),
        }
        true
    }

    /// Memory ran out in a step: it is taken back, and the next are half as large.
    fn abandon(&mut self, step: u64, tokens: usize) {
        self.abandoned += 1;
        assert_eq!(self.scheduler.abandon(step + 1), None, "not in flight");
        let rows = self.scheduler.abandon(step).expect("the newest step");
        assert!(!rows.is_empty());
        assert_eq!(self.scheduler.abandon(step), None, "taken back twice");
        self.scheduler.set_token_budget(tokens / 2);
    }

    /// Memory for steps of so many tokens, from now on.
    pub fn set_memory(&mut self, tokens: usize) {
        self.runner.memory_for = tokens;
        self.scheduler.set_token_budget(usize::MAX);
    }

    /// Collects and applies the oldest step in flight. Returns whether there was one.
    pub fn collect(&mut self) -> bool {
        let Some(ticket) = self.tickets.pop_front() else {
            return false;
        };
        let output = self.runner.collect(ticket).expect("launched");
        self.scheduler
            .apply(output, &mut self.events)
            .expect("in step");
        self.check_events();
        true
    }

    pub fn abort(&mut self, id: u64) -> bool {
        let known = self.scheduler.abort(RequestId(id), &mut self.events);
        self.check_events();
        known
    }

    pub fn finish(&mut self, id: u64, index: u32) -> bool {
        let reason = FinishReason::StopString("###".to_owned());
        let known = self
            .scheduler
            .finish(RequestId(id), index, reason, &mut self.events);
        self.check_events();
        known
    }

    /// Drafts for a sequence: what it will say, garbled from entry `wrong_from` on.
    pub fn draft(&mut self, id: u64, index: u32, len: usize, wrong_from: usize) -> bool {
        let Some(seq) = self.expected.get(&(RequestId(id), index)) else {
            return false;
        };
        let rest = seq.tokens.iter().skip(seq.got.len()).take(len);
        let drafts: Vec<TokenId> = rest
            .enumerate()
            .map(|(i, &token)| token + u32::from(i >= wrong_from))
            .collect();
        self.scheduler.set_drafts(RequestId(id), index, &drafts)
    }

    fn check_events(&mut self) {
        for event in self.events.drain(..) {
            match event {
                Event::Tokens {
                    id,
                    index,
                    tokens,
                    extras,
                } => {
                    let seq = self.expected.get_mut(&(id, index)).expect("known");
                    assert_eq!(seq.finished, None, "{id}.{index}: token after the end");
                    let prompt = seq.prompt.len() as u32;
                    assert!(!seq.reports_all || seq.prompt_extras == prompt);
                    seq.got.extend_from_slice(&tokens);
                    seq.extras += extras.len();
                    assert!(
                        seq.tokens.starts_with(&seq.got),
                        "{id}.{index}: {:?} where the sequential model says {:?}",
                        seq.got,
                        seq.tokens
                    );
                    assert_eq!(seq.extras, seq.got.len(), "{id}.{index}: extras");
                }
                Event::PromptExtras {
                    id,
                    index,
                    start,
                    extras,
                } => {
                    let seq = self.expected.get_mut(&(id, index)).expect("known");
                    assert_eq!(seq.finished, None, "{id}.{index}: extras after the end");
                    assert!(start >= seq.prompt_extras, "{id}.{index}: reported twice");
                    assert!(!seq.reports_all || start == seq.prompt_extras);
                    assert!(!extras.is_empty());
                    seq.prompt_extras = start + extras.len() as u32;
                    assert!(seq.prompt_extras as usize <= seq.prompt.len());
                }
                Event::Finished {
                    id,
                    index,
                    reason,
                    usage,
                } => {
                    let seq = self.expected.get_mut(&(id, index)).expect("known");
                    assert_eq!(seq.finished, None, "{id}.{index}: ended twice");
                    assert_eq!(usage.output_tokens as usize, seq.got.len());
                    assert_eq!(usage.prompt_tokens as usize, seq.prompt.len());
                    let by_itself = match &reason {
                        FinishReason::Eos => Some(End::Eos),
                        FinishReason::StopToken(token) => Some(End::Stop(*token)),
                        FinishReason::Length => Some(End::Length),
                        FinishReason::Error(_) => Some(End::Failed),
                        FinishReason::StopString(_) | FinishReason::Aborted => None,
                    };
                    if let Some(end) = by_itself {
                        assert_eq!(seq.got, seq.tokens, "{id}.{index}: cut short by {reason}");
                        assert_eq!(end, seq.end, "{id}.{index}");
                    }
                    seq.finished = Some(reason);
                    self.ended += 1;
                }
            }
        }
        assert_eq!(self.scheduler.stats().totals.finished, self.ended);
        let live = self.expected.iter().filter(|(_, s)| s.finished.is_none());
        let known = live.map(|(&key, s)| (key, (s.prompt.len(), s.got.len())));
        check_views(&self.scheduler, &known.collect());
    }

    /// Runs until nothing is left, with `depth` steps in flight, and checks that nothing leaked.
    pub fn drain(&mut self, depth: usize) {
        while self.scheduler.has_work() {
            let mut moved = false;
            while self.tickets.len() < depth && self.launch() {
                moved = true;
            }
            moved |= self.collect();
            assert!(moved, "hangs: {:?}", self.scheduler.snapshot());
        }
        for ((id, index), seq) in &self.expected {
            assert!(seq.finished.is_some(), "{id}.{index} never ended");
        }
        assert_eq!(self.scheduler.stats().kv_used_blocks, 0, "blocks leaked");
        let usage = self.scheduler.kv().usage();
        assert_eq!(usage.tables, 0, "tables leaked");
        assert_eq!(
            (usage.swapped, usage.host_free),
            (0, usage.host_blocks),
            "host blocks leaked"
        );
        assert!(self.scheduler.snapshot().is_empty());
    }

    /// Forgets the requests that ended, so that long runs stay fast.
    pub fn prune(&mut self) {
        self.expected.retain(|_, seq| seq.finished.is_none());
    }

    pub fn live(&self) -> Vec<(u64, u32)> {
        let live = self.expected.iter().filter(|(_, s)| s.finished.is_none());
        live.map(|((id, index), _)| (id.0, *index)).collect()
    }

    pub fn output(&self, id: u64, index: u32) -> &[TokenId] {
        &self.expected[&(RequestId(id), index)].got
    }
}
