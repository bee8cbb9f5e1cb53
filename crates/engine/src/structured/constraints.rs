//! Where each constrained sequence stands in its grammar. Owned by the engine's core.

use std::collections::HashMap;
use std::num::NonZero;
use std::thread;

use batch_scheduler::{Event, FinishReason, RequestId, SampleMask, SlotId, StepPlan};
use llguidance::Matcher;
use llguidance::toktrie::TokTrie;

use super::Grammar;

/// Fewer masks than this are not worth a thread of their own.
const MASKS_A_THREAD: usize = 4;

/// A sequence that must end, and why.
pub(crate) struct Ending {
    pub(crate) id: RequestId,
    pub(crate) index: u32,
    pub(crate) reason: FinishReason,
}

/// The constrained sequences of all open requests.
#[derive(Default)]
pub(crate) struct Constraints {
    requests: HashMap<RequestId, Constrained>,
}

struct Constrained {
    grammar: Grammar,
    /// Those that were sampled already, by index.
    sequences: HashMap<u32, Sequence>,
    /// Sequences that have not ended.
    open: u32,
}

struct Sequence {
    matcher: Matcher,
    /// Tokens so far.
    produced: u32,
    /// Text so far, as long as the constraint has not begun.
    free: Option<Vec<u8>>,
}

/// A mask to compute: the sequence is taken out of the books for so long.
struct Job {
    id: RequestId,
    index: u32,
    sample: u32,
    sequence: Sequence,
}

impl Constraints {
    /// Whether no open request is constrained.
    pub(crate) fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// A request with `n` sequences was taken in.
    pub(crate) fn add(&mut self, id: RequestId, n: u32, grammar: Grammar) {
        let constrained = Constrained {
            grammar,
            sequences: HashMap::new(),
            open: n,
        };
        self.requests.insert(id, constrained);
    }

    /// Computes the masks of a plan whose slots are occupied as `occupant` says. Returns sequences
    /// that cannot go on; their samples are of no use to anybody.
    pub(crate) fn fill<P>(
        &mut self,
        plan: &mut StepPlan<P>,
        occupant: impl Fn(SlotId) -> Option<(RequestId, u32)>,
    ) -> Vec<Ending> {
        let mut jobs = Vec::new();
        for (sample, row) in (0..).zip(&plan.samples) {
            let Some((id, index)) = occupant(row.slot) else {
                continue;
            };
            let Some(request) = self.requests.get_mut(&id) else {
                continue;
            };
            let sequence = request.sequences.remove(&index);
            let sequence = sequence.unwrap_or_else(|| Sequence::new(&request.grammar));
            if sequence.free.is_some() {
                request.sequences.insert(index, sequence);
                continue;
            }
            jobs.push(Job {
                id,
                index,
                sample,
                sequence,
            });
        }
        let requests = &self.requests;
        let run = |jobs: &mut [Job]| -> Vec<Result<Vec<u32>, FinishReason>> {
            let mask = |job: &mut Job| job.sequence.mask(&requests[&job.id].grammar);
            jobs.iter_mut().map(mask).collect()
        };
        let masks = in_parallel(&mut jobs, run);
        let mut endings = Vec::new();
        for (job, mask) in jobs.into_iter().zip(masks) {
            let Job { id, index, .. } = job;
            match mask {
                Ok(allowed) => plan.masks.push(SampleMask {
                    sample: job.sample,
                    allowed,
                }),
                Err(reason) => endings.push(Ending { id, index, reason }),
            }
            if let Some(request) = self.requests.get_mut(&id) {
                request.sequences.insert(index, job.sequence);
            }
        }
        endings
    }

    /// Follows what happened. Returns sequences whose grammar is at its end, or that left it.
    pub(crate) fn advance<L>(&mut self, events: &[Event<L>]) -> Vec<Ending> {
        let mut endings = Vec::new();
        for event in events {
            let Event::Tokens {
                id, index, tokens, ..
            } = event
            else {
                continue;
            };
            let Some(Constrained {
                grammar, sequences, ..
            }) = self.requests.get_mut(id)
            else {
                continue;
            };
            let Some(sequence) = sequences.get_mut(index) else {
                continue;
            };
            if let Some(reason) = sequence.take(tokens, grammar) {
                let (id, index) = (*id, *index);
                endings.push(Ending { id, index, reason });
            }
        }
        endings
    }

