//! Flags of vLLM (0.23) that are not flags here. Those that ask for what is so anyway are passed
//! over; every other is refused by name, with what to do instead.

mod table;

use std::ffi::OsString;

use anyhow::bail;
use clap::{ArgAction, CommandFactory};

use table::{Row, SWITCHES, find};

/// Short names that vLLM has and clap cannot.
const SHORT: &[(&str, &str)] = &[
    ("-tp", "--tensor-parallel-size"),
    ("-pp", "--pipeline-parallel-size"),
    ("-q", "--quantization"),
    ("-n", "--nnodes"),
    ("-r", "--node-rank"),
    ("-dp", "--data-parallel-size"),
    ("-ep", "--enable-expert-parallel"),
    ("-dcp", "--decode-context-parallel-size"),
    ("-pcp", "--prefill-context-parallel-size"),
    ("-sc", "--speculative-config"),
    ("-cc", "--compilation-config"),
    ("-ac", "--attention-config"),
];

/// `args` as clap takes them: underscores in a flag's name are hyphens, as in vLLM, and vLLM's short
/// names are long.
pub fn spell(args: Vec<OsString>) -> Vec<OsString> {
    let mut open = true;
    let spelled = args.into_iter().map(|arg| {
        open &= arg != "--";
        match arg.to_str().filter(|_| open).and_then(spelled) {
            Some(spelled) => spelled.into(),
            None => arg,
        }
    });
    spelled.collect()
}

fn spelled(arg: &str) -> Option<String> {
    let (name, rest) = arg.split_at(arg.find(['=', '.']).unwrap_or(arg.len()));
    if name.starts_with("--") {
        return Some(name.replace('_', "-") + rest);
    }
    if let Some(level) = arg.strip_prefix("-O") {
        return Some(format!("--optimization-level={level}"));
    }
    let (_, long) = SHORT.iter().find(|(short, _)| *short == name)?;
    Some(format!("{long}{rest}"))
}

/// `args`, spelled, without vLLM's flags that ask for what is so anyway. An error for those that ask
/// for something else. Of an `--X` and a `--no-X` the last one counts.
pub fn settle(args: Vec<OsString>) -> anyhow::Result<Vec<OsString>> {
    let cli = crate::Cli::command();
    let mut rest = Vec::with_capacity(args.len());
    let mut refused = Vec::new();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let text = arg.to_string_lossy().into_owned();
        let name = name_of(&text);
        let mut off = None;
        if text == "--" {
            rest.push(arg);
            break;
        } else if let Some(row) = find(name) {
            let value = match text.split_once('=') {
                Some((_, value)) => value.to_owned(),
                None if row.fine.is_empty() || row.fine.contains(&"") => String::new(),
                None => args.next().unwrap_or_default().to_string_lossy().into(),
            };
            refused.retain(|(flag, _)| flag != name);
            if !row.fine.contains(&value.as_str()) {
                refused.push((name.to_owned(), refusal(name, row)));
            }
            off = (name == "--disable-log-requests").then(|| "--enable-log-requests".to_owned());
        } else if ours(&cli, name).is_some() {
            rest.push(arg);
        } else {
            let no = text.strip_prefix("--no-").map(|x| format!("--{x}"));
            off = no.filter(|flag| is_switch(&cli, flag));
            if off.is_none() {
                rest.push(arg);
            }
        }
        if let Some(off) = off {
            rest.retain(|arg| name_of(&arg.to_string_lossy()) != off);
            refused.retain(|(flag, _)| *flag != off);
            if let Some(row) = find(&off).filter(|row| row.fine.contains(&"")) {
                // Not to have what is always there.
                refused.push((off, refusal(name, row)));
            }
        }
    }
    if let Some((_, message)) = refused.into_iter().next() {
        bail!(message);
    }
    rest.extend(args);
    Ok(rest)
}

