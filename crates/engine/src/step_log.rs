//! Who prefilled and who decoded in the last steps: for views of a running server.
//!
//! Recording costs a copy of a few bytes a row, and stops soon after the last look.

use std::collections::VecDeque;

use crate::report::SeqId;

/// What a step computed for one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepRow {
    /// The sequence.
    pub seq: SeqId,
    /// Tokens.
    pub len: u32,
    /// Whether it decoded; otherwise it computed its prompt, or again what a preemption threw away.
    pub decode: bool,
}

/// One step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepRecord {
    /// Its number.
    pub step: u64,
    /// What it computed, in the order of service.
    pub rows: Vec<StepRow>,
}

/// Steps that are kept.
const STEPS: usize = 256;

/// Steps that are recorded after a look; whoever looks again later finds a gap.
const UNSEEN: usize = 4096;

/// The last steps, oldest first, while somebody looks.
#[derive(Default)]
pub(crate) struct StepLog {
    steps: VecDeque<StepRecord>,
    /// Steps still to be recorded.
    left: usize,
}

impl StepLog {
    /// Whether a step is to be recorded.
    pub(crate) fn is_on(&self) -> bool {
        self.left > 0
    }

    /// Records a step; the room of the oldest is used again.
    pub(crate) fn push(&mut self, step: u64, rows: impl Iterator<Item = StepRow>) {
        let mut record = match self.steps.len() < STEPS {
            true => StepRecord::default(),
            false => self.steps.pop_front().unwrap_or_default(),
        };
        record.step = step;
        record.rows.clear();
        record.rows.extend(rows);
        self.steps.push_back(record);
        self.left -= 1;
        if self.left == 0 {
            *self = Self::default();
        }
    }

    /// What was recorded; recording goes on from here.
    pub(crate) fn look(&mut self) -> Vec<StepRecord> {
        self.left = UNSEEN;
        self.steps.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_keeps_the_last_steps_and_stops_when_nobody_looks() {
        let mut log = StepLog::default();
        assert!(!log.is_on() && log.look().is_empty() && log.is_on());
        for step in 0..300 {
            log.push(step, std::iter::empty());
        }
        let steps: Vec<u64> = log.look().iter().map(|record| record.step).collect();
        assert_eq!(steps, (300 - STEPS as u64..300).collect::<Vec<_>>());
        for step in 0..UNSEEN as u64 {
            assert!(log.is_on());
            log.push(step, std::iter::empty());
        }
        assert!(!log.is_on() && log.steps.is_empty());
    }
}
