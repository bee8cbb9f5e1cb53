#!/usr/bin/env python3
"""Compares greedy tokens after prompts of 1,000 tokens with `transformers`.

    python3 scripts/check_transformers.py --binary target/release/nano-vllm-serve [--device cuda]

Makes small random checkpoints of three architectures (Llama 3 with its scaled rotation, Qwen 3 with norms of heads, Mistral
with a sliding window), lets the program answer, and asks transformers, on the same device and in the same dtype, what it
would say at each place of those answers. A token that is not transformers' own must be as good as its: in float32, its
logit may be below the largest by no more than rounding explains. Transformers' logits of the dtype are off from those of
float32 by some root mean square at that place; the difference of two logits of two programs by twice that; LIMIT allows three
times as much. That the comparison sees differences is checked, too: of the same answers behind prompts that lack their first
half, many must be wrong.
Needs PyTorch and transformers (scripts/requirements-fixtures.txt).
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

PROMPTS, LENGTH, ANSWER, VOCAB = 8, 1000, 48, 1000
LIMIT = 3 * 2
DTYPES = ["float16", "bfloat16", "float32"]
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "initializer_range": 0.12,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 512, "rope_theta": 500000.0}
MODELS = {
    "llama": (transformers.LlamaConfig, {"rope_parameters": LLAMA3, "head_dim": 64}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 128}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 300, "head_dim": 64}),
}


def make(name, folder, dtype, device):
    kind, more = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**SIZES, **more), dtype=torch.float32)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    # Read anew: `to` has also rounded the frequencies of the rotation.
    def read(dtype):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return loaded.to(device).eval()

    return read(getattr(torch, dtype)), read(torch.float32)


def run_batch(binary, folder, prompts, flags, max_tokens):
    """Greedy answers to prompts of token ids, as lines of the batch's output in the order of the prompts, and how it went."""
    body = {"model": str(folder), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    lines = [{"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body | {"prompt": prompt}}
             for i, prompt in enumerate(prompts)]
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [binary, "run-batch", "-i", source, "-o", target, "--model", folder, "--skip-tokenizer-init"]
    done = subprocess.run(command + flags, capture_output=True, text=True)
    answers = [json.loads(line) for line in target.read_text().splitlines()] if target.exists() else []
    return sorted(answers, key=lambda answer: int(answer["custom_id"])), done


def tokens_of(answer):
    return answer["response"]["body"]["choices"][0]["token_ids"]


@torch.no_grad()
def judge(models, prompts, given):
    """Of all tokens: how many transformers would have given, how many were as good, how many neither; and the largest
    distance from the best token, of what is allowed."""
    counts, worst = [0, 0, 0], 0.0
    for prompt, answer in zip(prompts, given):
        ids = torch.tensor([prompt + answer], device=models[0].device)
        own, exact = (model(ids).logits[0, len(prompt) - 1 : -1].double() for model in models)
        tokens = torch.tensor(answer, device=ids.device).unsqueeze(1)
        off = (own - exact).square().mean(-1).sqrt() + 1e-6
        gaps = (exact.amax(-1) - exact.gather(1, tokens).squeeze(1)) / (LIMIT * off)
        for same, gap in zip((own.argmax(-1) == tokens.squeeze(1)).tolist(), gaps.tolist()):
            counts[0 if same else 1 if gap <= 1 else 2] += 1
            worst = worst if same else max(worst, gap)
    return counts, worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/release/nano-vllm-serve")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"], choices=DTYPES)
    args = parser.parse_args()
    failed = False
    for name in MODELS:
        for dtype in args.dtypes:
            with tempfile.TemporaryDirectory() as folder:
                folder = Path(folder)
                models = make(name, folder, dtype, args.device)
                generator = torch.Generator().manual_seed(1)
                prompts = torch.randint(0, VOCAB, (PROMPTS, LENGTH), generator=generator).tolist()
                flags = ["--device", args.device, "--dtype", dtype]
                answers, done = run_batch(args.binary, folder, prompts, flags, ANSWER)
                if done.returncode:
                    sys.exit(f"{done.args}\n{done.stderr[-2000:]}")
                given = [tokens_of(answer) for answer in answers]
                (same, tied, wrong), worst = judge(models, prompts, given)
                halves = [prompt[LENGTH // 2 :] for prompt in prompts]
                (_, _, control), _ = judge(models, halves, given)
                sound = {len(answer) for answer in given} == {ANSWER} and wrong == 0
                # A window of 300 over four layers sees little of what is half a prompt away.
                sees = control > PROMPTS * ANSWER // (20 if name == "mistral" else 2)
                failed |= not (sound and sees)
                print(f"{name} {dtype}: {same} of {same + tied + wrong} tokens are transformers' own, {tied} as good, {wrong} wrong "
                      f"(at most {worst:.2f} of what is allowed); behind half of the prompts {control} are wrong"
                      f"{'' if sound and sees else '  FAILED'}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
