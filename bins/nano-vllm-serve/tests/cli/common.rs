//! Runs the program and reads what it wrote.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};

/// Flags for a small engine that starts fast. One thread: tests run side by side, and threads
/// that wait for each other take the cores from them.
pub const SMALL: [&str; 11] = [
    "--cpu",
    "--threads",
    "1",
    "--dtype",
    "float32",
    "--max-model-len",
    "1024",
    "--num-gpu-blocks-override",
    "300",
    "--max-num-seqs",
    "16",
];

/// The program, with an environment that is the same everywhere.
pub fn program(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nano-vllm-serve"));
    command
        .args(args)
        .env("HF_HUB_OFFLINE", "1")
        .env("RUST_BACKTRACE", "1")
        .env_remove("RUST_LOG")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// What a run left behind.
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// The error of a run that must fail with this exit code: without a panic, and in one line
    /// unless it is about usage.
    pub fn error(&self, code: i32) -> &str {
        assert_eq!(self.code, Some(code), "{}", self.stderr);
        for word in ["panicked", "backtrace", "RUST_"] {
            assert!(!self.stderr.contains(word), "{}", self.stderr);
        }
        if code == 1 {
            assert_eq!(self.stderr.lines().count(), 1, "{}", self.stderr);
            assert!(self.stderr.starts_with("nano-vllm-serve: "));
        }
        &self.stderr
    }
}

/// Runs the program to its end with `stdin` as its input.
pub fn run(args: &[&str], stdin: &[u8]) -> Ran {
    let mut child = program(args).spawn().unwrap();
    let mut pipe = child.stdin.take().unwrap();
    let input = stdin.to_vec();
    // A program that fails early does not read its input: no error of this thread.
    let writer = std::thread::spawn(move || pipe.write_all(&input).is_ok());
    let output = child.wait_with_output().unwrap();
    let _ = writer.join().unwrap();
    Ran {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// The answers of a run of `run-batch` that must end with exit code 0, by `custom_id`.
pub struct Answers(HashMap<String, Value>);

impl Answers {
    /// Reads the output file's text; every line must have the documented form.
    pub fn read(text: &str) -> Self {
        assert!(text.is_empty() || text.ends_with('\n'));
        let mut answers = HashMap::new();
        for line in text.lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            let keys: Vec<&String> = line.as_object().unwrap().keys().collect();
            assert_eq!(keys.len(), 4, "{line}");
            let ok = line["response"]["status_code"] == 200;
            assert_eq!(line["error"].is_null(), ok, "{line}");
            if !ok {
                assert_eq!(line["error"], line["response"]["body"]["error"]);
                assert_eq!(line["error"]["code"], line["response"]["status_code"]);
            }
            let key = match &line["custom_id"] {
                Value::String(id) => id.clone(),
                Value::Null => line["id"].as_str().unwrap().to_owned(),
                other => other.to_string(),
            };
            let twice = answers.insert(key, line);
            assert!(twice.is_none(), "two answers for one line");
        }
        Self(answers)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The names of all lines.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// The body of a line that must have been answered.
    pub fn body(&self, id: &str) -> &Value {
        let line = self.0.get(id).unwrap_or_else(|| panic!("no answer {id}"));
        assert!(line["error"].is_null(), "{id}: {}", line["error"]);
        &line["response"]["body"]
    }

    /// The first choice of a line that must have been answered.
    pub fn choice(&self, id: &str) -> &Value {
        &self.body(id)["choices"][0]
    }

    /// The token ids of the first choice.
    pub fn tokens(&self, id: &str) -> Vec<u32> {
        ids(&self.choice(id)["token_ids"])
    }

    /// The text of the first choice of a completion.
    pub fn text(&self, id: &str) -> &str {
        self.choice(id)["text"].as_str().unwrap()
    }

    /// The error of a line that must have been refused.
    pub fn error(&self, id: &str) -> &Value {
        let line = self.0.get(id).unwrap_or_else(|| panic!("no answer {id}"));
        assert!(!line["error"].is_null(), "{id} was not refused: {line}");
        &line["error"]
    }
}

/// Runs `run-batch` over standard input and output.
pub fn batch(flags: &[&str], input: &[u8]) -> Answers {
    let args = [&["run-batch", "-i", "-", "-o", "-"], flags].concat();
    let ran = run(&args, input);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let answers = Answers::read(&ran.stdout);
    let said = format!("{} answered, ", answers.len());
    assert!(ran.stderr.starts_with(&said), "{}", ran.stderr);
    answers
}

/// A line of input for `/v1/completions`.
pub fn completion(id: &str, body: Value) -> String {
    line(id, "/v1/completions", body)
}

/// A line of input for `/v1/chat/completions`.
pub fn chat(id: &str, body: Value) -> String {
    line(id, "/v1/chat/completions", body)
}

fn line(id: &str, url: &str, body: Value) -> String {
    format!(
        "{}\n",
        json!({"custom_id": id, "method": "POST", "url": url, "body": body})
    )
}

/// A JSON list of token ids.
pub fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// A case of the demo model's golden data: prompt and greedy continuation by `transformers`.
pub struct Golden {
    pub text: String,
    pub prompt: Vec<u32>,
    pub greedy: Vec<u32>,
}

/// The golden case with this name.
pub fn golden(name: &str) -> Golden {
    let path = fixture("demo").join("golden.json");
    let data: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let cases = data["cases"].as_array().unwrap();
    let case = cases.iter().find(|case| case["name"] == name).unwrap();
    Golden {
        text: case["text"].as_str().unwrap().to_owned(),
        prompt: ids(&case["prompt"]),
        greedy: ids(&case["greedy"]),
    }
}

/// The folder of a checkpoint that the model's own tests use.
pub fn fixture(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../crates/tp-model/tests/fixtures");
    root.join(name)
}

/// A new folder, removed when dropped.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("cli-{}-{count}", std::process::id());
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// The path of a file in it.
    pub fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }

    /// A file in it, written, and its path.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
