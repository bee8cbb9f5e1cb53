//! `--config`: flags from a YAML file, as if they stood on the command line before the others.

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context, bail};
use serde_yaml_ng::Value;

/// `args` with the flags of the file that `--config` names, if it names one. A flag that is on the
/// command line too is left out of the file's.
pub fn expand(args: Vec<OsString>) -> anyhow::Result<Vec<OsString>> {
    let text: Vec<String> = args
        .iter()
        .map(|a| a.to_string_lossy().into_owned())
        .collect();
    // `serve` only: the other commands have no such flag.
    if text.get(1).map(String::as_str) != Some("serve") {
        return Ok(args);
    }
    let file = text.iter().enumerate().find_map(|(at, arg)| {
        arg.strip_prefix("--config=")
            .map(str::to_owned)
            .or_else(|| (arg == "--config").then(|| text.get(at + 1).cloned())?)
    });
    let Some(file) = file else {
        return Ok(args);
    };
    let source = std::fs::read_to_string(Path::new(&file))
        .with_context(|| format!("cannot read --config {file}"))?;
    let flags = flags(&source, &text).with_context(|| format!("--config {file}"))?;
    let mut all: Vec<OsString> = args[..2].to_vec();
    all.extend(flags.into_iter().map(OsString::from));
    all.extend(args[2..].iter().cloned());
    Ok(all)
}

fn flags(source: &str, command_line: &[String]) -> anyhow::Result<Vec<String>> {
    let mapping = match serde_yaml_ng::from_str(source).context("is not YAML")? {
        Value::Null => return Ok(Vec::new()),
        Value::Mapping(mapping) => mapping,
        _ => bail!("must hold `flag: value` lines"),
    };
    let mut flags = Vec::new();
    for (key, value) in mapping {
        let Value::String(key) = key else {
            bail!("{key:?} is not the name of a flag");
        };
        let flag = format!("--{}", key.replace('_', "-"));
        if flag == "--config" {
            bail!("a file cannot name another");
        }
        let given = |arg: &String| *arg == flag || arg.starts_with(&format!("{flag}="));
        if command_line.iter().any(given) {
            continue;
        }
        match value {
            Value::Bool(true) => flags.push(flag),
            Value::Bool(false) | Value::Null => {}
            Value::Sequence(items) => {
                for item in items {
                    flags.push(format!("{flag}={}", scalar(&key, &item)?));
                }
            }
            other => flags.push(format!("{flag}={}", scalar(&key, &other)?)),
        }
    }
    Ok(flags)
}

fn scalar(key: &str, value: &Value) -> anyhow::Result<String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        Value::Bool(flag) => Ok(flag.to_string()),
        _ => bail!("{key} must be a text, a number, true or false, or a list of these"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_wins() {
        let line = ["x", "serve", "--port", "1", "--config", "f"].map(String::from);
        let source = "port: 2\nmax_num_seqs: 4\nenable-log-requests: true\nnothing: false\n\
                      api-key: [a, b]\n";
        let expected = [
            "--max-num-seqs=4",
            "--enable-log-requests",
            "--api-key=a",
            "--api-key=b",
        ];
        assert_eq!(flags(source, &line).unwrap(), expected);
        assert!(flags("", &line).unwrap().is_empty());
        for bad in ["[1]", "a: {b: 1}", "config: x", "1: 2", "a: [[1]]", ": :"] {
            assert!(flags(bad, &line).is_err(), "{bad}");
        }
    }
}
