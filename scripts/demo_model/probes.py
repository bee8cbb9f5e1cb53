"""What the trained model can do: greedy answers, and shares of right ones on questions it was not trained on."""

import json
import random

import torch

from . import arithmetic, questions, stories, structured
from .chat import SYSTEM_PROMPT

SAMPLES = [
    (None, "Who are you?"), (None, "Tell me a story about a brave mouse named Pip."), (None, "What is 47 + 38?"), (None, "What is 81 - 26?"),
    (None, "What is the capital of Norway?"), (None, "Give me a JSON object with name and age for a person."),
    (None, "Extract name, age and city as JSON: Sofia is 34 years old and lives in Lisbon."), (None, "List five fruits as a numbered list."),
    (None, "Why is the sky blue?"), (None, "What is the opposite of heavy?"), (None, "Count from 4 to 12."),
    (None, "Tom has 12 apples and gives 5 to Anna. How many apples are left?"), (None, "How do you say \"thank you\" in French?"),
    (None, "Sort these numbers: 42, 7, 19."), (None, "Write a short poem about the moon."), (None, "Who will win the election next year?"),
    ("Talk like a pirate.", "What is the capital of Japan?"), ("Answer with one or two words only.", "What colour is a carrot?"),
    (SYSTEM_PROMPT, "What is paged attention?"), (SYSTEM_PROMPT, "What is continuous batching?"), (SYSTEM_PROMPT, "Which day comes after Friday?"),
    (SYSTEM_PROMPT, "Tell me a joke."), (SYSTEM_PROMPT, "Tell me a story about a fox and a red kite."), (SYSTEM_PROMPT, "What is 15 + 27?"),
]
COMPLETIONS = ["Once upon a time, there was a curious", "12 + 7 = 19\n30 + 45 = 75\n8 + 64 =", "Q: What colour is grass?\nA: Grass is green.\n\nQ: What colour is snow?\nA:"]


def chat_prompt(user, system=None):
    """The text that the chat template makes of one user turn."""
    head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{head}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


@torch.no_grad()
def answer(network, tokenizer, prompts, device, at_most=300):
    """Greedy continuations of all prompts at once: [(text, ended)]. Filling on the right cannot be seen by causal attention."""
    ends = {tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")}
    ids = [tokenizer.encode(p, add_special_tokens=False).ids for p in prompts]
    limits, ended = [len(i) + at_most for i in ids], [False] * len(ids)
    starts = [len(i) for i in ids]
    while open_rows := [r for r in range(len(ids)) if not ended[r] and len(ids[r]) < limits[r]]:
        width = -(-max(len(ids[r]) for r in open_rows) // 64) * 64
        batch = torch.tensor([ids[r] + [0] * (width - len(ids[r])) for r in open_rows], device=device)
        last = torch.tensor([len(ids[r]) - 1 for r in open_rows], device=device)
        chosen = network(batch)[torch.arange(len(open_rows), device=device), last].argmax(-1).tolist()
        for r, token in zip(open_rows, chosen):
            if token in ends:
                ended[r] = True
            else:
                ids[r].append(token)
    return [(tokenizer.decode(i[s:]), e) for i, s, e in zip(ids, starts, ended)]


def measure(network, tokenizer, seed, device, number=200):
    """Shares in percent, for the card."""
    rng = random.Random(f"{seed}/probe")

    def share(pairs, right, at_most=80):
        replies = answer(network, tokenizer, [chat_prompt(q) for q, *_ in pairs], device, at_most)
        return 100 * sum(ended and right(text, pair) for (text, ended), pair in zip(replies, pairs)) / len(pairs)

    def last_number(text):
        digits = "".join(c if c.isdigit() else " " for c in text).split()
        return digits[-1] if digits else None

    def same_json(text, pair):
        try:
            return json.loads(text) == json.loads(pair[1])
        except ValueError:
            return False

    def keys_of(text):
        try:
            return list(json.loads(text))
        except (ValueError, TypeError):
            return None

    return {
        "sums of number pairs never trained on": share(
            [arithmetic.sum_question(rng, held_out=True) for _ in range(number)], lambda t, p: last_number(t) == last_number(p[1])),
        "simple questions": share([questions.question(rng) for _ in range(number)], lambda t, p: t == p[1]),
        "JSON with given values": share([structured.json_given(rng) for _ in range(number)], same_json),
        "JSON extracted from a sentence": share([structured.json_extracted(rng) for _ in range(number)], same_json),
        "JSON with given keys, values invented": share(
            [structured.json_invented(rng) for _ in range(number)], lambda t, p: keys_of(t) == keys_of(p[1])),
        "stories that end by themselves": share([stories.request(rng) for _ in range(number // 4)], lambda t, p: len(t) > 200, 450),
    }


def show(network, tokenizer, device):
    """Prints greedy answers."""
    prompts = [chat_prompt(user, system) for system, user in SAMPLES] + COMPLETIONS
    names = [f"[{system[:40]}...] {user}" if system else user for system, user in SAMPLES] + COMPLETIONS
    for name, (text, ended) in zip(names, answer(network, tokenizer, prompts, device)):
        print(f"--- {name}\n{text}{'' if ended else ' ...'}")