/// What all spellings of a flag have in common: `--X`, `--X=value`, `--X.key=value`, `--no-X` and other
/// names of X that there are here.
pub fn subject(arg: &str) -> String {
    let name = name_of(arg);
    let name = match name.strip_prefix("--no-") {
        Some(x) => format!("--{x}"),
        None => name.to_owned(),
    };
    let long = ours(&crate::Cli::command(), &name).and_then(|arg| Some(arg.get_long()?.to_owned()));
    long.map_or(name, |long| format!("--{long}"))
}

fn name_of(arg: &str) -> &str {
    arg.split(['=', '.']).next().unwrap_or_default()
}

/// The flag of any command here that has this name, or this among others.
fn ours<'a>(command: &'a clap::Command, flag: &str) -> Option<&'a clap::Arg> {
    let long = flag.strip_prefix("--")?;
    let also = |arg: &clap::Arg| arg.get_all_aliases().is_some_and(|all| all.contains(&long));
    let mut own = command.get_arguments();
    own.find(|arg| arg.get_long() == Some(long) || also(arg))
        .or_else(|| command.get_subcommands().find_map(|sub| ours(sub, flag)))
}

/// Whether it is a flag, here or of the table, that takes no value.
fn is_switch(cli: &clap::Command, flag: &str) -> bool {
    match (find(flag), ours(cli, flag)) {
        (Some(row), _) => {
            row.fine.contains(&"") || flag.starts_with("--enable-") || SWITCHES.contains(&flag)
        }
        (None, Some(arg)) => matches!(arg.get_action(), ArgAction::SetTrue),
        (None, None) => false,
    }
}

