//! Sequences that hold no slot and no block, in the order of the policy.

use std::collections::BTreeMap;

use crate::policy::SchedulingPolicy;

/// The place of a sequence in the order of service; unique.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Order {
    pub(crate) rank: i64,
    pub(crate) arrival: u64,
    pub(crate) index: u32,
}

/// Queues of waiting sequences, by their key in the arena.
#[derive(Default)]
pub(crate) struct Waiting {
    queues: BTreeMap<u64, BTreeMap<Order, Entry>>,
    /// The keys of `queues` as a slice, for the policy to choose from.
    backlogged: Vec<u64>,
    len: usize,
    tokens: usize,
}

#[derive(Clone, Copy)]
struct Entry {
    key: u32,
    /// Its length when it came.
    tokens: u32,
}

impl Waiting {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Tokens of all of them.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    pub(crate) fn insert(
        &mut self,
        policy: &mut dyn SchedulingPolicy,
        queue: u64,
        order: Order,
        key: u32,
        tokens: u32,
    ) {
        let entries = self.queues.entry(queue).or_default();
        if entries.is_empty() {
            if let Err(at) = self.backlogged.binary_search(&queue) {
                self.backlogged.insert(at, queue);
            }
            policy.backlog_began(queue);
        }
        let before = entries.insert(order, Entry { key, tokens });
        debug_assert!(before.is_none(), "two sequences in one place");
        self.len += 1;
        self.tokens += tokens as usize;
    }

    pub(crate) fn remove(&mut self, queue: u64, order: Order) {
        let Some(entries) = self.queues.get_mut(&queue) else {
            return;
        };
        if let Some(entry) = entries.remove(&order) {
            self.len -= 1;
            self.tokens -= entry.tokens as usize;
        }
        if entries.is_empty() {
            self.queues.remove(&queue);
            if let Ok(at) = self.backlogged.binary_search(&queue) {
                self.backlogged.remove(at);
            }
        }
    }

    /// The sequence that is admitted next.
    pub(crate) fn head(&self, policy: &mut dyn SchedulingPolicy) -> Option<u32> {
        let last = self.backlogged.len().checked_sub(1)?;
        // Asked where there is no choice either: a policy may keep in mind whose turn it was.
        let chosen = policy.next_queue(&self.backlogged).min(last);
        let entries = self.queues.get(&self.backlogged[chosen])?;
        entries.first_key_value().map(|(_, entry)| entry.key)
    }

    /// Every waiting sequence, queue by queue.
    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let queues = self.queues.values();
        queues.flat_map(|queue| queue.values().map(|entry| entry.key))
    }
}
