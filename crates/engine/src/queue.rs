//! The bound on what waits for its first step.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::error::RequestError;

/// Most of what may wait. A class ([`GenerateRequest::class`](crate::GenerateRequest::class)) that
/// has a weight has its share of either limit for itself: it gets in while it is below that share,
/// even if others have filled the queue. So no more waits than twice a limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueLimits {
    /// Requests. Unset: any number.
    pub max_num_queued_reqs: Option<usize>,
    /// Tokens of their prompts; an empty queue takes a prompt of any length. Unset: any number.
    pub max_num_queued_tokens: Option<usize>,
    /// Weights of classes, as for [`EngineConfig::class_weights`](crate::EngineConfig).
    pub class_weights: BTreeMap<u64, u32>,
}

impl QueueLimits {
    /// The part of `limit` that belongs to `class` alone; at least 1 if it has a weight.
    fn share(&self, limit: usize, class: u64) -> usize {
        let all: u64 = self.class_weights.values().map(|w| u64::from(*w)).sum();
        let Some(weight) = self.class_weights.get(&class) else {
            return 0;
        };
        let share = limit as u128 * u128::from(*weight) / u128::from(all.max(1));
        usize::try_from(share).unwrap_or(usize::MAX).max(1)
    }

    /// Whether a prompt of `tokens` tokens may join what waits in all and of its class.
    fn admit(&self, class: u64, tokens: usize, all: Load, own: Load) -> Result<(), RequestError> {
        let fits_reqs = |load: Load, limit| load.requests < limit;
        let fits_tokens =
            |load: Load, limit| load.requests == 0 || load.tokens.saturating_add(tokens) <= limit;
        let full = |limit, what| Err(RequestError::QueueFull { limit, what });
        if let Some(limit) = self.max_num_queued_reqs
            && !fits_reqs(all, limit)
            && !fits_reqs(own, self.share(limit, class))
        {
            return full(limit, "requests");
        }
        if let Some(limit) = self.max_num_queued_tokens
            && !fits_tokens(all, limit)
            && !(self.class_weights.contains_key(&class)
                && fits_tokens(own, self.share(limit, class)))
        {
            return full(limit, "prompt tokens");
        }
        Ok(())
    }
}

/// What waits.
#[derive(Clone, Copy, Debug, Default)]
struct Load {
    requests: usize,
    tokens: usize,
}

impl Load {
    fn add(&mut self, tokens: usize) {
        self.requests += 1;
        self.tokens += tokens;
    }

    fn take(&mut self, tokens: usize) {
        self.requests -= 1;
        self.tokens -= tokens;
    }
}

#[derive(Debug, Default)]
struct Waiting {
    all: Load,
    /// Classes of which something waits.
    classes: HashMap<u64, Load>,
}

/// Counts requests that were accepted and that no step has touched yet. Locked twice in a
/// request's life, never in a step's.
#[derive(Debug)]
pub(crate) struct Queue {
    limits: QueueLimits,
    waiting: Mutex<Waiting>,
}

impl Queue {
    pub(crate) fn new(limits: QueueLimits) -> Arc<Self> {
        Arc::new(Queue {
            limits,
            waiting: Mutex::default(),
        })
    }

    /// Requests that wait.
    pub(crate) fn len(&self) -> usize {
        self.waiting().all.requests
    }

    /// Takes a place for a prompt of `tokens` tokens.
    pub(crate) fn enter(
        self: &Arc<Self>,
        class: u64,
        tokens: usize,
    ) -> Result<Place, RequestError> {
        let mut waiting = self.waiting();
        let own = waiting.classes.get(&class).copied().unwrap_or_default();
        self.limits.admit(class, tokens, waiting.all, own)?;
        waiting.all.add(tokens);
        waiting.classes.entry(class).or_default().add(tokens);
        Ok(Place {
            queue: self.clone(),
            class,
            tokens,
        })
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Nothing that can panic happens between two changes.
        self.waiting
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// A place in the queue, until it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    queue: Arc<Queue>,
    class: u64,
    tokens: usize,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut waiting = self.queue.waiting();
        waiting.all.take(self.tokens);
        if let Some(own) = waiting.classes.get_mut(&self.class) {
            own.take(self.tokens);
            if own.requests == 0 {
                waiting.classes.remove(&self.class);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn tokens_are_bounded_but_an_empty_queue_takes_any_prompt() {
        let queue = Queue::new(QueueLimits {
            max_num_queued_tokens: Some(10),
            ..QueueLimits::default()
        });
        let long = queue.enter(0, 50).unwrap();
        assert!(queue.enter(0, 1).is_err());
        drop(long);
        let _one = queue.enter(0, 6).unwrap();
        let _two = queue.enter(0, 4).unwrap();
        let refused = queue.enter(0, 1).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "10 prompt tokens are waiting already, which is the most; try again later"
        );
    }

    #[test]
    fn a_class_keeps_its_share_when_another_floods() {
        let queue = Queue::new(QueueLimits {
            max_num_queued_reqs: Some(8),
            max_num_queued_tokens: Some(800),
            class_weights: BTreeMap::from([(1, 3), (2, 1)]),
        });
        let flood: Vec<Place> = std::iter::from_fn(|| queue.enter(1, 100).ok()).collect();
        assert_eq!(flood.len(), 8);
        let others: Vec<Place> = std::iter::from_fn(|| queue.enter(2, 100).ok()).collect();
        assert_eq!(others.len(), 2, "a quarter of 8");
        assert!(queue.enter(3, 1).is_err(), "has no weight");
        drop(flood);
        assert_eq!(queue.len(), 2);
        assert!(queue.enter(3, 1).is_ok());
    }

    #[test]
    fn never_more_than_twice_the_limit_and_nothing_is_left_behind() {
        let mut rng = StdRng::seed_from_u64(7);
        for _ in 0..50 {
            let classes = rng.random_range(1..5);
            let limits = QueueLimits {
                max_num_queued_reqs: Some(rng.random_range(5..30)),
                max_num_queued_tokens: Some(rng.random_range(50..3000)),
                class_weights: (0..classes).map(|c| (c, rng.random_range(1..9))).collect(),
            };
            let (reqs, tokens) = (
                limits.max_num_queued_reqs.unwrap(),
                limits.max_num_queued_tokens.unwrap(),
            );
            let queue = Queue::new(limits);
            let mut held = Vec::new();
            for _ in 0..500 {
                if rng.random_range(0..3) == 0 && !held.is_empty() {
                    held.swap_remove(rng.random_range(0..held.len()));
                } else if let Ok(place) =
                    queue.enter(rng.random_range(0..classes), rng.random_range(1..40))
                {
                    held.push(place);
                }
                let all = queue.waiting().all;
                assert_eq!(all.requests, held.len());
                assert_eq!(all.tokens, held.iter().map(|p| p.tokens).sum::<usize>());
                assert!(all.requests <= 2 * reqs);
                assert!(all.tokens <= 2 * tokens + 40 * (1 + classes as usize));
            }
            drop(held);
            let waiting = queue.waiting();
            assert_eq!((waiting.all.requests, waiting.all.tokens), (0, 0));
            assert!(waiting.classes.is_empty());
        }
    }
}
