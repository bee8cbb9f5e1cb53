//! `demo`: a dozen conversations at once through a paged KV cache and a continuous batch.

mod prompts;
mod view;

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use clap::Args;
use engine::{FinishReason, GenerateRequest};

use crate::args::EngineArgs;
use crate::say::say;
use prompts::Question;
use view::{Live, Plain, letter};

/// Answers a dozen questions at once and shows how: who prefills, decodes, finishes, who takes
/// the free place, and which sequence holds which block of the KV cache.
#[derive(Args, Debug)]
pub struct DemoArgs {
    /// Ask this instead of the built-in questions; may be given several times.
    #[arg(short, long)]
    prompt: Vec<String>,
    /// Most tokens of an answer.
    #[arg(long, default_value_t = 400)]
    max_tokens: u32,
    /// Shows each step for at least this many milliseconds on a terminal (not counted in tokens/s).
    #[arg(long, default_value_t = 25)]
    step_ms: u64,
    /// Print line by line, also on a terminal.
    #[arg(long)]
    plain: bool,
    /// Check the answers to the built-in questions; exit code 1 if one is wrong.
    #[arg(long, conflicts_with = "prompt")]
    check: bool,
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// One question and its answer so far.
#[derive(Debug)]
pub struct Conversation {
    question: Question,
    text: String,
    done: bool,
}

/// Runs the command.
pub fn run(args: &DemoArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    let (mut engine, names) = args.engine.clone().for_demo().load()?;
    let questions = match args.prompt.is_empty() {
        true => prompts::built_in(),
        false => args.prompt.iter().map(|p| Question::own(p)).collect(),
    };
    let mut params = engine.frontend().default_sampling_params();
    params.temperature = 0.0;
    params.max_tokens = Some(args.max_tokens);
    engine.trace();
    let mut conversations = Vec::new();
    for (at, question) in questions.into_iter().enumerate() {
        engine.add_request(GenerateRequest::new(
            at.to_string(),
            question.chat(),
            params.clone(),
        ))?;
        conversations.push(Conversation {
            question,
            text: String::new(),
            done: false,
        });
    }
    say(format_args!(
        "{} answers {} questions at once; at most {} run together, the rest wait for a place.\n",
        names.0[0],
        conversations.len(),
        engine.frontend().limits().max_num_seqs
    ))?;

    let live = std::io::stdout().is_terminal() && !args.plain;
    let (mut plain, mut screen) = (Plain::default(), Live::default());
    let mut problems = Vec::new();
    let (mut tokens, mut busy, mut first_token) = (0, Duration::ZERO, None);
    let mut places_taken = 0;
    while engine.has_work() {
        let start = Instant::now();
        let step = engine.step();
        busy += start.elapsed();
        for (id, delta) in &step.deltas {
            conversations[id.0 as usize].text.push_str(&delta.text);
            tokens += delta.token_ids.len();
            if first_token.is_none() && tokens > 0 {
                first_token = Some(started.elapsed());
            }
        }
        for (id, result) in &step.finished {
            conversations[id.0 as usize].done = true;
            match result {
                Ok(output) if output.outputs[0].finish_reason() == Some(FinishReason::Stop) => {}
                Ok(_) => problems.push(format!("{} did not end by itself", letter(id.0))),
                Err(error) => problems.push(format!("{}: {error}", letter(id.0))),
            }
        }
        if let Some(report) = &step.report {
            places_taken += report
                .admitted
                .iter()
                .filter(|a| a.replaces.is_some())
                .count();
            let kv = engine.kv_snapshot();
            if live {
                screen.step(report, &kv, &conversations);
                std::thread::sleep(
                    Duration::from_millis(args.step_ms).saturating_sub(start.elapsed()),
                );
            } else {
                plain.step(report, &kv)?;
                for (id, _) in &step.finished {
                    plain.answer(id.0, &conversations[id.0 as usize])?;
                }
            }
        }
    }
    plain.flush()?;
    if live {
        for (request, c) in conversations.iter().enumerate() {
            say(format_args!(
                "\n\x1b[1m{} {}\x1b[0m\n{}",
                letter(request as u64),
                c.question.text,
                c.text.trim()
            ))?;
        }
    }

    let stats = engine.stats();
    let leaked = stats.kv_used_blocks;
    say(format_args!(
        "\n{} answers, {tokens} tokens in {:.2} s: {:.0} tokens/s · first token {:.2} s after the start\n\
         prefix cache hit rate: {:.1} % · {places_taken} freed places taken by waiting sequences · blocks leaked: {leaked}",
        conversations.len(),
        busy.as_secs_f64(),
        tokens as f64 / busy.as_secs_f64(),
        first_token.unwrap_or_default().as_secs_f64(),
        100.0 * stats.prefix_hit_rate(),
    ))?;
    if args.check {
        for (request, c) in conversations.iter().enumerate() {
            if !c.text.contains(c.question.expect) {
                let name = letter(request as u64);
                problems.push(format!(
                    "{name} must mention '{}', but says: {}",
                    c.question.expect, c.text
                ));
            }
        }
        if leaked > 0 {
            problems.push(format!("{leaked} blocks leaked"));
        }
        if stats.totals.prefix_hits == 0 {
            problems.push("the prefix cache was never hit".into());
        }
        if places_taken == 0 {
            problems.push("no freed place was taken".into());
        }
    }
    for problem in &problems {
        eprintln!("demo: {problem}");
    }
    anyhow::ensure!(
        !args.check || problems.is_empty(),
        "{} checks failed",
        problems.len()
    );
    Ok(())
}