    /// Drops the sequences that ended.
    pub(crate) fn forget<L>(&mut self, events: &[Event<L>]) {
        for event in events {
            let Event::Finished { id, index, .. } = event else {
                continue;
            };
            if let Some(request) = self.requests.get_mut(id) {
                request.sequences.remove(index);
                request.open = request.open.saturating_sub(1);
                if request.open == 0 {
                    self.requests.remove(id);
                }
            }
        }
    }
}

impl Sequence {
    fn new(grammar: &Grammar) -> Self {
        Sequence {
            matcher: grammar.start.deep_clone(),
            produced: 0,
            free: grammar.after.as_ref().map(|_| Vec::new()),
        }
    }

    /// The tokens that may come next; an error is why none can.
    fn mask(&mut self, grammar: &Grammar) -> Result<Vec<u32>, FinishReason> {
        let mut accepting = || self.matcher.is_accepting().unwrap_or(false);
        let over = accepting();
        let mask = match self.matcher.compute_mask() {
            Ok(mask) => mask,
            // Nothing can follow, not even an end-of-sequence token: the model has none.
            Err(_) if over => return Err(FinishReason::Eos),
            Err(error) => return Err(failed(&error.to_string())),
        };
        let mut words = mask.as_slice().to_vec();
        if over && grammar.eos.is_empty() {
            clear(&mut words, &grammar.all_eos);
        }
        // What the sampler bans for now is no way to go on.
        if over && self.produced < grammar.min_tokens {
            let mut rest = words.clone();
            clear(&mut rest, &grammar.all_eos);
            if rest.iter().all(|word| *word == 0) {
                return Err(FinishReason::Eos);
            }
        }
        match words.iter().any(|word| *word != 0) {
            true => Ok(words),
            false => Err(FinishReason::Eos),
        }
    }

    /// Follows its own tokens; why it ends, if it does.
    fn take(&mut self, mut tokens: &[u32], grammar: &Grammar) -> Option<FinishReason> {
        self.produced += tokens.len() as u32;
        while let (Some(text), Some(after)) = (&mut self.free, &grammar.after) {
            let (token, rest) = tokens.split_first()?;
            tokens = rest;
            if is_at_end(
                text,
                grammar.vocabulary.tok_trie().token(*token),
                after.as_bytes(),
            ) {
                self.free = None;
            }
        }
        if let Err(error) = self.matcher.consume_tokens(tokens) {
            return Some(failed(&error.to_string()));
        }
        self.matcher.is_stopped().then_some(FinishReason::Eos)
    }
}

/// Appends a token to the end of a text that is remembered, and tells whether the text ends with
/// `end` now.
fn is_at_end(text: &mut Vec<u8>, token: &[u8], end: &[u8]) -> bool {
    let token = token
        .strip_prefix(&[TokTrie::SPECIAL_TOKEN_MARKER])
        .unwrap_or(token);
    text.extend_from_slice(token);
    let found = text.trim_ascii_end().ends_with(end);
    let superfluous = text.len().saturating_sub(end.len() + 256);
    text.drain(..superfluous);
    found
}

fn failed(cause: &str) -> FinishReason {
    // What follows is llguidance's state.
    let cause = cause.split("\n<").next().unwrap_or_default().trim();
    tracing::warn!("a structured output cannot go on: {cause}");
    FinishReason::Error(format!("the structured output cannot go on: {cause}"))
}

fn clear(words: &mut [u32], tokens: &[u32]) {
    for token in tokens {
        if let Some(word) = words.get_mut(*token as usize / 32) {
            *word &= !(1 << (token % 32));
        }
    }
}

/// `run` over all of `jobs`, in their order, on several threads if they are many.
fn in_parallel<T: Send, J: Send>(
    jobs: &mut [J],
    run: impl Fn(&mut [J]) -> Vec<T> + Sync,
) -> Vec<T> {
    let threads = match jobs.len() < 2 * MASKS_A_THREAD {
        true => 1,
        false => thread::available_parallelism().map_or(1, NonZero::get),
    };
    let threads = threads.min(jobs.len() / MASKS_A_THREAD);
    if threads <= 1 {
        return run(jobs);
    }
    let share = jobs.len().div_ceil(threads);
    let (own, others) = jobs.split_at_mut(share);
    thread::scope(|scope| {
        let run = &run;
        let handles: Vec<_> = others
            .chunks_mut(share)
            .map(|jobs| scope.spawn(move || run(jobs)))
            .collect();
        let mut results = run(own);
        for handle in handles {
            // llguidance's panics are caught where they happen.
            results.extend(handle.join().expect("computing a mask does not panic"));
        }
        results
    })
}
