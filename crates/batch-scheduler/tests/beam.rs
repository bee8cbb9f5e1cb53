//! Beam search driven by the caller through `fork`, `rewrite` and `finish`, against a plain beam
//! search that knows no blocks; and what each call refuses.

mod common;

use std::collections::{BTreeMap, VecDeque};

use batch_scheduler::{
    Event, Fcfs, FinishReason, ForkError, ModelRunner, PreemptionMode, Request, RequestId,
    Scheduler, SchedulerConfig, StopCriteria,
};
use common::manual::{request, scheduler, step};
use common::model::{Params, digest, mix, window_start};
use common::runner::PagedRunner;
use paged_kv::{BlockManager, BlockSize, Config, TokenId};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const WIDTH: usize = 4;

/// What the model offers behind a position with this digest: tokens with their scores.
fn candidates(digest: u64) -> [(TokenId, u64); WIDTH] {
    std::array::from_fn(|i| {
        (
            mix(digest, i as u64) as u32 % 7 + 7 * i as u32,
            mix(digest, 99 + i as u64) >> 40,
        )
    })
}

/// The best continuations of `beams`, each (score, digest of its last token): for each the beam,
/// the token and the score.
fn choose(beams: &[(u64, u64)]) -> Vec<(usize, TokenId, u64)> {
    let mut all: Vec<_> = beams
        .iter()
        .enumerate()
        .flat_map(|(b, &(score, d))| candidates(d).map(|(t, s)| (b, t, score + s)))
        .collect();
    all.sort_by_key(|&(beam, token, score)| (std::cmp::Reverse(score), beam, token));
    all.truncate(WIDTH);
    all
}

/// Beam search by the definition: the beams after `len` tokens, best first.
fn plain(prompt: &[TokenId], len: usize, window: Option<u32>) -> Vec<Vec<TokenId>> {
    let mut beams = vec![(0u64, prompt.to_vec())];
    for _ in 0..len {
        let ends: Vec<(u64, u64)> = beams
            .iter()
            .map(|(score, tokens)| {
                let mut digests: Vec<u64> = Vec::new();
                for (p, &token) in tokens.iter().enumerate() {
                    let seen = digests[window_start(p as u32, window) as usize..].iter();
                    digests.push(digest(token, p as u32, seen.copied()));
                }
                (*score, *digests.last().expect("a prompt"))
            })
            .collect();
        beams = choose(&ends)
            .into_iter()
            .map(|(beam, token, score)| {
                let mut tokens = beams[beam].1.clone();
                tokens.push(token);
                (score, tokens)
            })
            .collect();
    }
    beams.into_iter().map(|(_, tokens)| tokens).collect()
}

/// A beam search under way: its beams by index.
struct Search {
    id: RequestId,
    prompt: usize,
    /// Tokens chosen so far.
    chosen: usize,
    /// Score, output, and the digests that came for positions from `prompt + chosen - 1` on.
    beams: BTreeMap<u32, (u64, Vec<TokenId>, VecDeque<u64>)>,
}

type Sched = Scheduler<BlockManager, Params>;

const PARAMS: Params = Params {
    seed: 1,
    vocab: 1000,
    fails_at: None,
};

impl Search {
    /// Advances all beams by the token that the search chooses, if every beam has its say.
    /// Returns whether steps in flight must be applied before it can be done.
    fn advance(&mut self, s: &mut Sched, events: &mut Vec<Event<u64>>) -> bool {
        let keep = self.prompt + self.chosen;
        let lagging = self
            .beams
            .values()
            .any(|(_, _, digests)| digests.is_empty());
        if lagging {
            // Those that are ahead of another compute their last token again until it is there.
            for (&index, (_, _, digests)) in &mut self.beams {
                if !digests.is_empty() && s.rewrite(self.id, index, keep, &[]).is_ok() {
                    digests.truncate(1);
                }
            }
            return false;
        }
        if s.is_in_flight(self.id) {
            return true;
        }
        let indices: Vec<u32> = self.beams.keys().copied().collect();
        let ends: Vec<(u64, u64)> = self.beams.values().map(|(s, _, d)| (*s, d[0])).collect();
        let mut next = BTreeMap::new();
        let mut forks = Vec::new();
        for (beam, token, score) in choose(&ends) {
            let from = indices[beam];
            let mut output = self.beams[&from].1.clone();
            output.push(token);
            let entry = (score, output, VecDeque::new());
            match next.contains_key(&from) {
                true => forks.push((from, token, entry)),
                false => {
                    next.insert(from, entry);
                }
            }
        }
        for &index in &indices {
            if !next.contains_key(&index) {
                assert!(s.finish(self.id, index, FinishReason::Aborted, events));
            }
        }
        for (from, token, entry) in forks {
            let to = (0..)
                .find(|i| !next.contains_key(i))
                .expect("numbers do not end");
            s.fork(self.id, from, to, keep, &[token], PARAMS)
                .expect("a fork");
            next.insert(to, entry);
        }
        for (&index, (_, output, _)) in &next {
            if indices.contains(&index) {
                let last = &output[output.len() - 1..];
                let rewritten = s.rewrite(self.id, index, keep, last);
                // One that was forked just now has that token already.
                rewritten.expect("a rewrite");
            }
        }
        self.beams = next;
        self.chosen += 1;
        false
    }
}

