//! Chat templates against transformers, and what may go in.

mod common;

use std::collections::BTreeMap;

use engine::chat_template::{ChatInput, ChatTemplate};
use engine::checkpoint::Checkpoint;
use engine::tokenizer::Tokenizer;
use serde_json::{Value, json};

fn tokenizer() -> Tokenizer {
    let named = [("bos_token", "<s>"), ("eos_token", "</s>")];
    let named: BTreeMap<_, _> = named.map(|(k, v)| (k.to_string(), v.to_string())).into();
    Tokenizer::new(common::byte_tokenizer_model(), named).unwrap()
}

fn template(source: &str) -> ChatTemplate {
    let templates = vec![("default".to_string(), source.to_string())];
    ChatTemplate::new(templates, Some(&tokenizer())).unwrap()
}

fn chat(json: Value) -> ChatInput {
    serde_json::from_value(json).unwrap()
}

fn user(content: Value) -> ChatInput {
    chat(json!({"messages": [{"role": "user", "content": content}]}))
}

#[test]
fn texts_are_those_of_transformers() {
    let cases: Vec<Value> =
        serde_json::from_str(include_str!("fixtures/chat_templates.json")).unwrap();
    assert!(cases.len() >= 36);
    let mut wrong = String::new();
    for case in cases {
        let outcome =
            template(case["template"].as_str().unwrap()).render(&chat(case["chat"].clone()));
        let same = match (&outcome, case["text"].as_str(), case["error"].as_str()) {
            (Ok(text), Some(expected), _) => text == expected,
            (Err(error), _, Some(expected)) => error.message.contains(expected),
            _ => false,
        };
        if !same {
            let expected = case.get("text").or(case.get("error"));
            wrong += &format!(
                "{}\n  got  {outcome:?}\n  want {expected:?}\n",
                case["name"]
            );
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn errors_name_the_line() {
    let source = "{% for m in messages %}\n{{ m.content }}\n{{ raise_exception('no ' + m.role) }}\n{% endfor %}";
    let error = template(source).render(&user(json!("x"))).unwrap_err();
    assert_eq!(error.to_string(), "chat template, line 3: no user");
    assert_eq!(error.param, "messages");
    let templates = vec![("default".to_string(), "fine\n{% if %}".to_string())];
    let error = ChatTemplate::new(templates, None).unwrap_err();
    assert!(
        error.to_string().starts_with("chat template, line 2: "),
        "{error}"
    );
}

#[test]
fn content_comes_in_the_form_that_the_template_reads() {
    let parts = json!([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]);
    let prints = template("{% for m in messages %}[{{ m.content }}]{% endfor %}");
    assert_eq!(prints.render(&user(json!("one"))).unwrap(), "[one]");
    assert_eq!(prints.render(&user(parts.clone())).unwrap(), "[one\ntwo]");
    let walks = template(
        "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}[{{ p.text }}]\
         {% endif %}{% endfor %}{% endfor %}",
    );
    assert_eq!(walks.render(&user(json!("one"))).unwrap(), "[one]");
    assert_eq!(walks.render(&user(parts)).unwrap(), "[one][two]");
}

#[test]
fn impossible_messages_are_refused_by_place() {
    let template = template("{{ messages[0].content }}");
    for (messages, expected) in [
        (json!([]), "must hold at least one message"),
        (json!(["hi"]), "message 0 is not an object"),
        (json!([{"content": "x"}]), "message 0 has no `role`"),
        (
            json!([{"role": "user", "content": 3}]),
            "message 0: `content` is neither",
        ),
        (
            json!([{"role": "user", "content": "x"},
                   {"role": "user", "content": [{"type": "image_url"}]}]),
            "message 1: content of type `image_url`",
        ),
        (
            json!([{"role": "user", "content": [{"type": {}, "text": "x"}]}]),
            "message 0: content of type `unknown`",
        ),
        (
            json!([{"role": "assistant", "content": null,
                    "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]),
            "message 0: arguments of a tool call are not JSON",
        ),
    ] {
        let error = template
            .render(&chat(json!({"messages": messages})))
            .unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(error.param, "messages");
    }
}

#[test]
fn tool_arguments_sent_as_text_become_objects() {
    let template = template("{{ messages[0].tool_calls[0].function.arguments.a }}");
    let call = json!({"messages": [{"role": "assistant", "content": null,
        "tool_calls": [{"function": {"name": "f", "arguments": "{\"a\": 5}"}}]}]});
    assert_eq!(template.render(&chat(call)).unwrap(), "5");
}

#[test]
fn the_last_message_can_be_left_open() {
    let template = template(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</end>{% endfor %}\
         {% if add_generation_prompt %}<assistant>{% endif %}",
    );
    let mut chat = chat(json!({"messages": [
        {"role": "user", "content": "Sure"}, {"role": "assistant", "content": "Sure, "}]}));
    chat.continue_final_message = true;
    assert_eq!(
        template.render(&chat).unwrap(),
        "<user>Sure</end><assistant>Sure,"
    );
    chat.add_generation_prompt = Some(true);
    let error = template.render(&chat).unwrap_err();
    assert_eq!(error.param, "continue_final_message");
}

#[test]
fn named_templates_and_their_files() {
    let config = br#"{"eos_token": {"content": "<eos>"}, "chat_template": [
        {"name": "default", "template": "plain{{ eos_token }}"},
        {"name": "tool_use", "template": "tools"}]}"#;
    let memory = |files: Vec<(&'static str, &'static [u8])>| Checkpoint::Memory(files.into());
    let named = memory(vec![("tokenizer_config.json", config)]);
    let template = ChatTemplate::load(&named, None).unwrap().unwrap();
    let mut chat = user(json!("x"));
    assert_eq!(template.render(&chat).unwrap(), "plain");
    chat.tools = Some(vec![json!({"name": "f"})]);
    assert_eq!(template.render(&chat).unwrap(), "tools");
    let both = memory(vec![
        ("tokenizer_config.json", config),
        ("chat_template.jinja", b"from the file"),
    ]);
    let template = ChatTemplate::load(&both, None).unwrap().unwrap();
    assert_eq!(template.render(&chat).unwrap(), "from the file");
    assert!(ChatTemplate::load(&memory(vec![]), None).unwrap().is_none());
    let broken = memory(vec![("chat_template.jinja", b"{{ messages")]);
    let error = ChatTemplate::load(&broken, None).unwrap_err().to_string();
    assert!(
        error.contains("chat_template.jinja: chat template, line 1"),
        "{error}"
    );
}

#[test]
fn strftime_now_gives_the_date_of_today() {
    let text = template("{{ strftime_now('%Y-%m-%d') }}")
        .render(&user(json!("x")))
        .unwrap();
    let today = jiff::ZonedDateTime::now().strftime("%Y-%m-%d").to_string();
    assert_eq!(text, today);
}
