//! The part of a body that becomes a chat's prompt.

use engine::chat_template::ChatInput;
use serde_json::{Map, Value, json};

use super::{ApiError, Fields};

/// Fields of vLLM's chats that may only be null.
pub const NOT_SUPPORTED_IN_CHATS: &[&str] = &[
    "chat_template",
    "return_prompt_text",
    "mm_processor_kwargs",
    "media_io_kwargs",
];

/// What `reasoning_effort` may be.
pub const EFFORTS: [&str; 7] = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];

/// Takes everything that the chat template sees, but for `tools`, which more is made of.
pub fn take_chat_input(f: &mut Fields, tools: Option<Vec<Value>>) -> Result<ChatInput, ApiError> {
    for name in NOT_SUPPORTED_IN_CHATS {
        f.refuse_unless(name, &[], "")?;
    }
    let mut messages: Vec<Value> = f
        .take_as("messages", "a list of messages")?
        .ok_or_else(|| ApiError::bad_form("messages", "messages is missing"))?;
    for message in messages.iter_mut().filter_map(Value::as_object_mut) {
        complete(message);
    }
    let mut template_kwargs: Map<String, Value> = f
        .take_as("chat_template_kwargs", "an object")?
        .unwrap_or_default();
    if let Some(effort) = take_effort(f)? {
        // Templates have either; a client that says both knows better.
        let thinks = template_kwargs.entry("enable_thinking");
        thinks.or_insert(json!(effort != "none"));
        template_kwargs.insert("reasoning_effort".to_owned(), json!(effort));
    }
    Ok(ChatInput {
        messages,
        tools,
        documents: f.take_as("documents", "a list of objects")?,
        template_kwargs,
        add_generation_prompt: f.take_as("add_generation_prompt", "true or false")?,
        continue_final_message: f.take_bool("continue_final_message", false)?,
    })
}

fn take_effort(f: &mut Fields) -> Result<Option<String>, ApiError> {
    let expected = format!("one of {}", EFFORTS.join(", "));
    let effort: Option<String> = f.take_as("reasoning_effort", &expected)?;
    match effort {
        Some(other) if !EFFORTS.contains(&other.as_str()) => {
            let message = format!("reasoning_effort must be {expected}");
            Err(ApiError::bad_form("reasoning_effort", message))
        }
        effort => Ok(effort),
    }
}

/// Puts what clients leave out where templates look for it, as vLLM does: a message that is all tool
/// calls has no content, and reasoning has two names, an older one that templates read.
fn complete(message: &mut Map<String, Value>) {
    let content = message.entry("content").or_insert(Value::Null);
    if content.is_null() {
        *content = json!("");
    }
    if message.get("role").is_none_or(|role| role != "assistant") {
        return;
    }
    let names = ["reasoning", "reasoning_content"];
    let mut found = names.iter().filter_map(|name| message.get(*name));
    if let Some(reasoning) = found.find(|reasoning| !reasoning.is_null()).cloned() {
        for name in names {
            message.insert(name.to_owned(), reasoning.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(body: Value) -> Result<ChatInput, ApiError> {
        take_chat_input(&mut Fields::new(body, "the body")?, None)
    }

    #[test]
    fn messages_have_what_templates_look_for() {
        let messages = json!([
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": null, "reasoning": "hm", "tool_calls": []},
            {"role": "assistant", "reasoning": null, "reasoning_content": "so"},
            {"role": "user", "reasoning": "no business of a user"},
            "not a message",
        ]);
        let expected = json!([
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "reasoning": "hm", "reasoning_content": "hm",
             "tool_calls": []},
            {"role": "assistant", "content": "", "reasoning": "so", "reasoning_content": "so"},
            {"role": "user", "content": "", "reasoning": "no business of a user"},
            "not a message",
        ]);
        assert_eq!(
            json!(chat(json!({"messages": messages})).unwrap().messages),
            expected
        );
    }

    #[test]
    fn effort_goes_to_the_template() {
        let kwargs = |mut body: Value| {
            body["messages"] = json!([]);
            chat(body).map(|chat| json!(chat.template_kwargs))
        };
        assert_eq!(kwargs(json!({})).unwrap(), json!({}));
        assert_eq!(
            kwargs(json!({"reasoning_effort": "low"})).unwrap(),
            json!({"reasoning_effort": "low", "enable_thinking": true})
        );
        assert_eq!(
            kwargs(json!({"reasoning_effort": "none"})).unwrap()["enable_thinking"],
            false
        );
        let both = json!({
            "reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": false, "x": 1},
        });
        assert_eq!(
            kwargs(both).unwrap(),
            json!({"reasoning_effort": "low", "enable_thinking": false, "x": 1})
        );
        for bad in [json!("some"), json!(3)] {
            let error = kwargs(json!({"reasoning_effort": bad})).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("reasoning_effort"));
            assert!(error.message.contains("minimal"), "{}", error.message);
        }
    }
}
