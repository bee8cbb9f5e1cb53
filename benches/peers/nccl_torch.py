"""PyTorch's own NCCL: AllReduce and AllGather by size, launched one by one and in CUDA graphs.

    torchrun --standalone --nproc-per-node=2 benches/peers/nccl_torch.py --output-json nccl_torch.json

Measured as `nano-vllm-serve bench collective` measures: bfloat16; CUDA events around a replay of a
graph of 3 to 50 exchanges (or around as many launches), with another replay before it that brings
all ranks to the same point; the median. Bus bandwidth as nccl-tests count it.
"""

import argparse
import json
import os
import statistics

import torch
import torch.distributed as dist


def time_of(run, repeats, samples):
    """Seconds of a `repeats`-th of `run`: the median."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    warmup, times = -(-samples // 10), []
    for turn in range(warmup + samples):
        dist.barrier()
        torch.cuda.synchronize()
        run()
        start.record()
        run()
        end.record()
        end.synchronize()
        if turn >= warmup:
            times.append(start.elapsed_time(end) / 1e3 / repeats)
    return statistics.median(times)


def measure(op, repeats, samples):
    """The median by way of launching."""
    for _ in range(3):
        op()
    torch.cuda.synchronize()
    found = {"torch eager": time_of(lambda: [op() for _ in range(repeats)], repeats, samples)}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            op()
    found["torch graph"] = time_of(graph.replay, repeats, samples)
    torch.cuda.synchronize()
    del graph
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--min-bytes", type=int, default=4 << 10)
    parser.add_argument("--max-bytes", type=int, default=256 << 20)
    parser.add_argument("--num-iters", type=int, default=30)
    parser.add_argument("--output-json")
    args = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    gather_share = (ranks - 1) / ranks
    report = {"ranks": ranks, "torch": torch.__version__, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    if rank == 0:
        print(f"{ranks} GPUs, PyTorch {report['torch']}, NCCL {report['nccl']}, bfloat16")
    for name, share in [("all_reduce", 2 * gather_share), ("all_gather", gather_share)]:
        lines, size = [], args.min_bytes
        if rank == 0:
            print(f"{name}\n{'bytes':>11}{'eager us':>12}{'GB/s':>9}{'graph us':>12}{'GB/s':>9}")
        while size <= args.max_bytes:
            repeats = 50 if size <= 1 << 20 else 10 if size <= 16 << 20 else 3
            if name == "all_reduce":
                message = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
                figures = measure(lambda: dist.all_reduce(message), repeats, args.num_iters)
            else:
                part = torch.zeros(size // 2 // ranks, dtype=torch.bfloat16, device=device)
                whole = torch.zeros(part.numel() * ranks, dtype=torch.bfloat16, device=device)
                gather = lambda: dist.all_gather_into_tensor(whole, part)
                figures = measure(gather, repeats, args.num_iters)
            text = f"{size:>11}"
            for how, seconds in figures.items():
                bus = size * share / seconds / 1e9
                text += f"{seconds * 1e6:>12.1f}{bus:>9.1f}"
                lines.append({"bytes": size, "how": how, "median_s": seconds, "busbw_gb_per_s": bus})
            if rank == 0:
                print(text, flush=True)
            size *= 4
        report[name] = lines
    if rank == 0 and args.output_json:
        with open(args.output_json, "w") as file:
            json.dump(report, file, indent=2)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