fn search(seed: u64) -> (u64, usize) {
    let mut rng = StdRng::seed_from_u64(seed);
    let window = rng.random_bool(0.3).then(|| rng.random_range(2..9));
    let depth = rng.random_range(1..=3);
    let size = BlockSize::new(rng.random_range(1..=5)).expect("not 0");
    // The beams of both searches fit; the requests in front of them take their room away.
    let beams = 12 + WIDTH * (14 + 2 * size.get());
    let blocks = 2 * beams.div_ceil(size.get());
    let swap = rng.random_bool(0.5);
    let config = SchedulerConfig {
        max_num_seqs: rng.random_range(2 * WIDTH..=16),
        max_num_batched_tokens: 16,
        max_model_len: 40,
        max_steps_in_flight: depth,
        sliding_window: window,
        preemption_mode: if swap {
            PreemptionMode::Swap
        } else {
            PreemptionMode::Recompute
        },
        ..SchedulerConfig::default()
    };
    let mut runner = PagedRunner::new(blocks + 1, 30, size.get(), config.max_num_seqs, 16, window);
    let kv = BlockManager::new(Config::new(blocks + 1, size).host_blocks(30)).expect("pool");
    let mut s: Sched =
        Scheduler::with_policy(config, kv, Box::new(Fcfs::default())).expect("config");

    let len = 12;
    let mut searches: Vec<Search> = Vec::new();
    let mut prompts = BTreeMap::new();
    for id in 10..20 {
        let prompt = vec![1; rng.random_range(1..8)];
        s.add(Request::new(
            id,
            prompt,
            StopCriteria::max_tokens(20),
            PARAMS,
        ))
        .expect("fits");
    }
    for id in 0..2 {
        let prompt: Vec<u32> = (0..rng.random_range(1..12))
            .map(|_| rng.random_range(0..3))
            .collect();
        let mut r = Request::new(id, prompt.clone(), StopCriteria::max_tokens(28), PARAMS);
        r.lockstep = true;
        s.add(r).expect("fits");
        searches.push(Search {
            id: RequestId(id),
            prompt: prompt.len(),
            chosen: 0,
            beams: BTreeMap::from([(0, (0, Vec::new(), VecDeque::new()))]),
        });
        prompts.insert(RequestId(id), prompt);
    }
    let (mut tickets, mut events, mut hold) = (VecDeque::new(), Vec::new(), false);
    let mut steps = 0;
    while s.has_work() {
        steps += 1;
        assert!(steps < 2000, "seed {seed} does not come to an end");
        while !hold && let Some(plan) = s.schedule() {
            let ticket = runner.launch(plan).unwrap();
            tickets.push_back(ticket);
        }
        let ticket = tickets.pop_front().expect("something runs");
        let output = runner.collect(ticket).unwrap();
        s.apply(output, &mut events).expect("in step");
        for event in events.drain(..) {
            if let Event::Tokens {
                id, index, extras, ..
            } = event
                && let Some(search) = searches.iter_mut().find(|search| search.id == id)
            {
                let beam = search.beams.get_mut(&index).expect("a live beam");
                beam.2.extend(extras);
            }
        }
        hold = false;
        searches.retain_mut(|search| {
            hold |= search.advance(&mut s, &mut events);
            if search.chosen < len {
                return true;
            }
            let found: Vec<_> = search.beams.values().map(|(_, output, _)| output).collect();
            let expected = plain(&prompts[&search.id], len, window);
            assert_eq!(found.len(), WIDTH);
            for tokens in expected {
                let output = &tokens[search.prompt..];
                assert!(
                    found.iter().any(|f| f[..] == *output),
                    "seed {seed}: {output:?} is missing"
                );
            }
            assert!(s.abort(search.id, &mut events));
            false
        });
        events.clear();
    }
    assert!(
        searches.is_empty(),
        "seed {seed}: a search ended without its beams"
    );
    assert_eq!((s.kv().usage().tables, s.kv().usage().swapped), (0, 0));
    let stats = s.stats().totals;
    (stats.preemptions, runner.copies)
}

