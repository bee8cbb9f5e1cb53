//! nano-vllm-serve: vLLM-style inference on the command line. What it does is in the `engine`
//! crate; here are arguments, files and what is printed.

mod args;
mod bench;
mod demo;
mod load;
mod openai;
mod run_batch;
mod say;
mod sizes;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

#[derive(Parser, Debug)]
#[command(version, about, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Demo(demo::DemoArgs),
    RunBatch(run_batch::RunBatchArgs),
    /// Measure the engine.
    #[command(subcommand)]
    Bench(bench::BenchCommand),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn")),
        )
        .with_writer(std::io::stderr)
        .init();
    let result = match &cli.command {
        Command::Demo(args) => demo::run(args),
        Command::RunBatch(args) => run_batch::run(args),
        Command::Bench(command) => bench::run(command),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nano-vllm-serve: {}", one_line(&error));
            ExitCode::FAILURE
        }
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
