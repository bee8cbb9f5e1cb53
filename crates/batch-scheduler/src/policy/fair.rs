use std::collections::BTreeMap;

use super::{Candidate, RequestInfo, SchedulingPolicy, VictimRule};

/// Shares the tokens of the machine among classes ([`Request::class`](crate::Request::class)) in
/// proportion to their weights, however many requests each of them sends.
///
/// Every class has an account of the tokens computed for it, divided by its weight; the
/// backlogged class with the lowest account is admitted next (deficit round robin with a quantum
/// of one token; Sheng et al., "Fairness in Serving Large Language Models", 2024, call it a
/// virtual token counter). Accounts are charged as tokens are computed, since nobody knows the
/// length of an output in advance. A class that was idle starts at the account of the class last
/// chosen: it cannot save up.
#[derive(Clone, Debug, Default)]
pub struct WeightedFair {
    /// Whom a preemption hits.
    pub victim: VictimRule,
    weights: BTreeMap<u64, u32>,
    accounts: BTreeMap<u64, u128>,
    /// The account of the class last chosen; never falls.
    now: u128,
}

/// Accounts count in 2^-32 tokens, so that the division by a weight loses nothing that matters.
const TOKEN: u128 = 1 << 32;

/// Accounts that are kept before those without meaning are dropped.
const KEEP: usize = 1024;

impl WeightedFair {
    /// Equal weights for all classes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives a class `weight` times the share of a class of weight 1 (0 counts as 1).
    pub fn with_weight(mut self, class: u64, weight: u32) -> Self {
        self.weights.insert(class, weight.max(1));
        self
    }

    fn account(&self, class: u64) -> u128 {
        self.accounts.get(&class).copied().unwrap_or(self.now)
    }
}

impl SchedulingPolicy for WeightedFair {
    fn queue(&self, request: &RequestInfo) -> u64 {
        request.class
    }

    fn backlog_began(&mut self, queue: u64) {
        if self.accounts.len() >= KEEP {
            // An account that is not ahead of `now` says no more than a missing one.
            let now = self.now;
            self.accounts.retain(|_, account| *account > now);
        }
        let account = self.account(queue).max(self.now);
        self.accounts.insert(queue, account);
    }

    fn next_queue(&mut self, backlogged: &[u64]) -> usize {
        let (index, account) = backlogged
            .iter()
            .map(|&class| self.account(class))
            .enumerate()
            .min_by_key(|&(_, account)| account)
            .unwrap_or((0, self.now));
        self.now = self.now.max(account);
        index
    }

    fn wants_service(&self) -> bool {
        true
    }

    fn served(&mut self, queue: u64, tokens: usize) {
        let weight = self.weights.get(&queue).copied().unwrap_or(1);
        let now = self.now;
        *self.accounts.entry(queue).or_insert(now) += tokens as u128 * TOKEN / u128::from(weight);
    }

    fn victim(&mut self, behind: &[Candidate]) -> usize {
        self.victim.choose(behind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serve(fair: &mut WeightedFair, class: u64, tokens: usize) {
        fair.backlog_began(class);
        assert_eq!(fair.next_queue(&[class]), 0);
        fair.served(class, tokens);
    }

    #[test]
    fn accounts_that_say_nothing_are_dropped_and_debts_are_not() {
        let mut fair = WeightedFair::new();
        for class in 10..2010 {
            serve(&mut fair, class, 1);
        }
        serve(&mut fair, 1, 500);
        for _ in 0..9 {
            serve(&mut fair, 2, 10);
        }
        assert!(fair.accounts.len() < 10, "{}", fair.accounts.len());
        for class in 1..=3 {
            fair.backlog_began(class);
        }
        assert_eq!(fair.next_queue(&[1, 3]), 1, "the first class is in debt");
        assert_eq!(fair.next_queue(&[1, 2]), 1, "more than the second");
    }
}
