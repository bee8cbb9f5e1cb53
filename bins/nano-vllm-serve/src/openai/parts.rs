//! Splits a chat's answer into reasoning, content and tool calls, piece by piece.
//!
//! Qwen and Hermes models write `<think>…</think>` before the answer and
//! `<tool_call>{"name": …, "arguments": {…}}</tool_call>` in it.

use serde_json::{Map, Value, json};

use super::forced::{Forced, ForcedCalls};

/// Which parts are told apart; by default none, and everything is content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parsers {
    /// Where reasoning begins.
    pub reasoning: Option<Reasoning>,
    /// Whether tool calls are parsed.
    pub tools: bool,
}

/// Where reasoning begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reasoning {
    /// At `<think>`.
    AtTag,
    /// With the first character: the template has opened it.
    AtOnce,
}

/// A call that the model makes, or more of its arguments.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolCall {
    /// Counted from 0 in an answer.
    pub index: usize,
    /// The function's name; `None` if it has been given out.
    pub name: Option<String>,
    /// Its arguments, as JSON text.
    pub arguments: String,
}

impl ToolCall {
    /// A call without any arguments so far.
    pub fn begun(index: usize, name: String) -> Self {
        Self {
            index,
            name: Some(name),
            arguments: String::new(),
        }
    }

    /// More arguments of a call.
    pub fn more(index: usize, arguments: &str) -> Self {
        Self {
            index,
            name: None,
            arguments: arguments.to_owned(),
        }
    }

    /// As the API writes it. `request` makes the id unlike those of other answers.
    pub fn json(&self, request: &str, choice: usize, with_index: bool) -> Value {
        let mut value = match &self.name {
            Some(name) => json!({
                "id": format!("call-{request}-{choice}-{}", self.index),
                "type": "function",
                "function": {"name": name, "arguments": self.arguments},
            }),
            None => json!({"function": {"arguments": self.arguments}}),
        };
        if with_index {
            value["index"] = json!(self.index);
        }
        value
    }
}

/// What a piece of text brought.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parts {
    pub reasoning: String,
    pub content: String,
    pub calls: Vec<ToolCall>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Nothing but white space has come; reasoning may still begin.
    Start,
    Reasoning,
    Content,
    Call,
}

const THINK: &str = "<think>";
const END_THINK: &str = "</think>";
const CALL: &str = "<tool_call>";
const END_CALL: &str = "</tool_call>";

/// Splits one choice's text.
#[derive(Clone, Debug)]
pub struct Splitter {
    parsers: Parsers,
    /// What the content is, if calls are forced.
    forced: Option<ForcedCalls>,
    place: Place,
    /// Text that was not given out: the beginning of a tag, or of a call.
    held: String,
    calls: usize,
    /// Nothing but white space has come since a call.
    after_call: bool,
}

impl Splitter {
    /// At the beginning of an answer; `forced` says which calls it must be, if any.
    pub fn new(parsers: Parsers, forced: Option<&Forced>) -> Self {
        Self {
            forced: forced.cloned().map(ForcedCalls::new),
            place: match parsers.reasoning {
                Some(Reasoning::AtOnce) => Place::Reasoning,
                Some(Reasoning::AtTag) => Place::Start,
                None => Place::Content,
            },
            parsers,
            held: String::new(),
            calls: 0,
            after_call: false,
        }
    }

    /// Whether a tool was called, so that the answer ends for this reason.
    pub fn ends_with_calls(&self) -> bool {
        self.calls > 0 || self.forced.as_ref().is_some_and(ForcedCalls::are_a_reason)
    }

    /// Takes the next piece; with `last`, gives out everything that was held back.
    pub fn push(&mut self, text: &str, last: bool) -> Parts {
        let mut parts = Parts::default();
        self.held.push_str(text);
        while self.step(&mut parts) {}
        if let (Some(forced), Place::Content) = (&mut self.forced, self.place) {
            let text = std::mem::take(&mut self.held);
            parts.content = forced.push(&text, last, &mut parts.calls);
        }
        if last {
            let held = std::mem::take(&mut self.held);
            match self.place {
                Place::Reasoning => parts.reasoning.push_str(&held),
                // A call that was cut off is shown as it is.
                Place::Call => parts.content.push_str(&format!("{CALL}{held}")),
                Place::Start | Place::Content => parts.content.push_str(&held),
            }
        }
        parts
    }

