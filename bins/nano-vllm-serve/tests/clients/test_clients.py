"""The clients that people use, against the server at NANO_VLLM_URL (its key is in OPENAI_API_KEY)."""

import asyncio
import json
import os
from typing import Literal

import openai

URL = os.environ["NANO_VLLM_URL"]
MODEL = "nano-vllm-demo"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
client = openai.OpenAI(base_url=f"{URL}/v1", max_retries=0)


def test_models():
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_completion_sync_and_streamed():
    args = dict(model=MODEL, prompt="Once upon", max_tokens=20, temperature=0)
    whole = client.completions.create(**args)
    assert whole.usage.completion_tokens <= 20 and whole.choices[0].finish_reason in ("stop", "length")
    chunks = list(client.completions.create(**args, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_chat_with_logprobs():
    args = dict(model=MODEL, messages=QUESTION, max_tokens=30, temperature=0)
    whole = client.chat.completions.create(**args, logprobs=True, top_logprobs=3)
    content = whole.choices[0].logprobs.content
    assert len(content) == whole.usage.completion_tokens and len(content[0].top_logprobs) == 3
    assert all(t.logprob <= 0 for t in content)
    chunks = list(client.chat.completions.create(**args, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_tools():
    """The demo model calls none by itself, but it can be made to."""
    color = {"type": "string", "enum": ["red", "green"]}
    schema = {"type": "object", "properties": {"color": color}, "required": ["color"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "look_up", "parameters": schema}}
    args = dict(model=MODEL, messages=QUESTION, max_tokens=30, temperature=0, tools=[tool])
    message = client.chat.completions.create(**args, tool_choice="auto").choices[0].message
    assert "Paris" in message.content and not message.tool_calls
    chunks = list(client.chat.completions.create(**args, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == message.content
    args["max_tokens"] = 100
    named = {"type": "function", "function": {"name": "look_up"}}
    for choice, reason in (("required", "tool_calls"), (named, "stop")):
        answer = client.chat.completions.create(**args, tool_choice=choice).choices[0]
        assert answer.finish_reason == reason, answer
        call = answer.message.tool_calls[0]
        assert call.function.name == "look_up"
        assert json.loads(call.function.arguments)["color"] in color["enum"], call
        streamed = {}
        for chunk in client.chat.completions.create(**args, tool_choice=choice, stream=True):
            for piece in chunk.choices[0].delta.tool_calls or []:
                streamed[piece.index] = streamed.get(piece.index, "") + piece.function.arguments
        assert streamed[0] == call.function.arguments, streamed


def test_structured_outputs():
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer", "maximum": 9999999}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    args = dict(model=MODEL, messages=QUESTION, max_tokens=200, seed=1)
    form = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": schema}}
    answer = client.chat.completions.create(**args, response_format=form).choices[0]
    assert answer.finish_reason == "stop", answer
    value = json.loads(answer.message.content)
    assert set(value) == {"city", "people"} and isinstance(value["people"], int), value
    chunks = client.chat.completions.create(**args, response_format=form, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.message.content

    extra = {"structured_outputs": {"choice": ["Paris", "Rome"]}}
    answer = client.completions.create(model=MODEL, prompt="The capital of France is", n=3, extra_body=extra)
    assert all(c.text in ("Paris", "Rome") and c.finish_reason == "stop" for c in answer.choices)
    try:
        client.completions.create(model=MODEL, prompt="a", extra_body={"structured_outputs": {"regex": "("}})
    except openai.BadRequestError as error:
        assert error.param == "structured_outputs", error
        return
    raise AssertionError("a broken expression was taken")


def test_parsed_answers():
    """The helper of the package that makes a schema of a class, and a class of the answer."""
    import pydantic

    class Answer(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        sure: bool
        digits: list[Literal[1, 2, 3]] = pydantic.Field(max_length=3)

    args = dict(model=MODEL, messages=QUESTION, max_tokens=200, seed=2)
    message = client.chat.completions.parse(**args, response_format=Answer).choices[0].message
    assert isinstance(message.parsed, Answer), message


def test_n_echo_and_extras():
    answer = client.completions.create(
        model=MODEL, prompt=["a", "b"], n=2, echo=True, max_tokens=4, logprobs=2,
        extra_body={"top_k": 5, "min_p": 0.01, "ignore_eos": True, "return_token_ids": True, "seed": 3},
    )
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text.startswith("a") and answer.choices[3].text.startswith("b")
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    assert all(len(c.token_ids) == 4 for c in answer.choices)


def test_errors_have_their_classes():
    for error, args in [
        (openai.BadRequestError, dict(model=MODEL, prompt="a", temperature=9)),
        (openai.BadRequestError, dict(model=MODEL, prompt=[])),
        (openai.NotFoundError, dict(model="other", prompt="a")),
    ]:
        try:
            client.completions.create(**args)
        except error:
            continue
        raise AssertionError(f"{args} was not refused with {error}")
    try:
        openai.OpenAI(base_url=f"{URL}/v1", api_key="wrong", max_retries=0).models.list()
    except openai.AuthenticationError:
        return
    raise AssertionError("a wrong key was let in")


def test_async_and_cancelled_streams():
    async def main():
        many = openai.AsyncOpenAI(base_url=f"{URL}/v1", max_retries=0)
        args = dict(model=MODEL, messages=QUESTION, max_tokens=20, temperature=0)
        answers = await asyncio.gather(*(many.chat.completions.create(**args) for _ in range(16)))
        assert len({a.choices[0].message.content for a in answers}) == 1
        stream = await many.chat.completions.create(**args, stream=True)
        async for _ in stream:
            break
        await stream.close()
        await many.close()

    asyncio.run(main())


def test_langchain():
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", temperature=0, max_tokens=20, max_retries=0)
    whole = chat.invoke("What is the capital of France?").content
    assert whole and "".join(c.content for c in chat.stream("What is the capital of France?")) == whole


def test_litellm():
    import litellm

    args = dict(model=f"openai/{MODEL}", api_base=f"{URL}/v1", messages=QUESTION, max_tokens=20, temperature=0)
    whole = litellm.completion(**args).choices[0].message.content
    pieces = (c.choices[0].delta.content or "" for c in litellm.completion(**args, stream=True))
    assert whole and "".join(pieces) == whole


if __name__ == "__main__":
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            test()
            print("ok", name, flush=True)
