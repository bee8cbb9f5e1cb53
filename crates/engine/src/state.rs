//! From the core's events to a request's output: text, stop strings, log-probabilities, times.

use std::sync::Arc;
use std::time::Instant;

use batch_scheduler::{Event, FinishReason as CoreReason, StopCriteria, Usage};
use sampler::{SamplingParams, TokenLogprobs};

use crate::core::CoreEvent;
use crate::detokenizer::Detokenizer;
use crate::output::{
    CompletionOutput, Finish, FinishReason, OutputDelta, RequestMetrics, RequestOutput, StopReason,
};
use crate::stop::StopChecker;
use crate::tokenizer::Tokenizer;

/// What one event led to.
#[derive(Default)]
pub(crate) struct Outcome {
    /// News for the user.
    pub(crate) delta: Option<OutputDelta>,
    /// The core must end this sequence: it completed a stop string.
    pub(crate) stop: Option<(u32, String)>,
}

/// A request as its user sees it.
#[derive(Debug)]
pub(crate) struct RequestState {
    output: RequestOutput,
    sequences: Vec<SequenceState>,
    rules: StopCriteria,
    /// Whether what stopped the sequence shows in the text.
    include_stop: bool,
    arrival: Instant,
}

#[derive(Debug)]
struct SequenceState {
    detokenizer: Option<Detokenizer>,
    stop: StopChecker,
}

impl RequestState {
    pub(crate) fn new(
        id: String,
        prompt_token_ids: Vec<u32>,
        params: &SamplingParams,
        rules: &StopCriteria,
        tokenizer: Option<&Arc<Tokenizer>>,
        arrival: Instant,
    ) -> Self {
        let detokenizer = tokenizer.map(|tokenizer| {
            Detokenizer::new(
                tokenizer.clone(),
                &prompt_token_ids,
                params.skip_special_tokens,
            )
        });
        let sequence = |_| SequenceState {
            detokenizer: detokenizer.clone(),
            stop: StopChecker::new(&params.stop, params.include_stop_str_in_output),
        };
        let empty = |index| CompletionOutput {
            index,
            text: String::new(),
            token_ids: Vec::new(),
            logprobs: params.logprobs.map(|_| Vec::new()),
            finish: None,
        };
        RequestState {
            sequences: (0..params.n).map(sequence).collect(),
            rules: rules.clone(),
            include_stop: params.include_stop_str_in_output,
            arrival,
            output: RequestOutput {
                id,
                prompt_logprobs: params.prompt_logprobs.map(|_| vec![None]),
                outputs: (0..params.n).map(empty).collect(),
                metrics: RequestMetrics::default(),
                prompt_token_ids,
            },
        }
    }

    /// The state of a request whose output was taken.
    pub(crate) fn ended() -> Self {
        RequestState {
            output: RequestOutput {
                id: String::new(),
                prompt_token_ids: Vec::new(),
                prompt_logprobs: None,
                outputs: Vec::new(),
                metrics: RequestMetrics::default(),
            },
            sequences: Vec::new(),
            rules: StopCriteria::max_tokens(1),
            include_stop: false,
            arrival: Instant::now(),
        }
    }

    /// The output so far.
    pub(crate) fn output(&self) -> &RequestOutput {
        &self.output
    }

    pub(crate) fn into_output(self) -> RequestOutput {
        self.output
    }

    /// Whether all sequences have ended.
    pub(crate) fn is_finished(&self) -> bool {
        self.output.outputs.iter().all(|seq| seq.finish.is_some())
    }

    pub(crate) fn on_event(&mut self, event: CoreEvent) -> Outcome {
        match event {
            CoreEvent::Scheduled {
                at, cached_tokens, ..
            } => {
                let metrics = &mut self.output.metrics;
                metrics.queue_time = Some(at.saturating_duration_since(self.arrival));
                metrics.num_cached_tokens = cached_tokens;
                Outcome::default()
            }
            CoreEvent::Sequence(Event::PromptExtras { start, extras, .. }) => {
                self.on_prompt(start as usize, extras);
                Outcome::default()
            }
            CoreEvent::Sequence(Event::Tokens {
                index,
                tokens,
                extras,
                ..
            }) => self.on_tokens(index, &tokens, extras),
            CoreEvent::Sequence(Event::Finished {
                index,
                reason,
                usage,
                ..
            }) => self.on_finished(index, reason, usage),
        }
    }

    fn on_prompt(&mut self, start: usize, extras: Vec<TokenLogprobs>) {
        let length = self.output.prompt_token_ids.len();
        if let Some(list) = &mut self.output.prompt_logprobs {
            for (position, entry) in (start..length).zip(extras) {
                if list.len() <= position {
                    list.resize(position + 1, None);
                }
                list[position] = Some(entry);
            }
        }
    }