#[test]
fn beams_are_those_of_a_plain_search() {
    let (mut preemptions, mut copies) = (0, 0);
    for seed in 0..200 {
        let (p, c) = search(seed);
        preemptions += p;
        copies += c;
    }
    assert!(
        preemptions > 200 && copies > 500,
        "{preemptions} preemptions, {copies} copies"
    );
}

#[test]
fn a_fork_shares_blocks_and_is_announced_with_its_first_row() {
    let mut s = scheduler(common::manual::config(), 16);
    s.add(request(0, 8, 9)).unwrap();
    step(&mut s, 7);
    let used = s.stats().kv_used_blocks;
    s.fork(RequestId(0), 0, 5, 8, &[3], "beam").unwrap();
    s.rewrite(RequestId(0), 0, 8, &[4]).unwrap();
    assert_eq!(s.stats().kv_used_blocks, used);
    let (plan, _) = step(&mut s, 7);
    let news: Vec<_> = plan
        .admitted
        .iter()
        .map(|a| (a.index, a.params, a.tokens[8], a.num_computed))
        .collect();
    assert_eq!(news, [(0, "params", 4, 8), (5, "beam", 3, 8)]);
    assert_eq!(plan.released, [plan.admitted[0].slot]);
    assert_eq!(common::manual::rows(&plan), [(8, 1), (8, 1)]);
}

#[test]
fn a_fork_without_a_free_slot_waits() {
    let config = SchedulerConfig {
        max_num_seqs: 1,
        ..common::manual::config()
    };
    let mut s = scheduler(config, 16);
    s.add(request(0, 8, 2)).unwrap();
    step(&mut s, 7);
    s.fork(RequestId(0), 0, 1, 9, &[], "beam").unwrap();
    assert_eq!((s.stats().running, s.stats().waiting), (1, 1));
    step(&mut s, 7);
    let (plan, _) = step(&mut s, 7);
    assert_eq!(
        (plan.admitted[0].index, plan.admitted[0].num_computed),
        (1, 8)
    );
}

#[test]
fn what_cannot_be_branched_is_refused_and_changes_nothing() {
    let id = RequestId(0);
    let config = SchedulerConfig {
        max_steps_in_flight: 2,
        ..common::manual::config()
    };
    let mut s = scheduler(config, 16);
    let mut r = request(0, 8, 4);
    r.n = 2;
    s.add(r).unwrap();
    let refused = |s: &mut common::manual::Sched, index, keep, tail: &[u32]| {
        s.rewrite(id, index, keep, tail).unwrap_err()
    };
    let pending = ForkError::PromptPending { id };
    assert_eq!(refused(&mut s, 0, 8, &[]), pending);
    assert_eq!(refused(&mut s, 1, 8, &[]), pending);
    assert_eq!(
        refused(&mut s, 2, 8, &[]),
        ForkError::NoSequence { id, index: 2 }
    );
    let plan = s.schedule().unwrap();
    assert_eq!(
        refused(&mut s, 0, 8, &[]),
        ForkError::InFlight { id, index: 0 }
    );
    let mut events: Vec<common::manual::News> = Vec::new();
    s.apply(common::manual::output(&plan, 7), &mut events)
        .unwrap();
    for keep in [7, 10] {
        let out = ForkError::KeepOutOfRange {
            id,
            index: 0,
            keep,
            num_prompt: 8,
            num_tokens: 9,
        };
        assert_eq!(refused(&mut s, 0, keep, &[]), out);
    }
    let long = ForkError::TooLong {
        id,
        len: 12,
        limit: 12,
    };
    assert_eq!(refused(&mut s, 0, 9, &[1, 2, 3]), long);
    let taken = s.fork(id, 0, 1, 9, &[], "beam").unwrap_err();
    assert_eq!(taken, ForkError::IndexTaken { id, index: 1 });
    let before = s.snapshot();
    s.rewrite(id, 0, 9, &[]).expect("nothing to do");
    assert_eq!(s.snapshot(), before);
    s.rewrite(id, 0, 9, &[1, 2]).expect("one token is left");
}

#[test]
fn lockstep_waits_for_the_sample() {
    let config = SchedulerConfig {
        max_steps_in_flight: 2,
        ..common::manual::config()
    };
    let mut s = scheduler(config, 16);
    let mut r = request(0, 8, 4);
    r.lockstep = true;
    s.add(r).unwrap();
    assert!(s.schedule().is_some());
    assert!(s.schedule().is_none());
}
