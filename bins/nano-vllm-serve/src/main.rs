//! nano-vllm-serve: vLLM-style inference on the command line. What it does is in the `engine`
//! crate; here are arguments, files and what is printed.

mod args;
mod bench;
mod demo;
mod load;
mod openai;
mod ranks;
mod run_batch;
mod say;
mod serve;
mod sizes;
mod vllm_flags;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue};
use clap::{Parser, Subcommand};
use serve::config_file::ConfigFile;
use tracing_subscriber::EnvFilter;

#[derive(Parser, Debug)]
// Of a flag that is there twice the last one counts, as in vLLM.
#[command(version, about, propagate_version = true, args_override_self = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Serve(Box<serve::ServeArgs>),
    Demo(demo::DemoArgs),
    RunBatch(run_batch::RunBatchArgs),
    /// Measure the engine.
    #[command(subcommand)]
    Bench(bench::BenchCommand),
}

fn main() -> ExitCode {
    let mut cli = match parse(std::env::args_os().collect()) {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    log(&cli.command);
    let failed = |error: &anyhow::Error| {
        eprintln!("nano-vllm-serve: {}", one_line(error));
        ExitCode::FAILURE
    };
    if let Some(engine) = cli.command.engine()
        && let Err(error) = ranks::join(engine)
    {
        return failed(&error);
    }
    if !cli.command.is_for_all_ranks()
        && let Some(result) = cli
            .command
            .engine()
            .and_then(|engine| ranks::follow(engine))
    {
        return result.unwrap_or_else(|error| failed(&error));
    }
    let mut result = match &cli.command {
        Command::Serve(args) => serve::run(args),
        Command::Demo(args) => demo::run(args),
        Command::RunBatch(args) => run_batch::run(args),
        Command::Bench(command) => bench::run(command),
    };
    if let Some(engine) = cli.command.engine() {
        result = ranks::finish(engine, result);
    }
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

/// The command line with the flags of `--config`. What is wrong is said here, and if it stands in that file, this too.
fn parse(line: Vec<OsString>) -> Result<Cli, ExitCode> {
    let line = vllm_flags::spell(line);
    let say = |error: &anyhow::Error| eprintln!("nano-vllm-serve: {}", one_line(error));
    let usage = ExitCode::from(2);
    let file = ConfigFile::of(&line).map_err(|error| {
        say(&error);
        usage
    })?;
    let say_place = |flag: &str| {
        if let Some(place) = file.as_ref().and_then(|file| file.place(flag)) {
            eprintln!("nano-vllm-serve: {place}");
        }
    };
    let line = match &file {
        Some(file) => file.expand(&line),
        None => line,
    };
    let line = vllm_flags::settle(line).map_err(|error| {
        say(&error);
        say_place(&error.to_string());
        usage
    })?;
    Cli::try_parse_from(line).map_err(|error| {
        // Help is an error, too, and goes to standard output.
        let _ = error.print();
        if let Some(ContextValue::String(flag)) = error.get(ContextKind::InvalidArg) {
            say_place(flag);
        }
        ExitCode::from(error.exit_code() as u8)
    })
}

impl Command {
    /// The engine that it runs, if it runs one.
    fn engine(&mut self) -> Option<&mut args::EngineArgs> {
        match self {
            Command::Serve(args) => {
                // Followers must know it, too.
                if let Some(model) = args.model_tag.take() {
                    args.engine.model.get_or_insert(model);
                }
                Some(&mut args.engine)
            }
            Command::Demo(args) => Some(&mut args.engine),
            Command::RunBatch(args) => Some(&mut args.engine),
            Command::Bench(command) => command.engine(),
        }
    }

    /// Whether processes other than rank 0 run the command, too, instead of following.
    fn is_for_all_ranks(&self) -> bool {
        matches!(self, Command::Bench(bench::BenchCommand::Collective(_)))
    }
}

/// Logs to standard error. A log that cannot be written, on a full disk for instance, is no reason
/// to stop.
fn log(command: &Command) {
    let (default, json) = match command {
        Command::Serve(args) => ("info", args.server.log_format == serve::LogFormat::Json),
        _ => ("warn", false),
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    match json {
        true => logs.json().flatten_event(true).init(),
        false => logs.init(),
    }
}

/// The error and its causes, less those that the text before them tells already.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if line.is_empty() {
            line = cause;
        } else if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line
}
