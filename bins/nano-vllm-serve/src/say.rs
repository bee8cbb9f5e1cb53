//! Printing that reports what `println!` panics on: a reader that went away, a full disk.

use std::fmt::Display;
use std::io::{Write, stdout};

use anyhow::Context;

/// Prints a line to standard output.
pub fn say(line: impl Display) -> anyhow::Result<()> {
    writeln!(stdout().lock(), "{line}").context("cannot write to standard output")
}
