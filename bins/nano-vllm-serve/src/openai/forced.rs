//! Calls that the model was forced to make: JSON of a known form, given out as it comes.

use serde_json::Value;

use super::parts::ToolCall;

/// What the text is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Forced {
    /// `[{"name": …, "parameters": …}, …]`
    Required,
    /// The arguments of this function.
    Named(String),
}

/// Splits the text of one choice.
#[derive(Clone, Debug)]
pub struct ForcedCalls {
    kind: Forced,
    place: Place,
    /// The beginning of a call whose parameters have not begun.
    held: String,
    /// Calls that have begun.
    calls: usize,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    Between,
    /// Behind the `{` of a call.
    Head,
    Parameters(Nesting),
    /// Behind the parameters.
    Tail,
}

/// Where a character stands in a JSON value.
#[derive(Clone, Copy, Debug, Default)]
struct Nesting {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Nesting {
    /// Takes the next character; `None` if it is behind the value. The flag says whether it is the
    /// value's last.
    fn take(&mut self, c: char) -> Option<bool> {
        if self.in_string {
            match c {
                _ if self.escaped => self.escaped = false,
                '\\' => self.escaped = true,
                '"' => self.in_string = false,
                _ => {}
            }
            return Some(self.depth == 0 && !self.in_string);
        }
        match c {
            '"' => self.in_string = true,
            '{' | '[' => self.depth += 1,
            '}' | ']' if self.depth > 0 => {
                self.depth -= 1;
                return Some(self.depth == 0);
            }
            // A number, true, false or null has no last character of its own.
            '}' | ',' if self.depth == 0 => return None,
            c if self.depth == 0 && c.is_whitespace() => return None,
            _ => {}
        }
        Some(false)
    }
}

impl ForcedCalls {
    /// At the beginning of an answer.
    pub fn new(kind: Forced) -> Self {
        Self {
            kind,
            place: Place::Between,
            held: String::new(),
            calls: 0,
        }
    }

    /// Whether a call has begun.
    pub fn has_calls(&self) -> bool {
        self.calls > 0
    }

    /// Whether such calls end a choice with the reason `tool_calls`; one of a named function does
    /// not, as in the OpenAI API.
    pub fn are_a_reason(&self) -> bool {
        self.has_calls() && self.kind == Forced::Required
    }

