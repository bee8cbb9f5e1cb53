//! `bench serve` against a server.

use std::process::Command;

use serde_json::Value;

use crate::client::{Server, scratch};

#[test]
fn bench_serve_takes_the_command_line_of_vllm_s() {
    let server = Server::fake(0, &[]);
    let (host, port) = (
        server.address.ip().to_string(),
        server.address.port().to_string(),
    );
    let file = scratch("figures.json");
    let bench = |args: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_nano-vllm-serve"))
            .args(["bench", "serve", "--num-prompts", "7"])
            .args(["--random-input-len", "8", "--random-output-len", "5"])
            .args(args)
            .env_remove("OPENAI_API_KEY")
            .output()
            .unwrap()
    };
    let ran = bench(&[
        "--backend",
        "vllm",
        "--dataset-name",
        "random",
        "--ignore-eos",
        "--host",
        &host,
        "--port",
        &port,
        "--output-json",
        file.to_str().unwrap(),
    ]);
    assert!(
        ran.status.success(),
        "{}",
        String::from_utf8_lossy(&ran.stderr)
    );
    let figures: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    std::fs::remove_file(&file).unwrap();
    assert_eq!(figures["completed"], 7, "{figures}");
    assert_eq!(figures["total_output_tokens"], 35, "{figures}");
    assert_eq!(server.metric("generation_tokens_total"), 35.0);

    let url = format!("http://{}", server.address);
    assert!(bench(&["--base-url", &url]).status.success());
    // One place said twice, and what cannot be measured, are no reason to measure something else.
    for wrong in [
        &["--base-url", &url, "--port", &port][..],
        &["--port", &port, "--dataset-name", "sharegpt"],
    ] {
        assert_eq!(bench(wrong).status.code(), Some(2), "{wrong:?}");
    }
}
