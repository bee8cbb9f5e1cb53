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
    if chat:
        if body.get("top_logprobs") and body.get("logprobs") is not True:
            return False
        # Only a server that is told how the model writes calls takes tools.
        if body.get("tools") is not None and body.get("tool_choice") != "none":
            return False
        if body.get("continue_final_message"):
            return False
    said = json.dumps([body.get("messages"), body.get("prompt"), body.get("bad_words")], ensure_ascii=False)
    return len(said) < MOST_CHARACTERS or isinstance(body.get("prompt"), list)


@schemathesis.hook
def filter_case(context, case):
    return follows_rules(case.body)
