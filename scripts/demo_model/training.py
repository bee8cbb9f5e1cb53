"""The training loop: time-boxed, so that it always ends with a checkpoint."""

import math
import time

import torch
import torch.nn.functional as F

from .corpus import Rows, encode_shard

IGNORED = -100
PEAK_RATE, WARM_UP_STEPS, DECAY_SHARE, CLIP = 3e-3, 100, 0.5, 1.0


def loss_of(network, rows, end_id):
    """Mean cross-entropy of the next token. The filling at the end of a row (end mark after end mark) does not count."""
    targets = F.pad(rows[:, 1:], (0, 1), value=IGNORED)
    targets = targets.masked_fill((rows == end_id) & (targets == end_id), IGNORED)
    logits = network(rows)
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=IGNORED)


def rate(step, progress):
    """Warm-up, then constant, then straight to zero over the last DECAY_SHARE of the run."""
    return PEAK_RATE * min((step + 1) / WARM_UP_STEPS, 1.0, (1.0 - progress) / DECAY_SHARE)


def train(network, tokenizer, *, seed, workers, batch, start, max_seconds, max_tokens, device, compiled):
    """Trains in place until the time (counted from `start`) or the tokens run out; returns figures for the card."""
    end_id = tokenizer.token_to_id("<|endoftext|>")
    matrices = [p for p in network.parameters() if p.dim() == 2]
    vectors = [p for p in network.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK_RATE, betas=(0.9, 0.95), fused=device.type == "cuda",
    )
    step_loss = torch.compile(loss_of) if compiled else loss_of
    source = Rows(tokenizer, seed, workers, batch)
    tokens = step = 0
    began = last = None
    logged = 0
    while True:
        progress = 0.0
        if began is not None:
            left = start + max_seconds - began
            progress = max((time.monotonic() - began) / max(left, 1e-9), tokens / max_tokens)
            if progress >= 1.0:
                break
        for group in optimizer.param_groups:
            group["lr"] = rate(step, progress)
        rows = torch.from_numpy(source.next()).to(device).long()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = step_loss(network, rows, end_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += rows.numel()
        if began is None:
            loss.item()  # the first step compiles; the clock of the schedule starts behind it
            began = last = time.monotonic()
            logged = tokens
        elif step % 100 == 0:
            value, now = loss.item(), time.monotonic()
            print(f"step {step:6d}  loss {value:.4f}  {tokens / 1e6:8.1f}M tokens  {(tokens - logged) / (now - last):10.0f} tok/s  "
                  f"fresh {source.fresh / max(1, source.fresh + source.repeated):.2f}  {now - start:6.1f} s", flush=True)
            if not math.isfinite(value):
                raise RuntimeError(f"the loss is {value} at step {step}: try a lower rate")
            last, logged = now, tokens
        step += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    source.close()
    return {"tokens": tokens, "steps": step, "fresh_tokens": min(source.fresh, tokens), "seconds": time.monotonic() - began}


@torch.no_grad()
def held_out_loss(network, tokenizer, seed, device, rows=256):
    """Loss on text of the `held-out` stream, which training never sees."""
    end_id = tokenizer.token_to_id("<|endoftext|>")
    data = []
    while sum(map(len, data)) < rows:
        data.append(encode_shard(tokenizer, seed, "held-out", len(data)))
    data = torch.cat([torch.from_numpy(d) for d in data])[:rows]
    losses = [loss_of(network, part.to(device).long(), end_id).item() for part in data.split(16)]
    return sum(losses) / len(losses)
