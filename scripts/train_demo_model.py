#!/usr/bin/env python3
"""Makes the demo model: writes its text, trains its tokenizer and its weights, measures it, saves it.

    python3 scripts/train_demo_model.py --out models/demo

Takes about eight minutes on one large GPU; `--device cpu --max-seconds 60` shows that it runs without one.
"""

import argparse
import importlib.util
import os
import pathlib
import sys
import time


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-seconds", type=float, default=460, help="the whole run up to the end of training")
    parser.add_argument("--max-tokens", type=float, default=2e9, help="ends training earlier")
    parser.add_argument("--batch", type=int, default=64, help="rows of 2048 tokens in a step")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="processes that write text")
    parser.add_argument("--device", default=None, help="cuda or cpu; default: cuda if there is one")
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    parser.add_argument("--probes", type=int, default=200, help="questions of each kind in the final measurement")
    return parser.parse_args()


def main():
    start = time.monotonic()
    args = arguments()
    missing = [name for name in ("torch", "numpy", "tokenizers", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"train_demo_model.py needs {', '.join(missing)}: python3 -m pip install {' '.join(missing)}")
    import torch

    from demo_model import card, network, probes, tokenizer, training
    from demo_model.plots import PLOTS

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")

    words = tokenizer.train(args.seed)
    tokenizer.save(words, args.out)
    print(f"tokenizer: {words.get_vocab_size()} entries, {time.monotonic() - start:.1f} s", flush=True)

    model = network.Qwen3(network.CONFIG).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"network: {parameters} parameters on {device}", flush=True)
    figures = training.train(
        model, words, seed=args.seed, workers=args.workers, batch=args.batch, start=start, max_seconds=args.max_seconds,
        max_tokens=args.max_tokens, device=device, compiled=device.type == "cuda" and not args.no_compile,
    )
    network.round_to_bfloat16(model)
    network.save(model, args.out)
    print(f"saved after {figures['steps']} steps, {figures['tokens']} tokens, {figures['seconds']:.0f} s of training", flush=True)

    torch.set_float32_matmul_precision("highest")
    held_out = training.held_out_loss(model, words, args.seed, device, rows=256 if device.type == "cuda" else 8)
    print(f"held-out loss: {held_out:.4f} nats per token", flush=True)
    shares = probes.measure(model, words, args.seed, device, args.probes)
    for name, value in shares.items():
        print(f"{name}: {value:.1f} %", flush=True)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    card.write(args.out, network.CONFIG, {
        "parameters": parameters / 1e6, "megabytes": (args.out / "model.safetensors").stat().st_size / 1e6, "seed": args.seed,
        "tokens": figures["tokens"] / 1e6, "fresh": figures["fresh_tokens"] / 1e6, "steps": figures["steps"], "batch": args.batch,
        "hardware": hardware, "seconds": figures["seconds"], "held_out": held_out, "plots": len(PLOTS),
    }, shares)
    probes.show(model, words, device)
    print(f"done: {args.out}, {time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
