#!/usr/bin/env python3
"""vLLM's own scheduler and KV-cache manager (Python, no model) beside ours, in one run.

    cargo build --release -p batch-scheduler --example core_rows
    python3 benches/peers/vllm_core.py --ours <target dir>/release/examples/core_rows [--rounds 3]

Needs torch, numpy and transformers (of any backend) and vLLM 0.23 without its dependencies
(`pip install --no-deps vllm==0.23.0`); then what it says is missing. Grammar libraries that the
core does not call are replaced by empty modules, whose names are printed. Prints one row for each operation, as in `core_rows.rs`: median
and least, in microseconds, of vLLM (CPU time of the process, so that other work on the machine counts
little) and of ours (wall clock), and their ratios. Both sides alternate, round by round.

The fake model says 11 to everyone; its part is not timed. A row of decoding is the mean of 16 steps
(`schedule` and `update_from_output`); prompts of 64 tokens, blocks of 16, prefix caching on, sha256 as by
default. Admission has a budget of 8,192 tokens a step, and includes adding the requests (hashing).
"""

import argparse
import gc
import importlib.abc
import importlib.machinery
import statistics
import subprocess
import sys
import time
import types
from unittest.mock import MagicMock

# What vLLM imports on the way and its core does not call here. Everything else must be installed.
UNUSED = {"xgrammar", "llguidance", "openai_harmony", "outlines_core", "lmformatenforcer"}
stubbed = set()


class Stub(types.ModuleType):
    """A module in which every name is there and does nothing."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Last on the path: makes up what is not installed."""

    def find_spec(self, fullname, path=None, target=None):
        root = fullname.split(".")[0]
        if root not in UNUSED:
            return None
        stubbed.add(root)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        pass


def load():
    """vLLM's classes."""
    sys.meta_path.append(Stubs())
    from vllm.config import CacheConfig, SchedulerConfig
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    return types.SimpleNamespace(**locals())


def kv_config(v, blocks):
    import torch

    spec = v.FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=1, dtype=torch.float32)
    return v.KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[v.KVCacheGroupSpec(["layer"], spec)],
    )