    /// Goes on to the next tag; whether there was one.
    fn step(&mut self, parts: &mut Parts) -> bool {
        match self.place {
            Place::Start => {
                let text = self.held.trim_start();
                if let Some(rest) = text.strip_prefix(THINK) {
                    self.held = rest.to_owned();
                    self.place = Place::Reasoning;
                    return true;
                }
                if THINK.starts_with(text) {
                    return false; // may become the tag
                }
                self.place = Place::Content;
                true
            }
            Place::Reasoning => {
                let (before, found) = self.until(END_THINK);
                parts.reasoning.push_str(&before);
                if found {
                    self.place = Place::Content;
                }
                found
            }
            Place::Content if self.forced.is_some() => false,
            Place::Content if !self.parsers.tools => {
                parts.content.push_str(&std::mem::take(&mut self.held));
                false
            }
            Place::Content => {
                if self.after_call {
                    // The line breaks between calls belong to nobody.
                    self.held = self.held.trim_start().to_owned();
                    self.after_call = self.held.is_empty();
                }
                let (before, found) = self.until(CALL);
                parts.content.push_str(&before);
                if found {
                    self.place = Place::Call;
                }
                found
            }
            Place::Call => {
                let Some(end) = self.held.find(END_CALL) else {
                    return false;
                };
                let body = self.held[..end].to_owned();
                self.held.drain(..end + END_CALL.len());
                match parse_call(&body) {
                    Some((name, arguments)) => {
                        parts.calls.push(ToolCall {
                            index: self.calls,
                            name: Some(name),
                            arguments,
                        });
                        self.calls += 1;
                        self.after_call = true;
                    }
                    None => parts.content.push_str(&format!("{CALL}{body}{END_CALL}")),
                }
                self.place = Place::Content;
                true
            }
        }
    }

    /// Takes the text before `tag`, and the tag if it is there; what may become it stays.
    fn until(&mut self, tag: &str) -> (String, bool) {
        if let Some(at) = self.held.find(tag) {
            let before = self.held[..at].to_owned();
            self.held.drain(..at + tag.len());
            return (before, true);
        }
        let kept = (1..tag.len())
            .rev()
            .find(|n| self.held.ends_with(&tag[..*n]))
            .unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - kept);
        (std::mem::replace(&mut self.held, rest), false)
    }
}

fn parse_call(body: &str) -> Option<(String, String)> {
    let mut call: Map<String, Value> = serde_json::from_str(body.trim()).ok()?;
    let Some(Value::String(name)) = call.remove("name") else {
        return None;
    };
    let arguments = match call
        .remove("arguments")
        .or_else(|| call.remove("parameters"))
    {
        None => "{}".to_owned(),
        Some(Value::String(text)) => text,
        Some(other) => other.to_string(),
    };
    Some((name, arguments))
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;

    const ALL: Parsers = Parsers {
        reasoning: Some(Reasoning::AtTag),
        tools: true,
    };

    fn whole(parsers: Parsers, text: &str) -> Parts {
        Splitter::new(parsers, None).push(text, true)
    }

    #[test]
    fn parts_are_told_apart() {
        let text = "\n<think>hm < </think>It is <b>\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n\
                    </tool_call>\n<tool_call>{\"name\": \"g\"}</tool_call>";
        let parts = whole(ALL, text);
        assert_eq!(parts.reasoning, "hm < ");
        assert_eq!(parts.content, "It is <b>\n");
        let calls: Vec<_> = parts
            .calls
            .iter()
            .map(|c| (c.index, c.name.as_deref(), c.arguments.as_str()))
            .collect();
        assert_eq!(calls, [(0, Some("f"), "{\"a\":1}"), (1, Some("g"), "{}")]);
        assert_eq!(whole(Parsers::default(), text).content, text);
        for broken in [
            "<tool_call>{\"name\"",
            "<tool_call>x</tool_call>",
            "<tool_",
            "<thin",
        ] {
            assert_eq!(whole(ALL, broken).content, broken);
        }
        let open = Parsers {
            reasoning: Some(Reasoning::AtOnce),
            tools: false,
        };
        assert_eq!(whole(open, "a</think>b").reasoning, "a");
        assert_eq!(whole(open, "a").reasoning, "a");
    }

    #[test]
    fn a_forced_call_comes_after_reasoning() {
        let text = "<think>a call</think>\n[{\"name\": \"f\", \"parameters\": {\"a\": 1}}]";
        let mut splitter = Splitter::new(ALL, Some(&Forced::Required));
        let parts = splitter.push(text, true);
        assert_eq!(
            (parts.reasoning.as_str(), parts.content.as_str()),
            ("a call", "")
        );
        let call = ToolCall {
            arguments: r#"{"a": 1}"#.to_owned(),
            ..ToolCall::begun(0, "f".to_owned())
        };
        assert_eq!(parts.calls, [call]);
        assert!(splitter.ends_with_calls());
    }

    #[test]
    fn pieces_make_no_difference() {
        let words = [
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
            "<",
            ">",
            "ä",
            "\n",
            "x",
            "{\"name\": \"f\", \"arguments\": {}}",
        ];
        let mut rng = StdRng::seed_from_u64(7);
        for _ in 0..20_000 {
            let text: String = (0..rng.random_range(1..8))
                .map(|_| words[rng.random_range(0..words.len())])
                .collect();
            let mut splitter = Splitter::new(ALL, None);
            let mut got = Parts::default();
            let mut add = |parts: Parts| {
                got.reasoning += &parts.reasoning;
                got.content += &parts.content;
                got.calls.extend(parts.calls);
            };
            let mut rest = text.as_str();
            while !rest.is_empty() {
                let sizes = rest.char_indices().map(|(at, c)| at + c.len_utf8());
                let sizes: Vec<usize> = sizes.take(4).collect();
                let (piece, left) = rest.split_at(sizes[rng.random_range(0..sizes.len())]);
                add(splitter.push(piece, false));
                rest = left;
            }
            add(splitter.push("", true));
            let expected = whole(ALL, &text);
            assert_eq!(got, expected, "{text:?}");
        }
    }
}
