//! The built program, run as a user runs it: files in, files out, exit codes, what is printed.

mod bad_lines;
mod bad_lines_cases;
mod common;
mod demo_and_bench;
mod files;
mod good_lines;
mod good_lines_checks;
mod ranks;
mod stages;
mod start_up;
