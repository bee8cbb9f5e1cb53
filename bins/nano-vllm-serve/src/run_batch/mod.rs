//! `run-batch`: requests from a file in OpenAI's batch format, answers to another.

mod files;
mod line;

use std::collections::HashMap;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, TryRecvError};

use anyhow::Context;
use batch_scheduler::RequestId;
use clap::Args;
use engine::{Engine, RequestError, RequestOutput, Runner};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::args::EngineArgs;
use crate::openai::{ApiError, Call, Dialect, ModelNames, now, response};
use files::{InputLine, Output, open_input, read_ahead};
use line::Line;

/// Answers a file of requests. Every line of the input gets a line in the output, in the order
/// in which they finish; a bad line gets an error and the rest go on. Exit code: 0 when every
/// line was answered (errors included), 1 when the run could not start or go on, 2 for wrong
/// arguments.
#[derive(Args, Debug)]
pub struct RunBatchArgs {
    /// Input, one JSON object a line; - for standard input.
    #[arg(short, long)]
    pub input_file: String,
    /// Output, one JSON object a line; - for standard output.
    #[arg(short, long)]
    pub output_file: String,
    #[command(flatten)]
    pub engine: EngineArgs,
}

/// Runs the command.
pub fn run(args: &RunBatchArgs) -> anyhow::Result<()> {
    let input = open_input(&args.input_file)?;
    let output = Output::open(&args.output_file, &args.input_file)?;
    let (mut engine, names) = args.engine.load()?;
    let bar = ProgressBar::new_spinner().with_style(
        ProgressStyle::with_template("{spinner} {pos} answered · {per_sec} · {elapsed} · {msg}")
            .expect("a constant template"),
    );
    let output = output
        .start()
        .with_context(|| format!("cannot write {}", args.output_file))?;
    let totals = Batch {
        engine: &mut engine,
        names: &names,
        output,
        output_name: &args.output_file,
        open: HashMap::new(),
        calls: HashMap::new(),
        counts: Counts::default(),
        bar: &bar,
    }
    .run(&read_ahead(input), &args.input_file)?;
    bar.finish_and_clear();
    eprintln!(
        "{} answered, {} of them with an error",
        totals.lines, totals.errors
    );
    Ok(())
}

#[derive(Clone, Copy, Default)]
struct Counts {
    lines: u64,
    errors: u64,
}

/// A line whose prompts are in the engine.
struct OpenLine {
    custom_id: Value,
    call: Call,
    outputs: Vec<Option<RequestOutput>>,
}

struct Batch<'a, R: Runner> {
    engine: &'a mut Engine<R>,
    names: &'a ModelNames,
    output: Box<dyn Write>,
    output_name: &'a str,
    /// Lines by number.
    open: HashMap<u64, OpenLine>,
    /// The line and the prompt in it that a request of the engine belongs to.
    calls: HashMap<RequestId, (u64, usize)>,
    counts: Counts,
    bar: &'a ProgressBar,
}

