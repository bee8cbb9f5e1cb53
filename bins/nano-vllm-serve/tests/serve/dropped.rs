//! How many steps pass until a dropped connection's blocks are free. Steps are let through one by
//! one, so that they are counted and no clock is asked.

use std::io::Write;
use std::process::{ChildStdin, Stdio};

use serde_json::{Value, json};

use crate::client::{Server, command, endless, request};

const PATH: &str = "/v1/completions";

/// Blocks of the fake runner's cache.
const BLOCKS: f64 = (1 << 18) as f64;

/// Tokens of a step, and of the prompt of the one that is dropped, which takes several steps.
const BUDGET: &str = "64";
const PROMPT: usize = 400;
const PROMPT_STEPS: usize = 8;

/// Blocks of that prompt.
const FULL: f64 = (PROMPT / 16) as f64;

/// A server whose steps wait for permits.
struct Gated {
    server: Server,
    permits: ChildStdin,
    passed: u32,
}

impl Gated {
    fn start() -> Self {
        let flags = ["--fake-runner", "--fake-steps-from-stdin"];
        let mut command = command(&flags);
        command
            .args(["--max-num-batched-tokens", BUDGET])
            .stdin(Stdio::piped());
        let mut server = Server::begin(command);
        Gated {
            permits: server.stdin(),
            server,
            passed: 0,
        }
    }

    /// Lets one step pass, and waits until it has ended.
    fn pass(&mut self) {
        self.permits.write_all(b".").unwrap();
        self.passed += 1;
        let steps = f64::from(self.passed);
        self.server
            .wait_metric("iteration_tokens_total_count", steps);
    }

    /// Blocks in use after the last step.
    fn blocks(&self) -> f64 {
        (self.server.metric("kv_cache_usage_perc") * BLOCKS).round()
    }

    /// Waits until the server serves so many requests.
    fn wait_load(&self, requests: u64) {
        while self.server.get("/load").json()["server_load"] != requests {
            std::thread::yield_now();
        }
    }
}

fn body(stream: bool) -> Vec<u8> {
    let mut body = endless("", 500);
    body["prompt"] = json!(vec![7; PROMPT]);
    body["stream"] = json!(stream);
    request(PATH, "", body.to_string().as_bytes())
}

#[test]
fn a_dropped_connection_s_blocks_are_free_within_two_steps() {
    let mut gated = Gated::start();
    // Steps go on after the other one is gone.
    let stays: Value = {
        let mut body = endless("a", 900);
        body["stream"] = json!(true);
        body
    };
    let mut stays = gated.server.stream(PATH, &stays);
    gated.pass();
    stays.next().unwrap();
    for stream in [true, false] {
        for in_its_prompt in [true, false] {
            let own = gated.blocks();
            let mut leaves = gated.server.connect();
            leaves.write_all(&body(stream)).unwrap();
            gated.wait_load(2);
            // Admission takes the whole prompt's blocks, and its first step computes a part of it.
            while gated.blocks() < own + FULL {
                gated.pass();
            }
            if !in_its_prompt {
                (0..PROMPT_STEPS).for_each(|_| gated.pass());
            }
            drop(leaves);
            // The server knows; the next step is planned and has the dropped one in it.
            gated.wait_load(1);
            gated.pass();
            gated.pass();
            // The one that stays may have filled a block.
            let after = gated.blocks();
            assert!(
                after <= own + 2.0,
                "{after} blocks after two steps, {own} before; stream: {stream}, in its prompt: \
                 {in_its_prompt}"
            );
        }
    }
    let Gated {
        server, permits, ..
    } = gated;
    drop(permits);
    assert_eq!(
        stays.last().unwrap()["choices"][0]["finish_reason"],
        "length"
    );
    server.wait_empty();
}
