//! Chat templates: a list of messages to the prompt that the model was trained on.
//!
//! Templates are written for `transformers`, that is, for Python's Jinja2 with a few additions.
//! The module `jinja` has the environment; here is what goes in and how templates are chosen.

use minijinja::Environment;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::jinja;
use crate::tokenizer::Tokenizer;

/// What to render, in the shape of an OpenAI chat request.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ChatInput {
    /// Messages: objects with `role` and `content` (a string, a list of `{"type": "text",
    /// "text": ...}` parts, or null), and whatever else the template reads.
    pub messages: Vec<Value>,
    /// Tools that the model may call, as the template expects them.
    #[serde(default)]
    pub tools: Option<Vec<Value>>,
    /// Documents for templates with retrieval.
    #[serde(default)]
    pub documents: Option<Vec<Value>>,
    /// Further variables, such as `enable_thinking`.
    #[serde(default)]
    pub template_kwargs: Map<String, Value>,
    /// Whether to open the assistant's turn after the last message. Unset: yes, unless the final
    /// message is continued.
    #[serde(default)]
    pub add_generation_prompt: Option<bool>,
    /// Whether to leave the last message open, so that the model continues it.
    #[serde(default)]
    pub continue_final_message: bool,
}

/// A chat that cannot be rendered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ChatError {
    /// Which part of the request is at fault (`messages`, `tools`, ...).
    pub param: &'static str,
    /// What is wrong with it.
    pub message: String,
}

fn err(param: &'static str, message: impl std::fmt::Display) -> ChatError {
    ChatError {
        param,
        message: message.to_string(),
    }
}

/// A checkpoint's chat templates, compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Whether the default template wants a message's content as a list of parts.
    content_as_parts: bool,
}

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

