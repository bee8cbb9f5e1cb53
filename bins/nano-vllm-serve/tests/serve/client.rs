//! Starts the server and talks to it. Requests are HTTP/1.0, whose answers end with the
//! connection, so that nothing here has to understand chunks.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Flags for a small engine that starts fast. One thread: tests run side by side.
const SMALL: [&str; 11] = [
    "--cpu",
    "--threads",
    "1",
    "--dtype",
    "float32",
    "--max-model-len",
    "1024",
    "--num-gpu-blocks-override",
    "300",
    "--host",
    "127.0.0.1",
];

/// Nothing here takes this long, unless it never ends.
const LONG: Duration = Duration::from_secs(120);

/// The program that [`Server::start`] starts.
pub fn command(flags: &[&str]) -> Command {
    let seqs: &[&str] = match flags.contains(&"--max-num-seqs") {
        true => &[],
        false => &["--max-num-seqs", "16"],
    };
    let port: &[&str] = match flags.contains(&"--port") {
        true => &[],
        false => &["--port", "0"],
    };
    let mut command = Command::new(env!("CARGO_BIN_EXE_nano-vllm-serve"));
    command
        .arg("serve")
        .args(SMALL)
        .args(seqs)
        .args(port)
        .args(flags)
        .env("RUST_BACKTRACE", "1")
        .env("RUST_LOG", "warn")
        .env_remove("VLLM_API_KEY")
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    command
}

/// A server; it ends with this value.
pub struct Server {
    child: Child,
    pub address: SocketAddr,
    /// Fields of every request's head, each with its line's end.
    pub headers: String,
}

impl Server {
    /// Starts the demo model with 16 places, and waits until it serves.
    pub fn start(flags: &[&str]) -> Self {
        Self::begin(command(flags))
    }

    /// Starts what [`command`] made, and waits until it serves.
    pub fn begin(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        let at = line.trim().rsplit("://").next().unwrap();
        let address = at
            .parse()
            .unwrap_or_else(|_| panic!("no address in {line:?}"));
        Self {
            child,
            address,
            headers: String::new(),
        }
    }

    /// Starts a server whose tokens cost nothing but `step_ms` a step.
    pub fn fake(step_ms: u32, flags: &[&str]) -> Self {
        let step = step_ms.to_string();
        let mut all = vec!["--fake-runner", "--fake-step-ms", &step];
        all.extend(flags);
        Self::start(&all)
    }

    /// Its standard input, of a command that has a pipe there.
    pub fn stdin(&mut self) -> ChildStdin {
        self.child.stdin.take().unwrap()
    }

