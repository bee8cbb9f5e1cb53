#!/usr/bin/env python3
"""Runs the same requests on a GPU in every way there is, and compares the tokens.

    python3 scripts/check_gpu.py --binary target/release/nano-vllm-serve

The built-in demo model answers greedy and seeded requests of 3 to 700 tokens, first on the CPU, then on the GPU:
as it comes, without overlap, without graphs, in chunks, in filled steps, without the prefix cache, three sequences at a time (the answers to one prompt), and with a cache
so small that requests are preempted. With --deterministic all GPU runs must agree to the last token; without, and against the CPU,
a request may differ from the first place on where two tokens were as good as equal: the script prints how far apart they were.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile

# Nats. Logits of 16 to 32 are multiples of 1/8 in bfloat16: two roundings apart is as good as equal.
TIE = 0.25
WORDS = "the a rabbit kitten river moon garden friend was happy ran home and then said little big lost found".split()
ASK = ["Tell me a story about a brave mouse.", "What is 12 + 30?", "What is 7 + 5?", "Name three animals as JSON.",
       "Where does the sun rise?", "Tell me a story about a race with a rabbit.", "What colour is the sky?"]


def requests(count):
    rng = random.Random(7)
    shared = " ".join(rng.choice(WORDS) for _ in range(150))
    for i in range(count):
        if i % 2 == 0:
            body = {"messages": [{"role": "user", "content": ASK[i // 2 % len(ASK)] + " " * (i // 14)}]}
            url = "/v1/chat/completions"
        else:
            words = " ".join(rng.choice(WORDS) for _ in range(rng.choice([1, 5, 40, 200, 380])))
            body = {"prompt": (shared + " " if i % 3 == 0 else "") + words}
            url = "/v1/completions"
        body |= {"model": "nano-vllm-demo", "max_tokens": 80, "temperature": 0.0, "return_token_ids": True}
        if i % 4 == 3:
            # Three answers share the prompt's blocks, and each gets a copy of the last one.
            body |= {"temperature": 0.8, "top_p": 0.9, "seed": i, "n": 3}
        logprobs = {"logprobs": True, "top_logprobs": 2} if "messages" in body else {"logprobs": 2}
        yield {"custom_id": str(i), "method": "POST", "url": url, "body": body | logprobs}


def run(binary, lines, flags):
    with tempfile.TemporaryDirectory() as folder:
        source, target = os.path.join(folder, "in.jsonl"), os.path.join(folder, "out.jsonl")
        with open(source, "w") as f:
            f.writelines(json.dumps(line) + "\n" for line in lines)
        cmd = [binary, "run-batch", "-i", source, "-o", target, "--max-model-len", "1024"] + flags
        done = subprocess.run(cmd, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(cmd)}\n{done.stderr[-2000:]}")
        answers = {}
        for line in open(target):
            answer = json.loads(line)
            for choice in answer["response"]["body"]["choices"]:
                answers[answer["custom_id"], choice["index"]] = choice
        return answers


def gap(choice, at):
    """How much likelier the best token was than the second, at a place of the answer (nats)."""
    logprobs = choice["logprobs"]
    if "content" in logprobs:
        top = [t["logprob"] for t in logprobs["content"][at]["top_logprobs"]]
    else:
        top = list(logprobs["top_logprobs"][at].values())
    top.sort(reverse=True)
    return top[0] - top[1] if len(top) > 1 else float("inf")


def compare(name, want, got, exact):
    bad, apart = 0, []
    for key, choice in want.items():
        a, b = choice["token_ids"], got[key]["token_ids"]
        if a == b:
            continue
        at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        apart.append((key, at, gap(choice, at) if at < len(a) else float("nan")))
    greedy = [d for d in apart if int(d[0][0]) % 4 != 3]
    if exact:
        bad = len(apart)
    else:
        bad = sum(d[2] > TIE for d in greedy)
    print(f"{name}: {len(want) - len(apart)}/{len(want)} equal" + (f"; {'DIFFERENT' if bad else 'ties'}: " + ", ".join(
        f"#{k[0]}.{k[1]} at {at} (gap {g:.3f})" for k, at, g in apart[:6]) if apart else ""), flush=True)
    return bad


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--binary", default="target/release/nano-vllm-serve")
    p.add_argument("--count", type=int, default=56)
    args = p.parse_args()
    lines = list(requests(args.count))
    cuda = ["--device", "cuda"]
    ways = {
        "as it comes": [],
        "no overlap": ["--no-overlap"],
        "no graphs": ["--enforce-eager"],
        "chunks of 64": ["--max-num-batched-tokens", "64", "--max-num-seqs", "16"],
        "steps of 16": ["--mixed-step-tokens", "16"],
        "no prefix cache": ["--no-enable-prefix-caching"],
        "three at a time": ["--max-num-seqs", "3"],
        "blocks of 32": ["--block-size", "32"],
        "preemption": ["--num-gpu-blocks-override", "80", "--max-num-seqs", "24"],
    }
    bad = 0
    cpu = run(args.binary, lines, ["--cpu", "--threads", "8"])
    plain = run(args.binary, lines, cuda)
    bad += compare("GPU against CPU", cpu, plain, exact=False)
    for name, flags in list(ways.items())[1:]:
        bad += compare(name, plain, run(args.binary, lines, cuda + flags), exact=False)
    same = run(args.binary, lines, cuda + ["--deterministic"])
    bad += compare("deterministic against CPU", cpu, same, exact=False)
    for name, flags in list(ways.items())[1:]:
        got = run(args.binary, lines, cuda + ["--deterministic"] + flags)
        bad += compare(f"deterministic, {name}", same, got, exact=True)
    sys.exit(f"{bad} answers differ" if bad else 0)


if __name__ == "__main__":
    main()
