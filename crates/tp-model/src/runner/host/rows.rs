//! Which hidden states of a step become logits.

use batch_scheduler::StepPlan;

/// Which hidden states are sampled.
pub(super) struct SampledRows {
    /// Flat index of each row's last token, for rows that are sampled at all.
    pub(super) tokens: Vec<i64>,
    /// Per sample, which of `tokens`.
    pub(super) of_sample: Vec<i64>,
    /// Whether `of_sample` is anything but `0, 1, 2...`.
    pub(super) shared: bool,
}

pub(super) fn sampled_rows<P>(plan: &StepPlan<P>, row_ends: &[i32]) -> Result<SampledRows, String> {
    let mut at_row: Vec<Option<i64>> = vec![None; plan.rows.len()];
    let mut sampled = SampledRows {
        tokens: Vec::with_capacity(plan.samples.len()),
        of_sample: Vec::with_capacity(plan.samples.len()),
        shared: false,
    };
    for (index, sample) in plan.samples.iter().enumerate() {
        let row = sample.row as usize;
        let Some(at) = at_row.get_mut(row) else {
            return Err(format!("a sample of row {row} of {}", plan.rows.len()));
        };
        let at = *at.get_or_insert_with(|| {
            sampled.tokens.push(i64::from(row_ends[row]) - 1);
            sampled.tokens.len() as i64 - 1
        });
        sampled.shared |= at != index as i64;
        sampled.of_sample.push(at);
    }
    Ok(sampled)
}