impl<R: Runner> Batch<'_, R> {
    fn run(
        mut self,
        input: &Receiver<io::Result<InputLine>>,
        input_name: &str,
    ) -> anyhow::Result<Counts> {
        // Enough lines ahead that the scheduler never runs dry, without holding the whole file.
        let ahead = 2 * self.engine.frontend().limits().max_num_seqs;
        let mut more = true;
        while more || self.engine.has_work() {
            while more && self.calls.len() < ahead {
                // Waits for a line only if there is nothing else to do.
                let line = match self.engine.has_work() {
                    true => input.try_recv(),
                    false => input.recv().map_err(|_| TryRecvError::Disconnected),
                };
                match line {
                    Ok(line) => {
                        self.take_line(&line.with_context(|| format!("cannot read {input_name}"))?)?
                    }
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => more = false,
                }
            }
            if self.engine.has_work() {
                for (id, result) in self.engine.step().finished {
                    self.take_result(id, result)?;
                }
                let running = self.engine.stats().running;
                self.bar.set_message(format!("{running} running"));
            }
        }
        Ok(self.counts)
    }

    /// Puts a line's prompts into the engine, or answers it with an error.
    fn take_line(&mut self, line: &InputLine) -> anyhow::Result<()> {
        let number = line.number;
        let Line { custom_id, request } = Line::parse(line);
        let call = request.and_then(|(endpoint, body)| {
            Call::parse(
                endpoint,
                body,
                self.engine.frontend(),
                self.names,
                Dialect::Batch,
            )
        });
        let call = match call {
            Ok(call) => call,
            Err(error) => return self.write_error(number, &custom_id, &error),
        };
        let mut ids = Vec::new();
        for (at, request) in call.requests(&number.to_string()).into_iter().enumerate() {
            match self.engine.add_request(request) {
                Ok(id) => {
                    self.calls.insert(id, (number, at));
                    ids.push(id);
                }
                Err(error) => {
                    self.drop_requests(&ids);
                    return self.write_error(number, &custom_id, &api_error(error)?);
                }
            }
        }
        let outputs = vec![None; ids.len()];
        self.open.insert(
            number,
            OpenLine {
                custom_id,
                call,
                outputs,
            },
        );
        Ok(())
    }

    fn take_result(
        &mut self,
        id: RequestId,
        result: Result<RequestOutput, RequestError>,
    ) -> anyhow::Result<()> {
        let Some((number, at)) = self.calls.remove(&id) else {
            return Ok(()); // its line was answered with an error already
        };
        match result {
            Ok(output) => {
                let Some(line) = self.open.get_mut(&number) else {
                    return Ok(());
                };
                line.outputs[at] = Some(output);
                if line.outputs.iter().any(Option::is_none) {
                    return Ok(());
                }
                let line = self.open.remove(&number).expect("found above");
                let outputs: Vec<RequestOutput> = line.outputs.into_iter().flatten().collect();
                let id = request_id(number, Some(&line.call));
                let body = response(&line.call, &id, now(), &outputs, self.engine.frontend());
                self.write(number, &line.custom_id, &id, 200, body, Value::Null)
            }
            Err(error) => {
                let others: Vec<RequestId> = self
                    .calls
                    .iter()
                    .filter(|(_, c)| c.0 == number)
                    .map(|(id, _)| *id)
                    .collect();
                self.drop_requests(&others);
                match self.open.remove(&number) {
                    Some(line) => self.write_error(number, &line.custom_id, &api_error(error)?),
                    None => Ok(()),
                }
            }
        }
    }

    fn drop_requests(&mut self, ids: &[RequestId]) {
        for id in ids {
            self.calls.remove(id);
            self.engine.abort(*id);
        }
    }

    fn write_error(&mut self, number: u64, custom_id: &Value, e: &ApiError) -> anyhow::Result<()> {
        self.counts.errors += 1;
        let id = request_id(number, None);
        self.write(
            number,
            custom_id,
            &id,
            e.status,
            json!({"error": e.body()}),
            e.body(),
        )
    }

    fn write(
        &mut self,
        number: u64,
        custom_id: &Value,
        request_id: &str,
        status: u16,
        body: Value,
        error: Value,
    ) -> anyhow::Result<()> {
        let line = json!({
            "id": format!("batch_req_{number}"),
            "custom_id": custom_id,
            "response": {"status_code": status, "request_id": request_id, "body": body},
            "error": error,
        });
        // In one piece, and at once: what is done survives whatever happens next.
        self.output
            .write_all(format!("{line}\n").as_bytes())
            .and_then(|()| self.output.flush())
            .with_context(|| format!("cannot write {}", self.output_name))?;
        self.counts.lines += 1;
        self.bar.inc(1);
        Ok(())
    }
}

fn request_id(number: u64, call: Option<&Call>) -> String {
    match call.and_then(|c| c.request_id.clone()) {
        Some(id) => id,
        None => format!("batch-{number}"),
    }
}

/// What the client is told. A dead engine ends the run.
fn api_error(error: RequestError) -> anyhow::Result<ApiError> {
    match &error {
        RequestError::EngineDead(_) => Err(error.into()),
        _ => Ok(error.into()),
    }
}
