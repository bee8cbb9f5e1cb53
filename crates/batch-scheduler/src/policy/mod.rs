//! Who is served first, and who gives way when the KV cache is full.

mod fair;

pub use fair::WeightedFair;

use crate::request::RequestId;

/// What a policy knows of a request when it is added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestInfo {
    /// The request.
    pub id: RequestId,
    /// Its place in the order of arrival.
    pub arrival: u64,
    /// [`Request::priority`](crate::Request::priority).
    pub priority: i32,
    /// [`Request::class`](crate::Request::class).
    pub class: u64,
    /// Tokens in the prompt.
    pub prompt_tokens: u32,
    /// Most tokens of output, a sequence.
    pub max_tokens: u32,
    /// Sequences.
    pub n: u32,
}

/// A running sequence that may be preempted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its request.
    pub id: RequestId,
    /// Which of the request's sequences.
    pub index: u32,
    /// The rank the policy gave the request.
    pub rank: i64,
    /// The request's place in the order of arrival.
    pub arrival: u64,
    /// Tokens whose keys and values a preemption throws away (less what the prefix cache keeps).
    pub num_computed: u32,
}

/// Decides the order of waiting requests and the victim of a preemption.
///
/// Requests stand in queues. Within a queue they are ordered by [`rank`](Self::rank), then by
/// arrival, then by index within the request; a preempted sequence returns to its place in that
/// order, which is in front of everything that came later. [`next_queue`](Self::next_queue)
/// chooses between queues. Running sequences are served in the order of rank and arrival too, and
/// a sequence only ever gives way to one in front of it. The first of them therefore always
/// advances, whatever a policy does: this is what the progress guarantee of the crate rests on.
pub trait SchedulingPolicy: Send {
    /// The queue of a request. Asked once, when it is added.
    fn queue(&self, _request: &RequestInfo) -> u64 {
        0
    }

    /// The rank of a request; lower is served first. Asked once, when it is added.
    fn rank(&self, _request: &RequestInfo) -> i64 {
        0
    }

    /// A queue got its first waiting entry.
    fn backlog_began(&mut self, _queue: u64) {}

    /// Index in `backlogged` of the queue whose head is admitted next. `backlogged` is sorted and
    /// not empty; asked also where it holds one queue. An index out of range counts as the last.
    fn next_queue(&mut self, _backlogged: &[u64]) -> usize {
        0
    }

    /// Whether [`served`](Self::served) shall be called.
    fn wants_service(&self) -> bool {
        false
    }

    /// A step computes `tokens` tokens of a sequence of `queue`.
    fn served(&mut self, _queue: u64, _tokens: usize) {}

    /// Index of the sequence to preempt. `behind` holds the sequences with less claim than the
    /// one that needs room, the one with the least claim last, and is not empty. An index out of
    /// range counts as the last.
    fn victim(&mut self, behind: &[Candidate]) -> usize {
        behind.len() - 1
    }
}

/// Whom a preemption hits among sequences of the same, lowest rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VictimRule {
    /// The one that arrived last.
    #[default]
    Newest,
    /// The one with the fewest computed tokens; the one that arrived last among equals.
    LeastLostWork,
}

impl VictimRule {
    /// Applies the rule; see [`SchedulingPolicy::victim`].
    pub fn choose(self, behind: &[Candidate]) -> usize {
        let last = behind.len() - 1;
        match self {
            Self::Newest => last,
            Self::LeastLostWork => (0..=last)
                .rev()
                .take_while(|&i| behind[i].rank == behind[last].rank)
                .min_by_key(|&i| behind[i].num_computed)
                .unwrap_or(last),
        }
    }
}

/// First come, first served.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fcfs {
    /// Whom a preemption hits.
    pub victim: VictimRule,
}

impl SchedulingPolicy for Fcfs {
    fn victim(&mut self, behind: &[Candidate]) -> usize {
        self.victim.choose(behind)
    }
}

/// By [`Request::priority`](crate::Request::priority), lower values first; first come, first
/// served among equals. A stream of urgent requests without end keeps the others waiting.
#[derive(Clone, Copy, Debug, Default)]
pub struct Priority {
    /// Whom a preemption hits among the least urgent.
    pub victim: VictimRule,
}

impl SchedulingPolicy for Priority {
    fn rank(&self, request: &RequestInfo) -> i64 {
        request.priority.into()
    }

    fn victim(&mut self, behind: &[Candidate]) -> usize {
        self.victim.choose(behind)
    }
}