    /// Sends a signal.
    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let killed = Command::new("kill").args(["-s", name, &pid]).status();
        assert!(killed.unwrap().success());
    }

    /// Waits for the process to end.
    pub fn wait(mut self) -> ExitStatus {
        let until = Instant::now() + LONG;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < until, "the server does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends bytes as they are and reads to the end.
    pub fn raw(&self, bytes: &[u8]) -> Answer {
        let mut stream = self.connect();
        // A server that refuses early may close before it has read everything.
        let _ = stream.write_all(bytes);
        Answer::read(stream)
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream
    }

    pub fn get(&self, path: &str) -> Answer {
        self.raw(format!("GET {path} HTTP/1.0\r\n{}\r\n", self.headers).as_bytes())
    }

    /// Posts JSON.
    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_bytes(path, body.to_string().as_bytes())
    }

    pub fn post_bytes(&self, path: &str, body: &[u8]) -> Answer {
        self.raw(&request(path, &self.headers, body))
    }

    /// Posts JSON that must be answered with 200.
    pub fn ok(&self, path: &str, body: &Value) -> Value {
        let answer = self.post(path, body);
        assert_eq!(answer.status, 200, "{body}: {}", answer.text());
        answer.json()
    }

    /// Posts JSON and reads the answer as a stream of events.
    pub fn stream(&self, path: &str, body: &Value) -> Events {
        let mut stream = self.connect();
        stream
            .write_all(&request(path, &self.headers, body.to_string().as_bytes()))
            .unwrap();
        Events::begin(stream)
    }

    /// The value of a metric without further labels.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").text();
        let line = text
            .lines()
            .find(|line| line.starts_with(&format!("vllm:{name}{{")))
            .unwrap_or_else(|| panic!("no metric {name} in\n{text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// Waits until a metric has a value.
    pub fn wait_metric(&self, name: &str, value: f64) {
        let until = Instant::now() + LONG;
        while self.metric(name) != value {
            assert!(
                Instant::now() < until,
                "{name} is {}, never {value}",
                self.metric(name)
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Nothing runs, nothing waits, and every block is free.
    pub fn wait_empty(&self) {
        for name in [
            "num_requests_running",
            "num_requests_waiting",
            "kv_cache_usage_perc",
        ] {
            self.wait_metric(name, 0.0);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The bytes of a POST.
pub fn request(path: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let mut bytes = format!(
        "POST {path} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {}\r\n{headers}\r\n",
        body.len()
    )
    .into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    fn read(mut stream: TcpStream) -> Self {
        let mut bytes = Vec::new();
        let result = stream.read_to_end(&mut bytes);
        let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") else {
            panic!(
                "no answer but {result:?} {:?}",
                String::from_utf8_lossy(&bytes)
            );
        };
        let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
        Self {
            status: head[9..12].parse().unwrap(),
            head,
            body: bytes[end + 4..].to_vec(),
        }
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// The value of a header field.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (field, value) = line.split_once(':')?;
            field.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// The `error` object, which must have vLLM's form.
    pub fn error(&self) -> Value {
        let error = self.json()["error"].clone();
        assert_eq!(error["code"], self.status, "{error}");
        assert!(!error["message"].as_str().unwrap().is_empty());
        assert!(!error["type"].as_str().unwrap().is_empty());
        let text = error.to_string();
        for leak in ["/src/", ".rs", "panicked", "0x"] {
            assert!(!text.contains(leak), "{text}");
        }
        error
    }
}

/// A stream of server-sent events.
pub struct Events {
    reader: BufReader<TcpStream>,
    done: bool,
}

impl Events {
    /// Reads the head of the answer, which must be 200.
    fn begin(stream: TcpStream) -> Self {
        let mut reader = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert_ne!(reader.read_line(&mut head).unwrap(), 0, "{head}");
        }
        assert!(head.starts_with("HTTP/1.0 200"), "{head}");
        assert!(head.contains("text/event-stream"), "{head}");
        Self {
            reader,
            done: false,
        }
    }

    /// What still comes, as it is; nothing if the connection is reset.
    pub fn rest(mut self) -> String {
        let mut rest = Vec::new();
        let _ = self.reader.read_to_end(&mut rest);
        String::from_utf8_lossy(&rest).into_owned()
    }
}

impl Iterator for Events {
    type Item = Value;

    /// The next chunk. The stream must end with `[DONE]` and have the form of the standard.
    fn next(&mut self) -> Option<Value> {
        if self.done {
            return None;
        }
        let mut line = String::new();
        loop {
            line.clear();
            let read = self.reader.read_line(&mut line).unwrap();
            assert_ne!(read, 0, "the stream ends without [DONE]");
            if line.starts_with(':') {
                self.reader.read_line(&mut line).unwrap();
                continue;
            }
            break;
        }
        let data = line.strip_prefix("data: ").unwrap().trim_end().to_owned();
        line.clear();
        self.reader.read_line(&mut line).unwrap();
        assert_eq!(line, "\n");
        if data == "[DONE]" {
            self.done = true;
            let mut rest = String::new();
            self.reader.read_to_string(&mut rest).unwrap();
            assert_eq!(rest, "");
            return None;
        }
        Some(serde_json::from_str(&data).unwrap())
    }
}

/// A path of this run's own, in a folder that is there.
pub fn scratch(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("nano-vllm-{}-{name}", std::process::id()))
}

/// A greedy completion of `max_tokens` tokens, whatever they are.
pub fn endless(prompt: &str, max_tokens: u32) -> Value {
    json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true})
}