    /// Takes the next piece. With `last`, returns the beginning of a call that was cut off.
    pub fn push(&mut self, text: &str, last: bool, calls: &mut Vec<ToolCall>) -> String {
        if let Forced::Named(name) = &self.kind {
            if self.calls == 0 && !(text.is_empty() && last) {
                self.calls = 1;
                calls.push(ToolCall::begun(0, name.clone()));
            }
            if !text.is_empty() {
                append(calls, 0, text);
            }
            return String::new();
        }
        let mut from = 0;
        for (at, c) in text.char_indices() {
            match &mut self.place {
                Place::Between if c == '{' => {
                    self.place = Place::Head;
                    self.held.clear();
                }
                Place::Between => {}
                Place::Head => {
                    let value_begins = !c.is_whitespace() && !matches!(c, ':' | ',');
                    match head(&self.held) {
                        Some(name) if value_begins => {
                            calls.push(ToolCall::begun(self.calls, name));
                            self.calls += 1;
                            self.held.clear();
                            from = at;
                            let mut nesting = Nesting::default();
                            nesting.take(c);
                            self.place = Place::Parameters(nesting);
                        }
                        _ => self.held.push(c),
                    }
                }
                Place::Parameters(nesting) => {
                    let end = match nesting.take(c) {
                        None => at,
                        Some(true) => at + c.len_utf8(),
                        Some(false) => continue,
                    };
                    append(calls, self.calls - 1, &text[from..end]);
                    // The call's own bracket may be what ended its parameters.
                    self.place = match end == at && c == '}' {
                        true => Place::Between,
                        false => Place::Tail,
                    };
                }
                Place::Tail if c == '}' => self.place = Place::Between,
                Place::Tail => {}
            }
        }
        if let Place::Parameters(_) = self.place
            && from < text.len()
        {
            append(calls, self.calls - 1, &text[from..]);
        }
        match (last, self.place) {
            (true, Place::Head) => format!("{{{}", std::mem::take(&mut self.held)),
            _ => String::new(),
        }
    }
}

/// The function's name, if `text` is everything between `{` and the parameters.
fn head(text: &str) -> Option<String> {
    let text = text.trim_end().strip_suffix(':')?;
    let call: Value = serde_json::from_str(&format!("{{{text}:0}}")).ok()?;
    call.get("parameters")?;
    call["name"].as_str().map(str::to_owned)
}

/// Appends to the arguments of a call, which may have begun in an earlier piece.
fn append(calls: &mut Vec<ToolCall>, index: usize, text: &str) {
    match calls.last_mut() {
        Some(call) if call.index == index => call.arguments.push_str(text),
        _ => calls.push(ToolCall::more(index, text)),
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::StdRng};
    use serde_json::json;

    use super::*;

    /// Name and arguments of each call, when the text comes in pieces.
    fn split(kind: Forced, text: &str, rng: &mut StdRng) -> (Vec<(String, String)>, String) {
        let mut forced = ForcedCalls::new(kind);
        let mut got: Vec<(String, String)> = Vec::new();
        let mut chars = text.chars().peekable();
        let mut left = String::new();
        while chars.peek().is_some() || rng.random_bool(0.5) {
            let count = rng.random_range(0..6);
            let piece: String = chars.by_ref().take(count).collect();
            let mut calls = Vec::new();
            left += &forced.push(&piece, false, &mut calls);
            add(&mut got, calls);
        }
        let mut calls = Vec::new();
        left += &forced.push("", true, &mut calls);
        add(&mut got, calls);
        (got, left)
    }

    fn add(got: &mut Vec<(String, String)>, calls: Vec<ToolCall>) {
        for call in calls {
            match call.name {
                Some(name) => {
                    assert_eq!(call.index, got.len());
                    got.push((name, call.arguments));
                }
                None => {
                    assert_eq!(call.index, got.len() - 1);
                    got[call.index].1 += &call.arguments;
                }
            }
        }
    }

    #[test]
    fn pieces_make_no_difference() {
        let mut rng = StdRng::seed_from_u64(9);
        let values = [
            json!({}),
            json!({"a": [1, {"b": "}]\"\\"}], "parameters": "{"}),
            json!("x\\\" }"),
            json!(12.5),
            json!(null),
            json!([[], [{}]]),
            json!({"é": "😀"}),
        ];
        for _ in 0..2000 {
            let calls: Vec<(String, Value)> = (0..rng.random_range(1..4))
                .map(|_| {
                    let name = ["f", "look_up", "\"q\""][rng.random_range(0..3)];
                    let value = values[rng.random_range(0..values.len())].clone();
                    (name.to_owned(), value)
                })
                .collect();
            let list: Vec<Value> = calls
                .iter()
                .map(|(name, value)| json!({"name": name, "parameters": value}))
                .collect();
            let text = match rng.random() {
                true => serde_json::to_string(&list).unwrap(),
                false => serde_json::to_string_pretty(&list).unwrap(),
            };
            let (got, left) = split(Forced::Required, &text, &mut rng);
            assert_eq!(left, "");
            let got: Vec<(String, Value)> = got
                .into_iter()
                .map(|(name, text)| (name, serde_json::from_str(&text).expect(&text)))
                .collect();
            assert_eq!(got, calls, "{text}");
            let kind = Forced::Named("g".to_owned());
            let (got, _) = split(kind, &text, &mut rng);
            assert_eq!(got, [("g".to_owned(), text)]);
        }
    }

    #[test]
    fn what_is_cut_off_is_shown() {
        let mut rng = StdRng::seed_from_u64(1);
        let cut = |text: &str, rng: &mut StdRng| split(Forced::Required, text, rng);
        let (calls, left) = cut(r#"[{"name": "f", "para"#, &mut rng);
        assert!(calls.is_empty());
        assert_eq!(left, r#"{"name": "f", "para"#);
        let (calls, left) = cut(r#"[{"name": "f", "parameters": {"a"#, &mut rng);
        assert_eq!(calls, [("f".to_owned(), r#"{"a"#.to_owned())]);
        assert_eq!(left, "");
    }
}
