//! The end of the process under load.

use serde_json::json;

use crate::client::{Server, endless};

const PATH: &str = "/v1/completions";

#[test]
fn sigterm_lets_open_requests_end() {
    let server = Server::fake(10, &["--shutdown-timeout", "100"]);
    let mut body = endless("a", 300);
    body["stream"] = json!(true);
    let mut streams: Vec<_> = (0..8).map(|_| server.stream(PATH, &body)).collect();
    for stream in &mut streams {
        stream.next().unwrap();
    }
    server.signal("TERM");
    while server.get("/ready").status != 503 {
        std::thread::yield_now();
    }
    assert_eq!(server.get("/health").status, 200);
    let refused = server.post(PATH, &endless("b", 2));
    assert_eq!(refused.status, 503, "{}", refused.text());
    for stream in streams {
        assert_eq!(
            stream.last().unwrap()["choices"][0]["finish_reason"],
            "length"
        );
    }
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn what_does_not_end_in_time_ends_with_an_error() {
    let server = Server::fake(10, &["--shutdown-timeout", "0.2"]);
    let mut body = endless("a", 1000);
    body["stream"] = json!(true);
    let mut streams: Vec<_> = (0..4).map(|_| server.stream(PATH, &body)).collect();
    for stream in &mut streams {
        stream.next().unwrap();
    }
    server.signal("TERM");
    for stream in streams {
        let last = stream.last().unwrap();
        assert_eq!(last["error"]["code"], 503, "{last}");
    }
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn an_idle_server_ends_at_once() {
    let server = Server::start(&[]);
    let idle = server.connect();
    server.signal("INT");
    assert_eq!(server.wait().code(), Some(0));
    drop(idle);
}