def scheduler(v, seqs, tokens, max_batched):
    blocks = seqs * -(-tokens // 16) + 1
    cache = v.CacheConfig(block_size=16, enable_prefix_caching=True)
    cache.num_gpu_blocks = blocks
    config = v.SchedulerConfig(
        max_num_seqs=seqs,
        max_num_batched_tokens=max_batched,
        max_model_len=4096,
        enable_chunked_prefill=True,
        is_encoder_decoder=False,
    )
    none = dict.fromkeys(
        "lora_config kv_events_config kv_transfer_config ec_transfer_config speculative_config".split()
    )
    model = types.SimpleNamespace(
        is_encoder_decoder=False, max_model_len=4096, is_multimodal_model=False,
        enable_return_routed_experts=False, is_hybrid=False, runner_type="generate",
    )
    parallel = types.SimpleNamespace(
        data_parallel_index=0, data_parallel_rank=0, pipeline_parallel_size=1, world_size=1,
        decode_context_parallel_size=1, prefill_context_parallel_size=1,
    )
    observe = types.SimpleNamespace(
        kv_cache_metrics=False, enable_mfu_metrics=False, cudagraph_metrics=False,
    )
    vllm_config = types.SimpleNamespace(
        scheduler_config=config, cache_config=cache, model_config=model,
        parallel_config=parallel, observability_config=observe,
        use_v2_model_runner=False, **none,
    )
    structured = types.SimpleNamespace(should_advance=lambda request: False)
    multimodal = types.SimpleNamespace(supports_multimodal_inputs=lambda model: False)
    return v.Scheduler(
        vllm_config=vllm_config, kv_cache_config=kv_config(v, blocks),
        structured_output_manager=structured, block_size=16, mm_registry=multimodal,
    )


def request(v, hasher, number, prompt):
    params = v.SamplingParams(max_tokens=2000, temperature=0.0)
    params.update_from_generation_config({}, eos_token_id=2)
    return v.Request(
        request_id=str(number), prompt_token_ids=prompt, sampling_params=params,
        pooling_params=None, block_hasher=hasher,
    )


def prompt(number, length):
    return [(number * 7919 + i * 31) % 50_000 for i in range(length)]


def step(v, s):
    """One step, the model's part left out of the clock. Seconds."""
    start = time.process_time()
    plan = s.schedule()
    scheduled = time.process_time() - start
    ids = list(plan.num_scheduled_tokens)
    # Who has computed its whole prompt samples.
    out = [
        [11] if (r := s.requests[i]).num_computed_tokens >= r.num_tokens else []
        for i in ids
    ]
    output = v.ModelRunnerOutput(
        req_ids=ids, req_id_to_index={r: i for i, r in enumerate(ids)}, sampled_token_ids=out,
    )
    start = time.process_time()
    s.update_from_output(plan, output)
    return scheduled + time.process_time() - start


def decode(v, hasher, seqs):
    s = scheduler(v, seqs, 64 + 64 + 16, seqs * 64)
    for number in range(seqs):
        s.add_request(request(v, hasher, number, prompt(number, 64)))
    step(v, s)
    assert len(s.running) == seqs
    return [statistics.fmean(step(v, s) for _ in range(16)) for _ in range(4)]


def admit(v, hasher, seqs):
    s = scheduler(v, seqs, 640, 8192)
    prompts = [prompt(number, 512) for number in range(seqs)]
    start = time.process_time()
    for number in range(seqs):
        s.add_request(request(v, hasher, number, prompts[number]))
    total = time.process_time() - start
    steps = 0
    while s.waiting:
        total += step(v, s)
        steps += 1
    assert len(s.running) == seqs, (len(s.running), steps)
    return [total]


def match(v, hasher, tokens):
    """A prompt that is cached as a whole; the hashes of its blocks are computed each time."""
    manager = v.KVCacheManager(
        kv_config(v, 4096), max_model_len=8192, scheduler_block_size=16, hash_block_size=16,
        enable_caching=True,
    )
    ids = list(range(tokens + 1))
    first = request(v, hasher, 0, ids)
    blocks = manager.allocate_slots(first, len(ids))
    assert blocks is not None
    first.num_computed_tokens = len(ids)
    manager.free(first)
    times = []
    for number in range(1, 11):
        other = request(v, None, number, ids)
        start = time.process_time()
        other.block_hashes = hasher(other)
        _, hit = manager.get_computed_blocks(other)
        times.append(time.process_time() - start)
        assert hit == tokens, hit
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ours", required=True, help="the built example core_rows")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    v = load()
    print("replaced by empty modules:", ", ".join(sorted(stubbed)) or "none")
    gc.collect()
    gc.freeze()  # as vLLM's engine does when it has started
    hash_fn = v.get_hash_fn_by_name("sha256")
    v.init_none_hash(hash_fn)
    hasher = v.get_request_block_hasher(16, hash_fn)
    rows = {
        "decode 256": lambda: decode(v, hasher, 256),
        "decode 1024": lambda: decode(v, hasher, 1024),
        "admit 1024 x 512": lambda: admit(v, hasher, 1024),
        "match 4096": lambda: match(v, hasher, 4096),
    }
    print(f"{'':18} {'vLLM, us':>10} {'least':>10} {'ours, us':>10} {'least':>10} {'ratio':>7} {'least':>7}")
    for name, run in rows.items():
        theirs, medians, leasts = [], [], []
        for _ in range(args.rounds):
            theirs += run()
            gc.collect()
            line = subprocess.run(
                [args.ours, "3", name], check=True, capture_output=True, text=True
            ).stdout
            _, middle, least = line.split("\t")
            medians.append(float(middle))
            leasts.append(float(least))
        them, them_least = statistics.median(theirs) * 1e6, min(theirs) * 1e6
        us, us_least = statistics.median(medians), min(leasts)
        print(
            f"{name:18} {them:10.0f} {them_least:10.0f} {us:10.1f} {us_least:10.1f}"
            f" {them / us:7.0f} {them_least / us_least:7.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
