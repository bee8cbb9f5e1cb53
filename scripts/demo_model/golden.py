#!/usr/bin/env python3
"""What `transformers` answers for the demo model, stored for the engine's tests.

    python3 scripts/demo_model/golden.py models/demo crates/tp-model/tests/fixtures/demo/golden.json

Float32 on the CPU, greedy, with the versions of scripts/requirements-fixtures.txt plus jinja2. Per case:

    name        what it shows
    text        the prompt after the chat template
    prompt      its token ids
    greedy      the continuation: up to 200 ids; ends with an end token if one was chosen
    finished    whether it ends so
    min_margin  least distance of the two best logits over all steps
    top         [{step, ids, logits}]: the five best at the first step and at the last eight; step 0 is
                the last position of the prompt, so `ids[0]` equals `greedy[step]`
"""

import json
import pathlib
import random
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from demo_model import chat, stories  # noqa: E402

AT_MOST, TOP, LAST, LONG = 200, 5, 8, 700
# Float32 sums in another order move a logit by about 1e-5: with this distance no token can flip.
MIN_MARGIN = 2e-3

_SHARED = chat.SYSTEM_PROMPT
CASES = [
    ("story", None, "Tell me a story about a brave rabbit named Clover."),
    ("story about courage", None, "Tell me a story about being brave."),
    ("story about a race", None, "Write me a story about a race with a turtle."),
    ("story about sharing", None, "Can you tell me a story about sharing?"),
    ("story about a garden", None, "Please tell me a short story about a garden."),
    ("bedtime story", None, "Tell me a bedtime story about a bear."),
    ("list", None, "List the months of the year as a numbered list."),
    ("poem", None, "Write a short poem about the moon."),
    ("sum", None, "What is 47 + 38?"),
    ("json", None, "Extract name, age and city as JSON: Sofia is 34 years old and lives in Lisbon."),
    ("bytes beyond ASCII", None, "How do you say \"boy\" in French?"),
    ("emoji", None, "Show me the cat emoji."),
    ("shared system prompt", _SHARED, "What is paged attention?"),
    ("shared system prompt, other question", _SHARED, "What is continuous batching?"),
    ("shared system prompt, story", _SHARED, "Tell me a story about Tilly the mouse and Max the boy."),
]
PLAIN = [
    ("completion", "Long ago, there was a shy owl named"),
    ("few-shot", "Q: What colour is grass?\nA: Grass is green.\n\nQ: What colour is snow?\nA: Snow is white.\n\nQ: What is the opposite of hot?\nA:"),
]


@torch.no_grad()
def greedy(model, prompt, ends):
    """(ids, logits [steps, vocabulary])"""
    cache, ids, rows, given = DynamicCache(config=model.config), [], [], torch.tensor([prompt])
    while len(ids) < AT_MOST and not (ids and ids[-1] in ends):
        row = model(given, past_key_values=cache, use_cache=True).logits[0, -1]
        ids.append(int(row.argmax()))
        rows.append(row)
        given = torch.tensor([[ids[-1]]])
    return ids, torch.stack(rows)


@torch.no_grad()
def case(model, ends, name, text, prompt):
    """One entry; None if two logits come too close to each other."""
    ids, logits = greedy(model, prompt, ends)
    best = logits.topk(2, dim=-1).values
    margin = (best[:, 0] - best[:, 1]).min().item()
    if margin < MIN_MARGIN:
        print(f"{name}: a margin of {margin:.1e} only, left out", file=sys.stderr)
        return None
    whole = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    assert (whole - logits).abs().max() < 1e-3, f"{name}: with and without cache differ"
    steps = sorted({0, *range(max(0, len(ids) - LAST), len(ids))})
    top = [{"step": s, "ids": logits[s].topk(TOP).indices.tolist(), "logits": [round(v, 5) for v in logits[s].topk(TOP).values.tolist()]}
           for s in steps]
    return {"name": name, "text": text, "prompt": prompt, "greedy": ids, "finished": ids[-1] in ends,
            "min_margin": round(margin, 5), "top": top}


def long_chats(tokenizer):
    """Chats of exactly LONG tokens that end with the request for a story."""
    rng = random.Random(7)
    while True:
        messages = []
        for _ in range(rng.randint(8, 20)):
            user, reply = chat.turn(rng)
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
        messages.append({"role": "user", "content": stories.request(rng)[0]})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) == LONG:
            yield text, ids


def main():
    folder, out = map(pathlib.Path, sys.argv[1:3])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ends = set(json.loads((folder / "generation_config.json").read_text())["eos_token_id"])
    prompts = [(name, tokenizer.apply_chat_template(
        ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": user}],
        tokenize=False, add_generation_prompt=True)) for name, system, user in CASES] + PLAIN
    cases = [case(model, ends, name, text, tokenizer(text, add_special_tokens=False).input_ids) for name, text in prompts]
    for text, ids in long_chats(tokenizer):
        entry = case(model, ends, f"chat of {LONG} tokens", text, ids)
        if entry and len(entry["greedy"]) >= 64:
            cases.append(entry)
            break
    cases = [c for c in cases if c]
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0], "dtype": "float32", "attention": "eager"}
    out.write_text(json.dumps({**about, "cases": cases}, ensure_ascii=False, separators=(",", ":")) + "\n")
    for c in cases:
        print(f"{c['name']}: {len(c['prompt'])} + {len(c['greedy'])} tokens, finished {c['finished']}, margin {c['min_margin']}")
        print(f"    {tokenizer.decode(c['greedy'])!r}")


if __name__ == "__main__":
    main()
