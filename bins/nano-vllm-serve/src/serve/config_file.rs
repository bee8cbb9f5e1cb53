//! `--config`: flags from a YAML file, as if they stood on the command line before the others.

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context, bail};
use clap::CommandFactory;
use serde_yaml_ng::Value;

use crate::vllm_flags::{settle, subject};

/// What the file that `--config` names adds to the command line.
#[derive(Debug)]
pub struct ConfigFile {
    path: String,
    flags: Vec<String>,
}

impl ConfigFile {
    /// The file that `args` name, if they name one. A flag that is among them too is left out of the
    /// file's.
    pub fn of(args: &[OsString]) -> anyhow::Result<Option<Self>> {
        let text: Vec<String> = args
            .iter()
            .map(|a| a.to_string_lossy().into_owned())
            .collect();
        // `serve` only: the other commands have no such flag.
        if text.get(1).map(String::as_str) != Some("serve") {
            return Ok(None);
        }
        let path = text.iter().enumerate().find_map(|(at, arg)| {
            arg.strip_prefix("--config=")
                .map(str::to_owned)
                .or_else(|| (arg == "--config").then(|| text.get(at + 1).cloned())?)
        });
        let Some(path) = path else {
            return Ok(None);
        };
        let source = std::fs::read_to_string(Path::new(&path))
            .with_context(|| format!("cannot read --config {path}"))?;
        let mut given: Vec<String> = text.iter().map(|arg| subject(arg)).collect();
        if has_model(args) {
            given.push(MODEL.to_owned());
        }
        let flags = flags(&source, &given).with_context(|| format!("--config {path}"))?;
        Ok(Some(Self { path, flags }))
    }

    /// `args` with the file's flags before their own.
    pub fn expand(&self, args: &[OsString]) -> Vec<OsString> {
        let (command, own) = args.split_at(2);
        let flags = self.flags.iter().map(OsString::from);
        let command = command.iter().cloned();
        command.chain(flags).chain(own.iter().cloned()).collect()
    }

    /// Where the flag that `text` begins with stands, if it is the file's.
    pub fn place(&self, text: &str) -> Option<String> {
        fn name(text: &str) -> &str {
            let end = text.find(|c: char| !c.is_alphanumeric() && c != '-');
            &text[..end.unwrap_or(text.len())]
        }
        let known = self.flags.iter().any(|flag| name(flag) == name(text));
        known.then(|| format!("{} stands in --config {}", name(text), self.path))
    }
}

const MODEL: &str = "--model";

/// Whether the command line names a model without a flag, which clap alone can tell from a flag's
/// value. What is wrong with the line is said once the file's flags are in it.
fn has_model(args: &[OsString]) -> bool {
    let Ok(args) = settle(args.to_vec()) else {
        return false;
    };
    let cli = crate::Cli::command().ignore_errors(true);
    let line = cli.try_get_matches_from(args);
    line.is_ok_and(|line| match line.subcommand_matches("serve") {
        Some(serve) => serve.contains_id("model_tag"),
        None => false,
    })
}

/// The flags of a file, but for those whose [`subject`] is `given`.
fn flags(source: &str, given: &[String]) -> anyhow::Result<Vec<String>> {
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
        if given.contains(&subject(&flag)) {
            continue;
        }
        match value {
            Value::Bool(true) => flags.push(flag),
            // Whether there is such a flag, and whether it does anything, is looked at as if it stood
            // on the command line.
            Value::Bool(false) => flags.push(flag.replacen("--", "--no-", 1)),
            Value::Null => {}
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
        Value::Mapping(_) => {
            serde_json::to_string(value).with_context(|| format!("{key} cannot be written as JSON"))
        }
        _ => bail!("{key} must be a text, a number, true or false, a mapping, or a list of these"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(source: &str, command_line: &str) -> anyhow::Result<Vec<String>> {
        let given: Vec<String> = command_line.split(' ').map(subject).collect();
        flags(source, &given)
    }

    #[test]
    fn a_file_is_flags() {
        let source = "port: 2\nmax_num_seqs: 4\nenable-log-requests: true\nnothing: null\n\
                      api-key: [a, b]\nenable_prefix_caching: false\n\
                      override-generation-config: {temperature: 0.5, top_k: 3}\n";
        let expected = [
            "--max-num-seqs=4",
            "--enable-log-requests",
            "--api-key=a",
            "--api-key=b",
            "--no-enable-prefix-caching",
            r#"--override-generation-config={"temperature":0.5,"top_k":3}"#,
        ];
        let line = "x serve --port 1 --config f";
        assert_eq!(read(source, line).unwrap(), expected);
        assert!(read("", line).unwrap().is_empty());
        for bad in ["[1]", "config: x", "1: 2", "a: [[1]]", ": :"] {
            assert!(read(bad, line).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_command_line_wins_by_whatever_name() {
        for (source, line) in [
            ("tensor-parallel-size: 2", "x serve --tp 1"),
            ("tp: 2", "x serve --tensor-parallel-size=1"),
            (
                "distributed-timeout-seconds: 30",
                "x serve --distributed-timeout 20",
            ),
            ("enforce-eager: true", "x serve --no-enforce-eager"),
            (
                "enable-prefix-caching: false",
                "x serve --enable-prefix-caching",
            ),
            ("no-overlap: false", "x serve --no-overlap"),
        ] {
            assert!(read(source, line).unwrap().is_empty(), "{source}");
        }
    }
    #[test]
    fn a_model_of_the_command_line_wins_over_the_file_s() {
        use clap::Parser;

        let file = std::env::temp_dir().join(format!("nano-vllm-model-{}", std::process::id()));
        std::fs::write(&file, "model: theirs\nrevision: r\nseed: 3\n").unwrap();
        let file = file.to_str().unwrap();
        let parsed = |line: &str| {
            let line = line.replace("FILE", file);
            let line = line.split(' ').map(OsString::from).collect();
            let line = crate::vllm_flags::spell(line);
            let file = ConfigFile::of(&line)?.expect("the line names one");
            match crate::Cli::try_parse_from(settle(file.expand(&line))?)?.command {
                crate::Command::Serve(args) => Ok::<_, anyhow::Error>(args),
                _ => panic!("not serve"),
            }
        };
        for (line, model) in [
            ("x serve --config FILE", "theirs"),
            ("x serve ours --config FILE", "ours"),
            ("x serve --config FILE ours", "ours"),
            ("x serve --model ours --config FILE", "ours"),
            ("x serve --config=FILE --model=ours", "ours"),
            // Values are no models, whether they belong to our flags or to vLLM's.
            ("x serve --host h --config FILE", "theirs"),
            ("x serve --served-model-name a b --config FILE", "theirs"),
            ("x serve --max-log-len 0 --config FILE", "theirs"),
            ("x serve --max-log-len 0 --config FILE -- ours", "ours"),
        ] {
            let args = parsed(line).unwrap_or_else(|error| panic!("{line}: {error}"));
            let (tag, flag) = (args.model_tag, args.engine.model);
            assert!(tag.is_none() || flag.is_none(), "{line}");
            assert_eq!(tag.or(flag).as_deref(), Some(model), "{line}");
            assert_eq!(args.engine.revision.as_deref(), Some("r"), "{line}");
            assert_eq!(args.engine.seed, 3, "{line}");
        }
        // On the command line they are one thing said twice.
        assert!(parsed("x serve ours --model ours --config FILE").is_err());
        std::fs::remove_file(file).unwrap();
    }
}