fn refusal(name: &str, row: &Row) -> String {
    match row.fine {
        [] | [""] => format!("{name} is a flag of vLLM that is not one here: {}", row.why),
        fine => format!(
            "{name}, a flag of vLLM, can only be {} here: {}",
            fine.join(" or "),
            row.why
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::table::TABLE;
    use super::*;

    fn settled(args: &[&str]) -> anyhow::Result<Vec<OsString>> {
        settle(spell(args.iter().map(OsString::from).collect()))
    }

    #[test]
    fn every_flag_of_the_table_is_refused_by_name_or_asks_for_nothing() {
        let mut seen = std::collections::HashSet::new();
        for row in TABLE {
            for flag in row.flags {
                assert!(seen.insert(flag), "{flag} is there twice");
                let bad = match row.fine {
                    [""] => format!("{flag}=strange"),
                    _ => format!("{flag}=strange-value"),
                };
                for args in [vec!["serve", &bad], vec!["serve", "--port", "1", &bad, "x"]] {
                    let error = settled(&args).unwrap_err().to_string();
                    assert!(error.starts_with(flag), "{error}");
                    assert!(error.ends_with(row.why), "{error}");
                }
                for fine in row.fine {
                    let args = match *fine {
                        "" => vec!["serve", flag, "x"],
                        value => vec!["serve", flag, value, "x"],
                    };
                    assert_eq!(settled(&args).unwrap(), ["serve", "x"], "{flag} {fine}");
                }
            }
        }
    }

    #[test]
    fn no_flag_of_ours_is_in_the_table() {
        fn check(command: &clap::Command) {
            for long in command.get_arguments().filter_map(clap::Arg::get_long) {
                let flag = format!("--{long}");
                assert!(find(&flag).is_none(), "{flag} is in the table");
            }
            command.get_subcommands().for_each(check);
        }
        check(&crate::Cli::command());
    }

    #[test]
    fn names_are_spelled_as_in_vllm() {
        let args = [
            "serve",
            "m",
            "--max_model_len=1_0",
            "-tp",
            "2",
            "-O3",
            "--",
            "--a_b",
        ];
        let spelled = spell(args.map(OsString::from).to_vec());
        assert_eq!(
            spelled,
            [
                "serve",
                "m",
                "--max-model-len=1_0",
                "--tensor-parallel-size",
                "2",
                "--optimization-level=3",
                "--",
                "--a_b"
            ]
        );
        for (args, text) in [
            (&["serve", "-q", "fp8"][..], "--quantization"),
            (&["serve", "--enable_lora"], "--enable-lora"),
            (
                &["serve", "--compilation-config.mode=3"],
                "--compilation-config",
            ),
            (&["serve", "--no-async-scheduling"], "--no-overlap"),
            (&["serve", "--kv-cache-dtype", "fp8"], "can only be auto"),
        ] {
            let error = settled(args).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
        assert_eq!(
            settled(&["x", "--", "--uds"]).unwrap(),
            ["x", "--", "--uds"]
        );
    }

    #[test]
    fn no_takes_back_what_came_before() {
        let check = |args: &str, left: &str| {
            let args: Vec<&str> = args.split(' ').collect();
            assert_eq!(settled(&args).unwrap().join(" ".as_ref()), left, "{args:?}");
        };
        check(
            "serve --no-enable-lora --no-trust-remote-code --seed 1",
            "serve --seed 1",
        );
        check(
            "serve --enforce-eager --seed 1 --no-enforce_eager",
            "serve --seed 1",
        );
        check(
            "serve --no-enforce-eager --enforce-eager",
            "serve --enforce-eager",
        );
        check(
            "serve --enable-log-requests --disable-log-requests",
            "serve",
        );
        check("serve --no-overlap --no-no-overlap", "serve");
        // Both are flags here, and clap lets the last one win.
        let both = "serve --enable-prefix-caching --no-enable-prefix-caching";
        check(both, both);
        // There is no such form of a flag with a value: clap says so.
        for unknown in [
            "--no-tokenizer",
            "--no-port",
            "--no-such-flag",
            "--no-enable-lora=1",
        ] {
            check(&format!("serve {unknown}"), &format!("serve {unknown}"));
        }
        let error = settled(&["serve", "--no-scheduler-reserve-full-isl"]).unwrap_err();
        assert!(error.to_string().contains("blocks for all"), "{error}");
    }

    #[test]
    fn the_last_of_a_pair_counts_for_every_flag_of_the_table() {
        let cli = crate::Cli::command();
        let flags = TABLE.iter().flat_map(|row| row.flags);
        let mut seen = 0;
        for flag in flags.filter(|flag| is_switch(&cli, flag)) {
            let on = flag.to_string();
            let off = flag.replacen("--", "--no-", 1);
            for (first, last) in [(&on, &off), (&off, &on)] {
                let last_alone = settled(&["serve", last, "x"]).map_err(|e| e.to_string());
                let both = settled(&["serve", first, "x", last]).map_err(|e| e.to_string());
                assert_eq!(both, last_alone, "{first} {last}");
                let thrice = settled(&["serve", last, first, last, "x"]);
                assert_eq!(thrice.map_err(|e| e.to_string()), last_alone, "{last}");
            }
            let both = [&on, &off].map(|flag| settled(&["serve", flag]).is_ok());
            assert_ne!(both[0], both[1], "{flag}: one form asks for what is so");
            seen += 1;
        }
        assert!(seen > SWITCHES.len(), "{seen}");
        // So do values, and the first of several refused ones is named.
        let line = ["serve", "--quantization", "fp8", "--quantization", "none"];
        assert_eq!(settled(&line).unwrap(), ["serve"]);
        let line = [
            "serve",
            "--grpc",
            "--enable-lora",
            "--headless",
            "--no-grpc",
        ];
        let error = settled(&line).unwrap_err().to_string();
        assert!(error.starts_with("--enable-lora "), "{error}");
    }

    #[test]
    fn all_spellings_of_a_flag_have_one_subject() {
        for (spelling, flag) in [
            ("--tp=2", "--tensor-parallel-size"),
            ("--distributed-timeout-seconds", "--distributed-timeout"),
            ("--no-enforce-eager", "--enforce-eager"),
            ("--compilation-config.mode=3", "--compilation-config"),
            ("value", "value"),
        ] {
            assert_eq!(subject(spelling), flag);
        }
    }
}
