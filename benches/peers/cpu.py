#!/usr/bin/env python3
"""nano-vllm beside llama.cpp on the CPU, in one run: alternates the two engines, prints medians.

    pip install numpy torch safetensors gguf
    CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36
    cargo build --release
    for d in float32 bfloat16; do python3 benches/peers/make_random_model.py --out /tmp/qwen3-0.6b-$d --dtype $d; done
    python3 benches/peers/cpu.py --model float32=/tmp/qwen3-0.6b-float32 --model bfloat16=/tmp/qwen3-0.6b-bfloat16

Per engine and weight type: prefill of 512 tokens; decoding 64 tokens after a context of 128, one sequence and
eight; the time from a process's start to its first token after a prompt of 128, and that of the whole process
(weights in the page cache); peak resident memory of the eight-sequence run.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))


def ours(binary, model, batch, n_in, n_out, iters):
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        cmd = [binary, "bench", "latency", "--cpu", "--model", model, "--batch-size", batch, "--input-len", n_in,
               "--output-len", n_out, "--num-iters-warmup", 0, "--num-iters", iters, "--temperature", 0,
               "--no-enable-prefix-caching", "--kv-cache-memory-bytes", "512M", "--max-model-len", 2048,
               "--max-num-batched-tokens", 2048, "--output-json", out.name]
        subprocess.run([str(c) for c in cmd], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return json.load(open(out.name))


def llama_cpp(_, model, batch, n_in, n_out, iters):
    cmd = [sys.executable, os.path.join(HERE, "llama_cpp_bench.py"), "--model", os.path.join(model, "model.gguf"),
           "--batch-size", batch, "--input-len", n_in, "--output-len", n_out, "--num-iters", iters]
    return json.loads(subprocess.run([str(c) for c in cmd], check=True, capture_output=True, text=True).stdout)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER")
    p.add_argument("--binary", default=os.path.join(HERE, "../../target/release/nano-vllm-serve"))
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--only-ours", action="store_true")
    args = p.parse_args()
    engines = {"nano-vllm": ours} if args.only_ours else {"nano-vllm": ours, "llama.cpp": llama_cpp}
    for spec in args.model:
        name, folder = spec.split("=", 1)
        rows = {}
        for _ in range(args.rounds):
            for engine, run in engines.items():
                row = rows.setdefault(engine, {})
                add = lambda key, value: row.setdefault(key, []).append(value)
                add("prefill 512, tok/s", run(args.binary, folder, 1, 512, 1, 1)["prefill_tokens_per_s"])
                add("decode 1 seq, tok/s", run(args.binary, folder, 1, 128, 65, 1)["decode_tokens_per_s"])
                eight = run(args.binary, folder, 8, 128, 65, 1)
                add("decode 8 seq, tok/s", eight["decode_tokens_per_s"])
                add("peak RSS, MiB", eight["peak_rss_mib"])
                start = time.perf_counter()
                one = run(args.binary, folder, 1, 128, 1, 1)
                add("process, 1 token after 128, s", time.perf_counter() - start)
                add("start to that token, s", one["start_to_first_token_s"])
        print(f"\n| {name} weights | " + " | ".join(rows) + " |")
        print("|---" * (len(rows) + 1) + "|")
        for key in rows["nano-vllm"]:
            cells = [f"{statistics.median(r[key]):.4g} ({min(r[key]):.4g}–{max(r[key]):.4g})" for r in rows.values()]
            print(f"| {key} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
