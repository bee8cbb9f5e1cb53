"""The model card, written with the figures of the run that made the checkpoint."""

CARD = """---
license: other
license_name: mit-or-apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# nano-vllm demo model

A real language model that is small enough to be embedded in a program: {parameters:.2f} million parameters, Qwen3
architecture, {megabytes:.1f} MB in bfloat16. It shows how nano-vllm serves a model, and tests run on it. It writes short
stories, answers simple questions, does small sums, writes lists and JSON, and explains nano-vllm in a few sentences.

| | |
|---|---|
| architecture | `Qwen3ForCausalLM`: {num_hidden_layers} layers, hidden {hidden_size}, {num_attention_heads} heads of {head_dim}, {num_key_value_heads} KV heads, intermediate {intermediate_size}, tied embeddings |
| context | {max_position_embeddings} tokens, rope theta {rope_theta:.0f} |
| tokenizer | byte-level BPE, {vocab_size} entries, digits one by one, ChatML template |
| end of answer | `<|im_end|>`; end of plain text `<|endoftext|>` |

128 divides every matrix dimension, so the checkpoint can also be sharded in two and quantized in groups of 128.

## How it was made

`python3 scripts/train_demo_model.py --out models/demo` makes it again. Nothing is downloaded: all text comes from the
templates and tables in `scripts/demo_model/`, drawn with seed {seed}. The text is the same for the same seed; the
weights differ a little from run to run, because training is boxed by time and not by steps.

| documents | share |
|---|---|
| chats of one turn | 46 % |
| chats of 2 to 6 turns, and some of up to 24 | 17 % |
| chats in which the system prompt sets a style (pirate, one word, JSON only, ...) | 7 % |
| chats in which the user's own facts or the last answer matter | 10 % |
| stories as plain text | 14 % |
| few-shot questions and equations as plain text | 6 % |

| | |
|---|---|
| tokens | {tokens:.0f} million, {fresh:.0f} million of them freshly written, the rest rows seen again |
| steps | {steps}, {batch} rows of 2048 tokens each, documents packed whole |
| optimizer | AdamW (0.9, 0.95), weight decay 0.1, rate 3e-3, warm-up 100 steps, straight to zero over the last half |
| hardware and time | {hardware}, {seconds:.0f} s of training |

## Figures

Of this checkpoint, after rounding to bfloat16. The held-out text is drawn from the same templates with another random
stream, so a short question in it may also occur in training; a story practically never does.

| | |
|---|---|
| held-out loss | {held_out:.4f} nats per token |
{shares}

Greedy answers, 200 of each kind (50 stories), that also end by themselves. A simple question counts if the answer equals
one expected sentence, although some have several good ones. One in twenty pairs of numbers was kept out of all sums and
differences in training, in both orders; the sums are asked on those.

## Limits

It knows what its templates know and nothing else. Outside of that it says that it does not know, or it is wrong: numbers of
three digits, numbers written as words, and names that it has never seen often come out wrong. Greedy stories resemble each
other, and a grandmother may become a grandfather halfway; the sampling settings vary them. Stories follow {plots} plots. It is a demonstration and a test object, not a source of facts.

## Licence

MIT OR Apache-2.0, like nano-vllm, at your choice: the text, the scripts and the weights.
"""


def write(folder, config, figures, shares):
    """README.md in `folder`."""
    lines = "\n".join(f"| {name} | {value:.1f} % |" for name, value in shares.items())
    (folder / "README.md").write_text(CARD.format(**config, **figures, shares=lines))
