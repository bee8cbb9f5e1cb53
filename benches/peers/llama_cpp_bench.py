#!/usr/bin/env python3
"""Measures llama.cpp (llama-cpp-python) as `nano-vllm-serve bench latency` measures us; prints one JSON object.

    python3 benches/peers/llama_cpp_bench.py --model /tmp/qwen3-0.6b/model.gguf --batch-size 8

Prefill: one forward over --input-len tokens. Decode: --output-len - 1 steps of --batch-size sequences, each
with a context of --input-len, the argmax of the logits fed back. Medians over --num-iters.
"""
import argparse
import ctypes
import json
import resource
import statistics
import time

import llama_cpp as L
import numpy as np


def age():
    """Seconds since this process was started (Linux)."""
    ticks = int(open("/proc/self/stat").read().rsplit(")", 1)[1].split()[19])
    return float(open("/proc/uptime").read().split()[0]) - ticks / 100


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--batch-size", type=int, default=1)
    p.add_argument("--input-len", type=int, default=128)
    p.add_argument("--output-len", type=int, default=65)
    p.add_argument("--num-iters", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()

    quiet = L.llama_log_callback(lambda *_: None)  # kept alive: the library holds a bare pointer to it
    L.llama_log_set(quiet, ctypes.c_void_p(0))
    L.llama_backend_init()
    model = L.llama_model_load_from_file(args.model.encode(), L.llama_model_default_params())
    cp = L.llama_context_default_params()
    cp.n_ctx = args.batch_size * (args.input_len + args.output_len + 8)
    cp.n_batch = cp.n_ubatch = max(512, args.batch_size)
    cp.n_seq_max = args.batch_size
    cp.n_threads = cp.n_threads_batch = args.threads
    cp.kv_unified = True
    ctx = L.llama_init_from_model(model, cp)
    vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
    batch = L.llama_batch_init(max(512, args.batch_size), 0, 1)
    rng = np.random.default_rng(0)

    def run(items):
        """items: (token, position, sequence, wants logits)"""
        batch.n_tokens = len(items)
        for i, (token, pos, seq, logits) in enumerate(items):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, pos, 1, logits
            batch.seq_id[i][0] = seq
        assert L.llama_decode(ctx, batch) == 0
        L.llama_synchronize(ctx)

    def argmax(i):
        return int(np.ctypeslib.as_array(L.llama_get_logits_ith(ctx, i), shape=(vocab,)).argmax())

    prefill, decode, first = [], [], None
    for _ in range(args.num_iters):
        L.llama_memory_clear(L.llama_get_memory(ctx), True)
        last = []
        for seq in range(args.batch_size):
            ids = rng.integers(0, vocab, args.input_len).tolist()
            start = time.perf_counter()
            for at in range(0, args.input_len, 512):
                part = ids[at:at + 512]
                run([(t, at + i, seq, at + i == args.input_len - 1) for i, t in enumerate(part)])
            last.append(argmax(len(part) - 1))
            first = first or age()
            prefill.append(args.input_len / (time.perf_counter() - start))
        start = time.perf_counter()
        for step in range(args.output_len - 1):
            run([(t, args.input_len + step, seq, True) for seq, t in enumerate(last)])
            last = [argmax(i) for i in range(args.batch_size)]
        if args.output_len > 1:
            decode.append(args.batch_size * (args.output_len - 1) / (time.perf_counter() - start))
    print(json.dumps({
        "prefill_tokens_per_s": statistics.median(prefill),
        "decode_tokens_per_s": statistics.median(decode) if decode else None,
        "start_to_first_token_s": first,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }))


if __name__ == "__main__":
    main()
