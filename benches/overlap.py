"""Do a prompt's products and decode steps at the same time take less than one after the other?

    python3 benches/overlap.py

Needs a GPU with 16 GB to spare and PyTorch. Eight layers of 8B's dimensions as CUDA graphs: the products of 8,192 prompt
tokens, and those of 256 sequences with a read of as many bytes as the keys and values of 576 tokens of each; as many of the
latter as a served loop of 512 tokens in and 128 out has for one of the former. `serial` is one after the other, `both` puts
them on two streams, decoding with the higher priority. Each line: milliseconds of one prompt step with its decode steps (of
one of the two alone, twice as many ran), mean power and clock.
"""

import subprocess
import threading
import time

import torch
from torch.nn.functional import linear, silu

LAYERS, WIDTH, ROUNDS = 8, 14336, 30
KV_BYTES = 256 * 576 * 8 * 128 * 2 * 2
readings = []


def random(rows, columns):
    return torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * columns**-0.5


def layer(x, weights):
    o, gate_up, down, qkv = weights
    both = linear(linear(x, o), gate_up)
    linear(linear(silu(both[:, :WIDTH]) * both[:, WIDTH:], down), qkv)


def capture(work, stream):
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()

    def replay(count):
        with torch.cuda.stream(stream):
            for _ in range(count):
                graph.replay()

    return replay


def seconds(work):
    torch.cuda.synchronize()
    start = time.time()
    work()
    torch.cuda.synchronize()
    return time.time() - start


def read_power():
    query = ["nvidia-smi", "--query-gpu=power.draw.instant,clocks.sm", "--format=csv,noheader,nounits", "-lms", "100"]
    for line in subprocess.Popen(query, stdout=subprocess.PIPE, text=True).stdout:
        readings.append((time.time(), *map(float, line.split(","))))


def main():
    shapes = [(4096, 4096), (2 * WIDTH, 4096), (4096, WIDTH), (6144, 4096)]
    weights = [[random(*shape) for shape in shapes] for _ in range(LAYERS)]
    caches = [torch.randn(KV_BYTES // 4, device="cuda") for _ in range(LAYERS)]
    prompt, rows = random(8192, 4096), random(256, 4096)

    def prefill_step():
        for w in weights:
            layer(prompt, w)

    def decode_step():
        for w, cache in zip(weights, caches):
            layer(rows, w)
            cache.amax()

    prefill = capture(prefill_step, torch.cuda.Stream())
    decode = capture(decode_step, torch.cuda.Stream(priority=-5))
    alone = [min(seconds(lambda: f(n)) / n for _ in range(3)) for f, n in [(prefill, 20), (decode, 100)]]
    each = max(1, round(0.6 * alone[0] / alone[1]))
    print(f"alone: prompt {alone[0] * 1e3:.2f} ms, decode {alone[1] * 1e3:.3f} ms; {each} decode steps for each prompt")

    def serial():
        for _ in range(ROUNDS):
            prefill(1)
            torch.cuda.synchronize()
            decode(each)
            torch.cuda.synchronize()

    def both():
        decode(each * ROUNDS)
        prefill(ROUNDS)

    threading.Thread(target=read_power, daemon=True).start()
    ways = {
        "serial": serial,
        "both": both,
        "prompts": lambda: prefill(2 * ROUNDS),
        "decode": lambda: decode(2 * each * ROUNDS),
    }
    for name, work in [*ways.items()] * 3:
        taken = seconds(work)
        end = time.time()
        seen = [r[1:] for r in readings if end - taken + 0.3 < r[0] < end] or [(float("nan"),) * 2]
        power, clock = (sum(r[i] for r in seen) / len(seen) for i in range(2))
        print(f"{name:8} {taken / ROUNDS * 1e3:.2f} ms, {power:.0f} W, {clock:.0f} MHz", flush=True)


if __name__ == "__main__":
    main()
