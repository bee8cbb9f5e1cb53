//! What the demo asks, and what must be in the answers.

use engine::chat_template::ChatInput;
use serde_json::json;

/// The beginning that seven of the conversations share: four full blocks of 16 tokens, computed
/// once and found in the prefix cache by the others.
const SYSTEM_PROMPT: &str = "You are the nano-vllm demo model, a small and friendly assistant. \
    Answer in whole sentences and keep your answers short. You can tell stories, answer simple \
    questions, add and subtract small numbers, write lists and JSON, and explain how nano-vllm \
    works. If you do not know something, say so.";

/// One question.
#[derive(Clone, Debug)]
pub struct Question {
    /// What the user says.
    pub text: String,
    /// Whether the shared system prompt stands before it.
    pub system: bool,
    /// What `--check` looks for in the answer.
    pub expect: &'static str,
}

impl Question {
    /// A question of the user's own.
    pub fn own(text: &str) -> Self {
        Self {
            text: text.to_owned(),
            system: true,
            expect: "",
        }
    }

    /// The conversation to render.
    pub fn chat(&self) -> ChatInput {
        let mut messages = Vec::new();
        if self.system {
            messages.push(json!({"role": "system", "content": SYSTEM_PROMPT}));
        }
        messages.push(json!({"role": "user", "content": self.text}));
        ChatInput {
            messages,
            ..ChatInput::default()
        }
    }
}

/// The built-in questions. Long and short answers are mixed, so that places become free while
/// others go on.
pub fn built_in() -> Vec<Question> {
    [
        (true, "Tell me a story about a race with a rabbit.", "abbit"),
        (true, "What is 24 + 58?", "82"),
        (false, "Tell me a story about being brave.", "afraid"),
        (true, "What is paged attention?", "block"),
        (true, "What is the capital of Portugal?", "Lisbon"),
        (false, "List the months of the year.", "December"),
        (true, "What is prefix caching?", "prompt"),
        (
            false,
            "Extract name and city as JSON: Mia lives in Rome and works as a baker.",
            r#"{"name": "Mia", "city": "Rome"}"#,
        ),
        (true, "What happens when the cache is full?", ""),
        (
            false,
            "Ben has 14 marbles and loses 6. How many marbles are left?",
            "8",
        ),
        (false, "Write a short poem about the sea.", "sea"),
        (
            true,
            "Give me a JSON object with name, age and city for a person.",
            "\"age\"",
        ),
        (false, "Why is the sea salty?", "salt"),
        (false, "How do you say \"school\" in French?", "école"),
    ]
    .into_iter()
    .map(|(system, text, expect)| Question {
        text: text.to_owned(),
        system,
        expect,
    })
    .collect()
}
