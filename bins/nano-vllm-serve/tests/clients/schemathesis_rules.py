"""What /openapi.json cannot say: rules between fields, and lengths in tokens.

A body that breaks one of these is rightly refused although it matches its schema, so it is not sent.
"""

import json

import schemathesis

# A character has at most four tokens in a byte-level vocabulary; the server's context has 2,048.
MOST_CHARACTERS = 400


def numbers_that_vanish(body):
    """Numbers above 0 that are 0 in single precision."""
    values = [body.get(name) for name in ("top_p", "repetition_penalty")]
    return any(isinstance(value, (int, float)) and abs(value) < 1e-30 for value in values)


def valid_tool(tool):
    return isinstance(tool, dict) and isinstance(tool.get("function"), dict) and "name" in tool["function"]


def follows_rules(body):
    if not isinstance(body, dict):
        return True
    chat = "messages" in body

    def is_int(name):
        return isinstance(body.get(name), (int, float)) and not isinstance(body.get(name), bool)

    stream = body.get("stream") is True
    if body.get("stream_options") is not None and not stream:
        return False
    if stream and body.get("prompt_logprobs"):
        return False
    if is_int("min_tokens"):
        limits = [body[name] for name in ("max_completion_tokens", "max_tokens") if is_int(name)]
        if not limits and not chat:
            limits = [16]
        if any(body["min_tokens"] > limit for limit in limits):
            return False
    if is_int("n") and body["n"] > 1:
        greedy = not is_int("temperature") or body["temperature"] < 0.01
        prompts = body.get("prompt")
        count = len(prompts) if isinstance(prompts, list) else 1
        if greedy or body["n"] * count > 1024:
            return False
    if numbers_that_vanish(body):
        return False
    # One thing at most may say what the text must look like, and no list of tokens may contradict it.
    fields = ("response_format", "structured_outputs", *(name for name in body if name.startswith("guided_")))
    structured = sum(body.get(name) not in (None, {"type": "text"}) for name in fields)
    if chat:
        if body.get("top_logprobs") and body.get("logprobs") is not True:
            return False
        # Only a server that is told how the model writes calls takes tools it does not force.
        choice, tools = body.get("tool_choice"), body.get("tools")
        if tools is not None and choice in (None, "auto"):
            return False
        names = [tool["function"]["name"] for tool in tools or [] if valid_tool(tool)]
        if isinstance(choice, dict) and (choice.get("function") or {}).get("name") not in names:
            return False
        forced = choice == "required" or isinstance(choice, dict)
        if forced and (not tools or structured):
            return False
        structured = structured + forced
        if body.get("continue_final_message"):
            return False
    if structured > 1:
        return False
    if structured and any(body.get(name) for name in ("allowed_token_ids", "bad_words", "logit_bias", "min_tokens")):
        return False
    said = json.dumps([body.get("messages"), body.get("prompt"), body.get("bad_words")], ensure_ascii=False)
    return len(said) < MOST_CHARACTERS or isinstance(body.get("prompt"), list)


@schemathesis.hook
def filter_case(context, case):
    return follows_rules(case.body)
