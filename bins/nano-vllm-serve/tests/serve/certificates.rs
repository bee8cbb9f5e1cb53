//! Certificates that are read again. `tests/clients/tls` has what needs clients that speak TLS.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::process::Command;

use crate::client::{Server, scratch};

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
    let made = Command::new("mkfifo").arg(&certificate).status().unwrap();
    assert!(made.success());
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
