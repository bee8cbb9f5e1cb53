#!/usr/bin/env python3
"""Where steps of a trace of kernels.c go.

    python3 benches/trace/steps.py TRACE [--rows N] [--last SECONDS] [--gaps MS]

A kernel's time here is what it adds: from the latest end of those before it, or its start if that is later, to its own end. Kernels start
early (programmatic dependent launch), so durations would count the same time twice. Steps begin with `prepare_rows`, whose grid is
the number of rows. The table has the kernels of decode steps of N rows (all, without --rows) by their place in a layer, which begins
with attention; the last layer's are apart, and have the head and the sampling behind them. --gaps lists when the GPU had
nothing to do for longer.
"""
import argparse
import collections


def read(path):
    kernels = []
    with open(path) as lines:
        for line in lines:
            parts = line.split(" ", 5)
            if len(parts) == 6 and line.endswith("\n"):
                kernels.append((int(parts[0]), int(parts[1]), int(parts[2]), parts[5].strip()))
    return sorted(kernels)


def steps_of(kernels):
    steps = []
    for kernel in kernels:
        if kernel[3].startswith("prepare_rows"):
            steps.append([])
        if steps:
            steps[-1].append(kernel)
    return steps


def places(step):
    """(place, kernel, what it adds) for each kernel of a step."""
    layers = sum("attention_decode" in name for *_, name in step)
    layer, place, end = 0, 0, step[0][0]
    for kernel in step:
        start, stop, _, name = kernel
        if "attention_decode" in name:
            layer, place = layer + 1, 0
        part = "before" if layer == 0 else "layer" if layer < layers else "last"
        yield (part, place), kernel, max(0, stop - max(start, end)), max(0, start - end)
        end, place = max(end, stop), place + 1


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("trace")
    p.add_argument("--rows", type=int)
    p.add_argument("--last", type=float, help="only what began in the last seconds")
    p.add_argument("--gaps", type=float, metavar="MS")
    args = p.parse_args()
    kernels = read(args.trace)
    begin, end = kernels[0][0], max(k[1] for k in kernels)
    if args.last:
        kernels = [k for k in kernels if k[0] >= end - args.last * 1e9]
    if args.gaps:
        latest = kernels[0]
        for kernel in kernels:
            if kernel[0] - latest[1] > args.gaps * 1e6:
                print(f"{(kernel[0] - begin) / 1e9:9.3f} s: {(kernel[0] - latest[1]) / 1e6:.2f} ms between {latest[3][:50]} and {kernel[3][:50]}")
            latest = max(latest, kernel, key=lambda k: k[1])
    chosen = [s for s in steps_of(kernels) if not any("prefill" in k[3] for k in s) and args.rows in (None, s[0][2])]
    if not chosen:
        raise SystemExit("no such decode step")
    adds, idle, whole = collections.OrderedDict(), 0, 0
    for step in chosen:
        for place, kernel, added, gap in places(step):
            entry = adds.setdefault((place, kernel[3][:48]), [0, 0])
            entry[0] += added
            entry[1] += 1
            idle += gap
        whole += max(k[1] for k in step) - step[0][0]
    count = len(chosen)
    print(f"{count} steps of {whole / count / 1e3:.1f} us, of which nothing ran for {idle / count / 1e3:.1f}")
    for ((part, _), name), (added, times) in adds.items():
        if times >= count * 0.3:
            print(f"{part:6} {added / count / 1e3:9.1f} us a step, {added / times / 1e3:7.2f} each of {times / count:4.1f}  {name}")


if __name__ == "__main__":
    main()
