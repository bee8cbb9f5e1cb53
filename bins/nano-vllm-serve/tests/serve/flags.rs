//! What flags of vLLM's do here: sockets, chunks, and defaults of requests.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::client::{Server, command, endless, request, scratch};

const PATH: &str = "/v1/completions";

/// Starts a server on a socket, and waits until it serves.
fn on_socket(path: &Path) -> Child {
    let mut child = command(&["--fake-runner", "--uds", path.to_str().unwrap()])
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    let expected = format!("is served at unix:{}\n", path.display());
    assert!(line.ends_with(&expected), "{line:?}");
    child
}

fn ask(path: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.write_all(bytes).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_unix_socket_serves_and_goes_with_the_server() {
    let path = scratch("socket");
    let mut body = endless("a", 20);
    body["stream"] = json!(true);
    let post = request(PATH, "", body.to_string().as_bytes());
    let mut server = on_socket(&path);
    let health = ask(&path, b"GET /health HTTP/1.0\r\n\r\n");
    assert!(health.starts_with("HTTP/1.0 200"), "{health}");
    assert!(ask(&path, &post).ends_with("data: [DONE]\n\n"));

    // Somebody serves there, and stays.
    let uds = path.to_str().unwrap();
    let second = command(&["--fake-runner", "--uds", uds])
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    let error = String::from_utf8(second.stderr).unwrap();
    assert_eq!(second.status.code(), Some(1), "{error}");
    let expected = format!("cannot listen on --uds {uds}");
    assert!(error.contains(&expected), "{error}");
    assert!(ask(&path, &post).ends_with("data: [DONE]\n\n"));

    // What a killed server leaves behind is in nobody's way.
    server.kill().unwrap();
    server.wait().unwrap();
    assert!(path.exists());
    let mut server = on_socket(&path);
    assert!(ask(&path, &post).ends_with("data: [DONE]\n\n"));
    let pid = server.id().to_string();
    assert!(Command::new("kill").arg(pid).status().unwrap().success());
    assert!(server.wait().unwrap().success());
    assert!(!path.exists(), "the socket is still there");

    // A file that is no socket is not ours to remove.
    std::fs::write(&path, "precious").unwrap();
    let refused = command(&["--fake-runner", "--uds", uds])
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(refused.code(), Some(1));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn chunks_have_as_many_tokens_as_asked_for() {
    let server = Server::start(&["--stream-interval", "4", "--enable-force-include-usage"]);
    let mut body = endless("Once upon a time", 18);
    body["return_token_ids"] = json!(true);
    let whole = server.ok(PATH, &body);
    body["stream"] = json!(true);
    let mut chunks: Vec<Value> = server.stream(PATH, &body).collect();
    // The client did not ask for it.
    let usage = chunks.pop().unwrap();
    assert_eq!(usage["usage"]["completion_tokens"], 18, "{usage}");
    let parts: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]).collect();
    let tokens = |part: &Value| part["token_ids"].as_array().unwrap().clone();
    let mut lengths: Vec<usize> = parts.iter().map(|part| tokens(part).len()).collect();
    // A chunk of none begins the stream.
    lengths.retain(|length| *length > 0);
    let (_, after_first) = lengths.split_first().unwrap();
    let (_, middle) = after_first.split_last().unwrap();
    assert!(middle.iter().all(|length| *length >= 4), "{lengths:?}");
    let all: Vec<Value> = parts.iter().flat_map(|part| tokens(part)).collect();
    assert_eq!(json!(all), whole["choices"][0]["token_ids"]);
    let text: String = parts.iter().map(|p| p["text"].as_str().unwrap()).collect();
    assert_eq!(text, whole["choices"][0]["text"]);
}

#[test]
fn operators_choose_what_requests_leave_out() {
    let template = scratch("template");
    let source = "{{ style }}{% for m in messages %}{{ m.content }}{% endfor %}";
    std::fs::write(&template, source).unwrap();
    let server = Server::start(&[
        "--override-generation-config",
        r#"{"max_new_tokens": 3}"#,
        "--generation-config",
        "vllm",
        "--return-tokens-as-token-ids",
        "--chat-template",
        template.to_str().unwrap(),
        "--default-chat-template-kwargs",
        r#"{"style": "terse"}"#,
    ]);
    std::fs::remove_file(&template).unwrap();
    let mut body = json!({"prompt": "a", "ignore_eos": true, "logprobs": 0});
    let count = |body: &Value| server.ok(PATH, body)["usage"]["completion_tokens"].clone();
    assert_eq!(count(&body), 3);
    let tokens = server.ok(PATH, &body)["choices"][0]["logprobs"]["tokens"].clone();
    let first = tokens[0].as_str().unwrap();
    assert!(first.starts_with("token_id:"), "{tokens}");
    body["max_tokens"] = json!(2);
    assert_eq!(count(&body), 2);
    // A default, and a limit.
    body["max_tokens"] = json!(5);
    assert_eq!(count(&body), 3);
    let messages = json!([{"role": "user", "content": "a"}]);
    let chat = json!({"messages": messages, "ignore_eos": true, "max_completion_tokens": 5});
    let chat = server.ok("/v1/chat/completions", &chat);
    assert_eq!(chat["usage"]["completion_tokens"], 3);

    let rendered = |style: Option<&str>| {
        let mut chat = json!({"messages": [{"role": "user", "content": " and kind"}]});
        if let Some(style) = style {
            chat["chat_template_kwargs"] = json!({"style": style});
        }
        // As many tokens as the chat itself has.
        chat["max_tokens"] = json!(1);
        let counted = server.ok("/v1/chat/completions", &chat)["usage"]["prompt_tokens"].clone();
        let tokenized = server.ok("/tokenize", &chat);
        assert_eq!(tokenized["count"], counted);
        let tokens = &tokenized["tokens"];
        server.ok("/detokenize", &json!({"tokens": tokens}))["prompt"].clone()
    };
    let ends = |style, end: &str| {
        let text = rendered(style);
        assert!(text.as_str().unwrap().ends_with(end), "{text}");
    };
    ends(None, "terse and kind");
    ends(Some("long"), "long and kind");
}
