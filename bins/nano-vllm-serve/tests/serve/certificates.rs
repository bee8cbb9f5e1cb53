//! Certificates that are read again. `tests/clients/tls` has what needs clients that speak TLS.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::Command;

use crate::client::{Server, command, scratch};

/// Whether the server takes a connection and looks at what it says: no TLS, so it closes.
fn accepts(server: &Server) {
    let mut stream = server.connect();
    let _ = stream.write_all(b"this is not TLS");
    let mut answer = Vec::new();
    // An alert or nothing; the time-out of a server that does not look is an error, too.
    if let Err(error) = stream.read_to_end(&mut answer) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
    }
}

fn make_pipe(path: &Path) {
    let made = Command::new("mkfifo").arg(path).status().unwrap();
    assert!(made.success());
}

#[test]
fn a_reload_while_the_model_loads_ends_nothing() {
    // What is read of a model, from a pipe: loading waits until it is written.
    let template = scratch("template-pipe");
    make_pipe(&template);
    let mut starting = command(&[
        "--fake-runner",
        "--chat-template",
        template.to_str().unwrap(),
    ])
    .spawn()
    .unwrap();
    let mut writer: File = OpenOptions::new().write(true).open(&template).unwrap();
    let hangup = Command::new("kill")
        .args(["-s", "HUP", &starting.id().to_string()])
        .status();
    assert!(hangup.unwrap().success());
    // A process that has ended reads nothing.
    writer.write_all(b"{{ messages[0].content }}").unwrap();
    drop(writer);
    let mut line = String::new();
    let out = starting.stdout.as_mut().unwrap();
    BufReader::new(out).read_line(&mut line).unwrap();
    assert!(line.contains(" is served at "), "{line:?}");
    starting.kill().unwrap();
    starting.wait().unwrap();
    std::fs::remove_file(template).unwrap();
}

#[test]
fn a_certificate_that_is_slow_to_read_holds_nobody_up() {
    let (certificate, key) = (scratch("slow.pem"), scratch("slow.key"));
    std::fs::write(&certificate, include_str!("../data/localhost.pem")).unwrap();
    std::fs::write(&key, include_str!("../data/localhost.key")).unwrap();
    let server = Server::start(&[
        "--fake-runner",
        "--ssl-certfile",
        certificate.to_str().unwrap(),
        "--ssl-keyfile",
        key.to_str().unwrap(),
    ]);
    accepts(&server);

    // A pipe in its place: who reads it waits until somebody writes.
    std::fs::remove_file(&certificate).unwrap();
    make_pipe(&certificate);
    server.signal("HUP");
    // Opens once the server has, and writes nothing.
    let writer: File = OpenOptions::new().write(true).open(&certificate).unwrap();
    accepts(&server);
    // Nor does it keep the process alive.
    server.signal("TERM");
    assert!(server.wait().success());
    drop(writer);
    for path in [certificate, key] {
        std::fs::remove_file(path).unwrap();
    }
}
