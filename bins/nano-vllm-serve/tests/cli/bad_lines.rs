//! `run-batch` on bad lines: each gets the error that names its fault, the rest never notice.

use serde_json::{Value, json};

use crate::bad_lines_cases::{
    unsupported, unsupported_in_chats, wrong_chats, wrong_lines, wrong_values,
};
use crate::common::{SMALL, batch, chat, completion, golden};

/// A file under construction, and what each of its bad lines must be told.
#[derive(Default)]
struct File {
    bytes: Vec<u8>,
    lines: usize,
    good: usize,
    expected: Vec<(String, u16, Value, String)>,
}

impl File {
    /// Adds a bad line, and every few of them a good one.
    fn add(&mut self, id: &str, line: &[u8], status: u16, param: Value, message: &str) {
        self.bytes.extend(line);
        self.lines += 1;
        if !line.ends_with(b"\n") {
            self.bytes.push(b'\n');
        }
        let expected = (id.to_owned(), status, param, message.to_owned());
        self.expected.push(expected);
        if self.expected.len().is_multiple_of(8) {
            self.add_good();
        }
    }

    fn add_good(&mut self) {
        let case = golden("sum");
        let body = json!({
            "prompt": case.prompt, "temperature": 0, "max_tokens": 40, "return_token_ids": true,
        });
        let line = completion(&format!("good {}", self.good), body);
        self.bytes.extend(line.as_bytes());
        self.lines += 1;
        self.good += 1;
    }
}

#[test]
fn each_bad_line_gets_its_error_and_good_lines_their_tokens() {
    let mut file = File::default();
    file.add_good();
    let add_field =
        |file: &mut File, is_chat: bool, field: &str, value, param: &str, text: &str| {
            let id = format!("{} {field} {}", is_chat, file.lines);
            let mut body = json!({"max_tokens": 5});
            match is_chat {
                true => body["messages"] = json!([{"role": "user", "content": "Hello"}]),
                false => body["prompt"] = json!("Hello"),
            }
            body[field] = value;
            let line = match is_chat {
                true => chat(&id, body),
                false => completion(&id, body),
            };
            file.add(&id, line.as_bytes(), 400, json!(param), text);
        };
    let (both, only_chat) = (unsupported(), unsupported_in_chats());
    for (field, value) in &both {
        add_field(
            &mut file,
            false,
            field,
            value.clone(),
            field,
            "not supported",
        );
    }
    for (field, value) in both.iter().chain(&only_chat) {
        add_field(
            &mut file,
            true,
            field,
            value.clone(),
            field,
            "not supported",
        );
    }
    for (field, value, param, text) in wrong_values() {
        add_field(&mut file, false, field, value, param, text);
    }
    for (field, value, param, text) in wrong_chats() {
        add_field(&mut file, true, field, value, param, text);
    }
    let greedy_n = completion("greedy n", json!({"prompt": "a", "temperature": 0, "n": 2}));
    file.add("greedy n", greedy_n.as_bytes(), 400, json!("n"), "greedy");
    for (bytes, status, param, text) in wrong_lines() {
        // Without a readable custom_id the answer is known by the line's number.
        let number = file.lines + 1;
        let readable = bytes.starts_with(b"{\"custom_id\":\"ID\"") && !text.contains("is not JSON");
        let id = match readable {
            true => format!("line {number}"),
            false => format!("batch_req_{number}"),
        };
        let named = String::from_utf8(bytes.clone()).map_or(bytes, |t| {
            t.replacen("ID", &format!("line {number}"), 1).into_bytes()
        });
        file.add(&id, &named, status, param, text);
    }
    file.add_good();

    let answers = batch(&SMALL, &file.bytes);
    assert_eq!(answers.len(), file.lines);
    for (id, status, param, text) in &file.expected {
        let error = answers.error(id);
        let message = error["message"].as_str().unwrap();
        assert_eq!(error["code"], *status, "{id}: {message}");
        assert_eq!(error["param"], *param, "{id}: {message}");
        assert!(message.contains(text), "{id}: {message}");
        assert!(message.len() < 400, "{id}: {message}");
    }
    assert!(file.good > 10);
    for at in 0..file.good {
        assert_eq!(answers.tokens(&format!("good {at}")), golden("sum").greedy);
    }
}
