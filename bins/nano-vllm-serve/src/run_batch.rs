//! `run-batch`: requests from a file in OpenAI's batch format, answers to another.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use batch_scheduler::RequestId;
use clap::Args;
use engine::{Engine, RequestError, RequestOutput, Runner};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::args::EngineArgs;
use crate::openai::{ApiError, Call, Endpoint, ModelNames, response};

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
    // Both files are opened first: loading a model to find the output unwritable wastes minutes.
    let input: Box<dyn BufRead> = match args.input_file.as_str() {
        "-" => Box::new(io::stdin().lock()),
        path => Box::new(BufReader::new(
            File::open(path).with_context(|| format!("cannot read {path}"))?,
        )),
    };
    let output: Box<dyn Write> = match args.output_file.as_str() {
        "-" => Box::new(io::stdout().lock()),
        path => Box::new(File::create(path).with_context(|| format!("cannot write {path}"))?),
    };
    let (mut engine, names) = args.engine.load()?;
    let bar = ProgressBar::new_spinner().with_style(
        ProgressStyle::with_template("{spinner} {pos} answered · {per_sec} · {elapsed} · {msg}")
            .expect("a constant template"),
    );
    let totals = Batch {
        engine: &mut engine,
        names: &names,
        output: BufWriter::new(output),
        output_name: &args.output_file,
        open: HashMap::new(),
        calls: HashMap::new(),
        counts: Counts::default(),
        bar: &bar,
    }
    .run(input, &args.input_file)?;
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
    output: BufWriter<Box<dyn Write>>,
    output_name: &'a str,
    /// Lines by number.
    open: HashMap<u64, OpenLine>,
    /// The line and the prompt in it that a request of the engine belongs to.
    calls: HashMap<RequestId, (u64, usize)>,
    counts: Counts,
    bar: &'a ProgressBar,
}

impl<R: Runner> Batch<'_, R> {
    fn run(mut self, mut input: Box<dyn BufRead>, input_name: &str) -> anyhow::Result<Counts> {
        // Enough lines ahead that the scheduler never runs dry, without holding the whole file.
        let ahead = 2 * self.engine.frontend().limits().max_num_seqs;
        let mut line = Vec::new();
        let mut number = 0;
        let mut more = true;
        while more || self.engine.has_work() {
            while more && self.calls.len() < ahead {
                line.clear();
                more = input
                    .read_until(b'\n', &mut line)
                    .with_context(|| format!("cannot read {input_name}"))?
                    > 0;
                if !line.trim_ascii().is_empty() {
                    number += 1;
                    self.take_line(number, &line)?;
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
        self.output
            .flush()
            .with_context(|| format!("cannot write {}", self.output_name))?;
        Ok(self.counts)
    }

    /// Puts a line's prompts into the engine, or answers it with an error.
    fn take_line(&mut self, number: u64, line: &[u8]) -> anyhow::Result<()> {
        let (custom_id, call) = self.parse(line);
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

    /// The line's `custom_id`, as far as it can be read, and its call.
    fn parse(&self, line: &[u8]) -> (Value, Result<Call, ApiError>) {
        let mut custom_id = Value::Null;
        let call = (|| {
            let text = std::str::from_utf8(line)
                .map_err(|e| ApiError::malformed(format!("the line is not UTF-8: {e}")))?;
            let mut line: Value = serde_json::from_str(text)
                .map_err(|e| ApiError::malformed(format!("the line is not JSON: {e}")))?;
            custom_id = line["custom_id"].take();
            match line["method"].as_str() {
                None | Some("POST") => {}
                Some(other) => {
                    return Err(ApiError::bad_value(
                        "method",
                        format!("method must be POST, got {other}"),
                    ));
                }
            }
            let url = line["url"].as_str().ok_or_else(|| {
                ApiError::bad_value(
                    "url",
                    "url is missing: /v1/completions or /v1/chat/completions",
                )
            })?;
            let endpoint = Endpoint::from_path(url)?;
            Call::parse(
                endpoint,
                line["body"].take(),
                self.engine.frontend(),
                self.names,
            )
        })();
        (custom_id, call)
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
        // Flushed line by line: what is done survives whatever happens next.
        writeln!(self.output, "{line}")
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
        e if !e.is_client_error() => Ok(ApiError::internal(e.to_string())),
        e => Ok(ApiError {
            param: e.param().map(str::to_owned),
            ..ApiError::bad_value("", e.to_string())
        }),
    }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}
