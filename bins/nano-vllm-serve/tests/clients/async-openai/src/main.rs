//! The Rust client `async-openai` against the server at NANO_VLLM_URL, whose key is in OPENAI_API_KEY.

use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::error::OpenAIError;
use async_openai::types::chat::{
    ChatCompletionRequestUserMessageArgs, ChatCompletionStreamOptions, CreateChatCompletionRequest,
    CreateChatCompletionRequestArgs,
};
use async_openai::types::completions::CreateCompletionRequestArgs;
use futures_util::StreamExt;

const MODEL: &str = "nano-vllm-demo";

fn chat() -> Result<CreateChatCompletionRequest, OpenAIError> {
    let question = ChatCompletionRequestUserMessageArgs::default()
        .content("What is the capital of France?")
        .build()?;
    CreateChatCompletionRequestArgs::default()
        .model(MODEL)
        .messages([question.into()])
        .temperature(0.0)
        .max_completion_tokens(30_u32)
        .logprobs(true)
        .top_logprobs(2)
        .build()
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), OpenAIError> {
    let url = std::env::var("NANO_VLLM_URL").expect("NANO_VLLM_URL is set");
    let config = OpenAIConfig::new().with_api_base(format!("{url}/v1"));
    let client = Client::with_config(config.clone());

    let models = client.models().list().await?;
    assert_eq!(models.data[0].id, MODEL);

    let whole = client.chat().create(chat()?).await?;
    let choice = &whole.choices[0];
    let text = choice.message.content.as_deref().expect("it has content");
    assert!(text.contains("Paris"), "{text}");
    let usage = whole.usage.expect("it has usage");
    let logprobs = choice.logprobs.as_ref().and_then(|l| l.content.as_ref());
    assert_eq!(
        logprobs.map(Vec::len),
        Some(usage.completion_tokens as usize)
    );

    let mut streamed = chat()?;
    streamed.stream_options = Some(ChatCompletionStreamOptions {
        include_usage: Some(true),
        include_obfuscation: None,
    });
    let mut stream = client.chat().create_stream(streamed).await?;
    let (mut pieces, mut last) = (String::new(), None);
    while let Some(chunk) = stream.next().await {
        let chunk = chunk?;
        for choice in &chunk.choices {
            pieces += choice.delta.content.as_deref().unwrap_or_default();
        }
        last = chunk.usage.or(last);
    }
    assert_eq!(pieces, text);
    let total = last.expect("the last chunk has usage").total_tokens;
    assert_eq!(total, usage.total_tokens);

    let plain = CreateCompletionRequestArgs::default()
        .model(MODEL)
        .prompt(["Once upon", "The moon"])
        .max_tokens(8_u32)
        .temperature(0.0)
        .build()?;
    let plain = client.completions().create(plain).await?;
    assert_eq!(plain.choices.len(), 2);

    let mut other = chat()?;
    other.model = "other".to_owned();
    match client.chat().create(other).await {
        // It expects OpenAI's words as `code`; vLLM and this server put the status there.
        Err(OpenAIError::JSONDeserialize(_, body)) => {
            assert!(body.contains("does not exist"), "{body}");
        }
        answer => panic!("another model gets {answer:?}"),
    }
    let stranger = Client::with_config(config.with_api_key("wrong"));
    assert!(stranger.models().list().await.is_err());
    println!("ok async-openai");
    Ok(())
}
