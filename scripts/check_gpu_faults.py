#!/usr/bin/env python3
"""Checks on a GPU that what goes wrong with one request, or with memory, costs no other request.

    python3 scripts/check_gpu_faults.py --binary target/release/nano-vllm-serve

NaN: the embedding of one token is NaN, and one of eight requests has that token. It must get an error that says so, and the
others the tokens that they get without it (--deterministic, since the batch is another one).
Memory: while a server is ready, another process takes the memory that is left on the GPU but for LEFT. Prompts whose steps no
longer fit must be answered in smaller ones, and the server must say so.
Needs PyTorch and transformers (scripts/requirements-fixtures.txt).
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from check_transformers import make, run_batch, tokens_of

BROKEN = 7
LEFT = 300 << 20
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "hidden_act": "silu",
}


def nan(binary):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make("llama", folder, "float16", "cpu")
        weights = load_file(folder / "model.safetensors")
        weights["model.embed_tokens.weight"][BROKEN] = float("nan")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        generator = torch.Generator().manual_seed(2)
        prompts = torch.randint(BROKEN + 1, 1000, (8, 50), generator=generator).tolist()
        flags = ["--device", "cuda", "--dtype", "float16", "--deterministic"]
        want, _ = run_batch(binary, folder, prompts, flags, 40)
        prompts[3][20] = BROKEN
        got, _ = run_batch(binary, folder, prompts, flags, 40)
    others = [i for i in range(8) if i != 3]
    same = sum(tokens_of(got[i]) == tokens_of(want[i]) and len(tokens_of(got[i])) == 40 for i in others)
    error = json.dumps(got[3])
    says = re.search(r"the logit of token \d+ is NaN or \+inf[^\"]*", error)
    print(f"NaN: {same} of 7 others have the same 40 tokens; the broken one: {says.group(0) if says else error[:300]}")
    return same == 7 and says is not None


def memory(binary):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "config.json").write_text(json.dumps(QWEN3))
        log = (folder / "log").open("w+")
        server = subprocess.Popen(
            [binary, "serve", "--model", folder, "--load-format", "dummy", "--skip-tokenizer-init", "--device", "cuda", "--port",
             "8199", "--max-model-len", "8192", "--max-num-batched-tokens", "16384", "--gpu-memory-utilization", "0.3"],
            stdout=log, stderr=log)
        base = "http://127.0.0.1:8199"
        for _ in range(600):
            try:
                urllib.request.urlopen(base + "/ready", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        # All but what is given back then, down to pieces of 16 MiB.
        rest = torch.empty(LEFT, dtype=torch.uint8, device="cuda")
        held, size = [], 1 << 36
        while size >= 1 << 24:
            try:
                held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                size //= 2
        del rest
        torch.cuda.empty_cache()
        left = torch.cuda.mem_get_info()[0]
        answers = []

        def ask(i):
            body = {"model": str(folder), "prompt": [i + 1] * 4000, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            request = urllib.request.Request(base + "/v1/completions", json.dumps(body).encode(),
                                             {"content-type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    answers.append(json.load(response)["usage"]["completion_tokens"])
            except OSError as error:
                answers.append(getattr(error, "read", lambda: repr(error))())

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        alive = server.poll() is None
        server.terminate()
        server.wait(30)
        log.seek(0)
        said = [line for line in log.read().splitlines() if "memory" in line.lower()]
        del held
    good = answers.count(8)
    print(f"Memory: {left >> 20} MiB left; {good} of 16 prompts of 4,000 tokens answered, the server {'lives' if alive else 'DIED'}")
    print("\n".join(said[-6:]), *[a for a in answers if a != 8][:2])
    return good == 16 and alive and any("out of memory" in line for line in said)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/release/nano-vllm-serve")
    binary = parser.parse_args().binary
    results = [nan(binary), memory(binary)]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