    fn on_tokens(&mut self, index: u32, tokens: &[u32], extras: Vec<TokenLogprobs>) -> Outcome {
        let output = &mut self.output.outputs[index as usize];
        let sequence = &mut self.sequences[index as usize];
        if output.finish.is_some() {
            // A stop string ended it while these were under way.
            return Outcome::default();
        }
        let metrics = &mut self.output.metrics;
        metrics
            .time_to_first_token
            .get_or_insert_with(|| self.arrival.elapsed());
        let mut delta = OutputDelta {
            index,
            text: String::new(),
            token_ids: Vec::with_capacity(tokens.len()),
            logprobs: Vec::new(),
            finish: None,
        };
        let mut stop = None;
        let mut extras = extras.into_iter();
        for &token in tokens {
            delta.token_ids.push(token);
            delta.logprobs.extend(extras.next());
            let count = output.token_ids.len() + delta.token_ids.len();
            let Some(detokenizer) = &mut sequence.detokenizer else {
                continue;
            };
            if !self.include_stop && is_stop_token(&self.rules, token, count) {
                continue;
            }
            if sequence.stop.is_empty() {
                detokenizer.push_into(token, &mut delta.text);
                continue;
            }
            let piece = detokenizer.push(token);
            let armed = count > self.rules.min_tokens as usize;
            let update = sequence.stop.push(&piece, armed);
            delta.text.push_str(&update.text);
            if let Some(matched) = update.matched {
                let text = sequence.stop.stop_string(matched).to_string();
                delta.finish = Some(Finish {
                    reason: FinishReason::Stop,
                    stop_reason: Some(StopReason::Text(text.clone())),
                    error: None,
                });
                stop = Some((index, text));
                break;
            }
        }
        if delta.finish.is_some() {
            metrics.total_time = Some(self.arrival.elapsed());
        }
        self.keep(&delta);
        Outcome {
            delta: Some(delta),
            stop,
        }
    }

    fn on_finished(&mut self, index: u32, reason: CoreReason, usage: Usage) -> Outcome {
        let metrics = &mut self.output.metrics;
        metrics.num_preemptions += usage.preemptions;
        let output = &self.output.outputs[index as usize];
        if output.finish.is_some() {
            return Outcome::default();
        }
        metrics.total_time = Some(self.arrival.elapsed());
        let (reason, stop_reason, error) = match reason {
            CoreReason::Eos => (FinishReason::Stop, None, None),
            CoreReason::StopToken(id) => (FinishReason::Stop, Some(StopReason::Token(id)), None),
            CoreReason::StopString(s) => (FinishReason::Stop, Some(StopReason::Text(s)), None),
            CoreReason::Length => (FinishReason::Length, None, None),
            CoreReason::Aborted => (FinishReason::Abort, None, None),
            CoreReason::Error(message) => (FinishReason::Error, None, Some(message)),
        };
        let mut finish = Finish {
            reason,
            stop_reason,
            error,
        };
        let sequence = &mut self.sequences[index as usize];
        let mut text = String::new();
        if let Some(detokenizer) = &mut sequence.detokenizer {
            let rest = detokenizer.flush();
            let armed = output.token_ids.len() > self.rules.min_tokens as usize;
            let update = sequence.stop.push(&rest, armed);
            text.push_str(&update.text);
            match update.matched {
                Some(matched) => {
                    let string = sequence.stop.stop_string(matched).to_string();
                    finish.reason = FinishReason::Stop;
                    finish.stop_reason = Some(StopReason::Text(string));
                }
                None => text.push_str(&sequence.stop.flush()),
            }
        }
        let delta = OutputDelta {
            index,
            text,
            token_ids: Vec::new(),
            logprobs: Vec::new(),
            finish: Some(finish),
        };
        self.keep(&delta);
        Outcome {
            delta: Some(delta),
            stop: None,
        }
    }

    fn keep(&mut self, delta: &OutputDelta) {
        let output = &mut self.output.outputs[delta.index as usize];
        output.text.push_str(&delta.text);
        output.token_ids.extend_from_slice(&delta.token_ids);
        if let Some(logprobs) = &mut output.logprobs {
            logprobs.extend_from_slice(&delta.logprobs);
        }
        output.finish.clone_from(&delta.finish);
    }
}

/// Whether `token`, the `count`-th of a sequence, ends it; such a token is not part of the text.
fn is_stop_token(rules: &StopCriteria, token: u32, count: usize) -> bool {
    let eos = !rules.ignore_eos && rules.eos_token_ids.contains(&token);
    count >= rules.min_tokens as usize && (eos || rules.stop_token_ids.contains(&token))
}
