//! What the scheduler tells of itself, held against the plans it makes and the tokens that came.

use std::collections::BTreeMap;

use batch_scheduler::{RequestId, Scheduler, SeqState, Stats, StepPlan, Totals};
use paged_kv::{BlockManager, KvAllocator};

use super::model::Params;
use super::runner::PagedRunner;

/// The figures of the step just planned, before the runner has it.
pub fn check_figures(
    before: &Stats,
    scheduler: &Scheduler<BlockManager, Params>,
    plan: &StepPlan<Params>,
    runner: &PagedRunner,
) {
    assert_eq!(scheduler.steps_in_flight(), before.steps_in_flight + 1);
    let (stats, config) = (scheduler.stats(), scheduler.config());
    let step = stats.last_step;
    assert_eq!(
        (step.step, step.swapped_in_blocks),
        (plan.step, plan.swap_ins.len())
    );
    assert_eq!(step.swapped_out_blocks, plan.swap_outs.len());
    assert_eq!((step.running, step.waiting), (stats.running, stats.waiting));
    assert_eq!(stats.steps_in_flight, before.steps_in_flight + 1);

    let (mut prefill, mut decode) = (0, 0);
    for row in &plan.rows {
        let news = plan.admitted.iter().find(|new| new.slot == row.slot);
        let news = news.map(|new| (new.tokens.len() as u32, new.num_prompt));
        let (known, prompt) = news.or(runner.known(row.slot)).expect("the slot is taken");
        match known > prompt && row.start + 1 == known {
            true => decode += row.len as usize,
            false => prefill += row.len as usize,
        }
    }
    assert_eq!((step.prefill_tokens, step.decode_tokens), (prefill, decode));

    let own = |s: &&batch_scheduler::SampleRow| plan.rows[s.row as usize].slot == s.slot;
    let own = plan.samples.iter().filter(own).count();
    let forked = plan.samples.len() - own;
    assert_eq!(
        step.running + step.preemptions,
        before.running + step.admitted + forked
    );
    if before.steps_in_flight == 0 {
        // Nobody is on the way out: who gave way waits at once.
        assert_eq!(
            step.waiting + step.admitted,
            before.waiting + step.preemptions
        );
    }
    if config.micro_batches {
        let entering = before.waiting.min(config.max_num_seqs - before.running);
        let share = (before.running + entering).div_ceil(config.max_steps_in_flight);
        assert!(own <= share.max(1), "{own} samples, a share is {share}");
    }

    let was = before.totals;
    let expected = Totals {
        steps: was.steps + 1,
        finished: was.finished,
        prefill_tokens: was.prefill_tokens + prefill as u64,
        decode_tokens: was.decode_tokens + decode as u64,
        preemptions: was.preemptions + step.preemptions as u64,
        swapped_out_blocks: was.swapped_out_blocks + plan.swap_outs.len() as u64,
        swapped_in_blocks: was.swapped_in_blocks + plan.swap_ins.len() as u64,
        prefix_queries: was.prefix_queries + step.prefix_queries as u64,
        prefix_hits: was.prefix_hits + step.prefix_hits as u64,
    };
    assert_eq!(stats.totals, expected);
    assert!(step.prefix_hits <= step.prefix_queries);
}

/// The views, after events were passed on. `live`: tokens of prompt and output of each sequence
/// that has not ended, those yet to fork included.
pub fn check_views(
    scheduler: &Scheduler<BlockManager, Params>,
    live: &BTreeMap<(RequestId, u32), (usize, usize)>,
) {
    let (stats, views) = (scheduler.stats(), scheduler.snapshot());
    let count = |states: &[SeqState]| views.iter().filter(|v| states.contains(&v.state)).count();
    assert_eq!(
        stats.running,
        count(&[SeqState::Prefill, SeqState::Running])
    );
    assert_eq!(
        scheduler.has_work(),
        !views.is_empty() || stats.steps_in_flight > 0
    );
    let block = scheduler.kv().block_size().get() as u32;
    let (mut slotted, mut unslotted) = (0, 0);
    for view in &views {
        let key = (view.id, view.index);
        if view.state != SeqState::Finished {
            let (prompt, output) = live[&key];
            assert_eq!(
                (view.num_prompt as usize, view.num_tokens as usize),
                (prompt, prompt + output)
            );
            let decodes = output > 0 && view.num_computed + 1 >= view.num_tokens;
            match view.state {
                SeqState::Prefill => assert!(!decodes, "{view:?}"),
                SeqState::Running => assert!(decodes, "{view:?}"),
                _ => {}
            }
        }
        match view.slot {
            Some(slot) => {
                slotted += 1;
                assert!(view.num_computed.div_ceil(block) as usize <= view.blocks.len());
                let slot = batch_scheduler::SlotId(slot);
                assert_eq!(
                    scheduler.occupant(slot),
                    Some((view.id, view.index, view.num_prompt))
                );
            }
            None => {
                unslotted += 1;
                assert_eq!((view.num_computed, view.blocks.len()), (0, 0), "{view:?}");
                assert!(matches!(
                    view.state,
                    SeqState::Waiting | SeqState::Preempted
                ));
            }
        }
    }
    assert_eq!(unslotted, stats.waiting);
    let slots = 0..scheduler.config().max_num_seqs as u32;
    let taken = slots.filter(|&s| scheduler.occupant(batch_scheduler::SlotId(s)).is_some());
    assert_eq!(taken.count(), slotted);
}