#[derive(Deserialize)]
#[serde(untagged)]
enum ConfigTemplates {
    One(String),
    Many(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

#[derive(Deserialize)]
struct TokenizerConfig {
    chat_template: Option<ConfigTemplates>,
}

impl ChatTemplate {
    /// Reads `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`. `None` if the
    /// checkpoint has neither.
    pub fn load(
        checkpoint: &Checkpoint,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<Option<Self>, CheckpointError> {
        let file = "chat_template.jinja";
        if let Some(bytes) = checkpoint.read(file)? {
            let source = String::from_utf8(bytes.into_owned())
                .map_err(|error| checkpoint.error(file, error))?;
            let templates = vec![(DEFAULT.to_string(), source)];
            return Self::new(templates, tokenizer)
                .map(Some)
                .map_err(|error| checkpoint.error(file, error));
        }
        let file = "tokenizer_config.json";
        let templates = match checkpoint
            .read_json::<TokenizerConfig>(file)?
            .and_then(|config| config.chat_template)
        {
            None => return Ok(None),
            Some(ConfigTemplates::One(source)) => vec![(DEFAULT.to_string(), source)],
            Some(ConfigTemplates::Many(list)) => {
                list.into_iter().map(|t| (t.name, t.template)).collect()
            }
        };
        Self::new(templates, tokenizer)
            .map(Some)
            .map_err(|error| checkpoint.error(file, error))
    }

    /// Compiles `(name, source)` templates. The one named `default` serves all chats, except that
    /// chats with tools use `tool_use` if it exists.
    pub fn new(
        templates: Vec<(String, String)>,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<Self, ChatError> {
        let mut environment = jinja::environment();
        for (name, token) in tokenizer.iter().flat_map(|t| t.named_tokens()) {
            environment.add_global(name.clone(), token.clone());
        }
        for (name, source) in templates {
            environment
                .add_template_owned(name, jinja::without_generation_tags(&source))
                .map_err(|error| err("chat_template", jinja::describe(&error)))?;
        }
        if environment.get_template(DEFAULT).is_err() {
            return Err(err("chat_template", "no template is named `default`"));
        }
        let mut template = ChatTemplate {
            environment,
            content_as_parts: false,
        };
        template.content_as_parts = template.wants_parts();
        Ok(template)
    }

    /// Templates differ in whether they print `content` or walk its parts: try which one shows.
    fn wants_parts(&self) -> bool {
        let needle = "needle-in-content";
        let shows = |content: Value| {
            let chat = json!({
                "messages": [{"role": "user", "content": content}],
                "add_generation_prompt": false,
            });
            let template = self.environment.get_template(DEFAULT);
            template
                .and_then(|template| template.render(chat))
                .is_ok_and(|text| text.contains(needle))
        };
        !shows(json!(needle)) && shows(json!([{"type": "text", "text": needle}]))
    }

    /// The prompt for `chat`.
    pub fn render(&self, chat: &ChatInput) -> Result<String, ChatError> {
        let messages = self.prepare(&chat.messages)?;
        let open_turn = chat
            .add_generation_prompt
            .unwrap_or(!chat.continue_final_message);
        if open_turn && chat.continue_final_message {
            return Err(err(
                "continue_final_message",
                "cannot be combined with add_generation_prompt",
            ));
        }
        let tools = chat.tools.as_ref().filter(|tools| !tools.is_empty());
        let mut context = chat.template_kwargs.clone();
        context.insert("messages".to_string(), Value::Array(messages.clone()));
        context.insert("tools".to_string(), json!(tools));
        context.insert("documents".to_string(), json!(chat.documents));
        context.insert("add_generation_prompt".to_string(), json!(open_turn));
        let template = match tools {
            Some(_) => self
                .environment
                .get_template(TOOL_USE)
                .or_else(|_| self.environment.get_template(DEFAULT)),
            None => self.environment.get_template(DEFAULT),
        }
        .map_err(|error| err("chat_template", jinja::describe(&error)))?;
        let mut text = template
            .render(&context)
            .map_err(|error| err("messages", jinja::describe(&error)))?;
        if chat.continue_final_message {
            leave_open(&mut text, messages.last())?;
        }
        Ok(text)
    }

    /// Checks messages and gives their content the form that the template reads.
    fn prepare(&self, messages: &[Value]) -> Result<Vec<Value>, ChatError> {
        if messages.is_empty() {
            return Err(err("messages", "must hold at least one message"));
        }
        let prepared = messages.iter().enumerate().map(|(at, message)| {
            let mut message = message
                .as_object()
                .ok_or_else(|| err("messages", format_args!("message {at} is not an object")))?
                .clone();
            if !message.get("role").is_some_and(Value::is_string) {
                return Err(err("messages", format_args!("message {at} has no `role`")));
            }
            let content = message.remove("content").unwrap_or(Value::Null);
            message.insert("content".to_string(), self.content(content, at)?);
            parse_tool_arguments(&mut message, at)?;
            Ok(Value::Object(message))
        });
        prepared.collect()
    }

    fn content(&self, content: Value, at: usize) -> Result<Value, ChatError> {
        let parts = match content {
            Value::String(text) if self.content_as_parts => {
                return Ok(json!([{"type": "text", "text": text}]));
            }
            Value::String(_) | Value::Null => return Ok(content),
            Value::Array(parts) => parts,
            _ => {
                return Err(err(
                    "messages",
                    format_args!("message {at}: `content` is neither a string nor a list of parts"),
                ));
            }
        };
        let mut texts = Vec::with_capacity(parts.len());
        for part in &parts {
            let kind = part.get("type").filter(|kind| !kind.is_null());
            let is_text = kind.is_none_or(|kind| kind == "text");
            match (part, part["text"].as_str()) {
                (Value::String(text), _) => texts.push(text.as_str()),
                (_, Some(text)) if is_text => texts.push(text),
                _ => {
                    return Err(err(
                        "messages",
                        format_args!(
                            "message {at}: content of type `{}` is not supported, only `text` is",
                            kind.and_then(Value::as_str).unwrap_or("unknown")
                        ),
                    ));
                }
            }
        }
        Ok(if self.content_as_parts {
            let part = |text| json!({"type": "text", "text": text});
            Value::Array(texts.into_iter().map(part).collect())
        } else {
            Value::String(texts.join("\n"))
        })
    }
}

/// Clients send a call's arguments as a JSON string, templates want the object.
fn parse_tool_arguments(message: &mut Map<String, Value>, at: usize) -> Result<(), ChatError> {
    let Some(Value::Array(calls)) = message.get_mut("tool_calls") else {
        return Ok(());
    };
    for call in calls {
        let Some(arguments) = call.pointer_mut("/function/arguments") else {
            continue;
        };
        let Value::String(text) = arguments else {
            continue;
        };
        *arguments = match text.trim() {
            "" => json!({}),
            text => serde_json::from_str(text).map_err(|error| {
                err(
                    "messages",
                    format_args!("message {at}: arguments of a tool call are not JSON: {error}"),
                )
            })?,
        };
    }
    Ok(())
}

/// Cuts off what the template put behind the last message's content.
fn leave_open(text: &mut String, last: Option<&Value>) -> Result<(), ChatError> {
    let content = last.map(|message| match &message["content"] {
        Value::Array(parts) => parts
            .last()
            .and_then(|part| part["text"].as_str())
            .unwrap_or_default(),
        content => content.as_str().unwrap_or_default(),
    });
    let content = content.unwrap_or_default().trim();
    let position = text.rfind(content).filter(|_| !content.is_empty());
    match position {
        Some(at) => {
            text.truncate(at + content.len());
            Ok(())
        }
        None => Err(err(
            "continue_final_message",
            "the last message has no text that the template shows",
        )),
    }
}
