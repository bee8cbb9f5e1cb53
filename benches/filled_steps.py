"""What filling steps with prompts does to a server of an 8B model on an H200, by a model of how long steps take.

    python3 benches/filled_steps.py

For some loads and ways to plan steps: output tokens a second, median and 99 % of first tokens, 99 % of gaps between tokens
(ms). The times of steps are fitted to a trace and to times of products (TRIED.md has both); the rule is that of
`mixed_step_tokens` in batch-scheduler, with its limits as parameters. For choosing these without a GPU, not for figures.
"""

import random
from dataclasses import dataclass

# Of 8B on an H200: tokens of a filled step; of any step, as `serve` has.
WHOLE, BUDGET = 224, 4096


@dataclass(eq=False)
class Request:
    prompt: int  # tokens left to compute
    answer: int  # tokens left to sample
    since: float  # arrival, then its last token
    started: bool = False


@dataclass
class Rule:
    """A step beside `least` to `most` - 1 that decode takes prompts up to WHOLE tokens, or what is more than `steps` such."""

    steps: int = 0
    least: int = 19
    most: int = 56

    def prompts(self, decoding, left):
        if not self.steps or not self.least <= decoding < self.most:
            return BUDGET - decoding
        room = WHOLE - decoding
        return min(max(room, left - self.steps * room), BUDGET - decoding)


def milliseconds(decoding, prompts):
    """A step of 8B: contexts of some 600 tokens."""
    attention = 0.15 + 0.0215 * decoding if decoding else 0.0
    rows = decoding + prompts
    if prompts == 0:
        return 4.1 + 0.9 * attention
    if rows <= 160:
        return 4.1 + 0.0062 * max(0, rows - 32) + attention + 0.75
    if rows <= 512:
        # Up to 256 rows products are our own.
        return 5.65 + (0.0137 if rows <= 256 else 0.0175) * (rows - 160) + attention
    return 0.3 + 0.0213 * rows + attention


def run(rule, total, streams=0, rate=0.0, prompt=(512, 512), answer=(128, 128), seed=3):
    """Of `total` requests: always `streams` at once, or `rate` a second."""
    rng = random.Random(seed)

    def request(at):
        return Request(rng.randint(*prompt), rng.randint(*answer), at)

    arrivals, at = [], 0.0
    for _ in range(total if rate else 0):
        at += 1000 * rng.expovariate(rate)
        arrivals.append(request(at))
    now, open_requests = 0.0, [request(0.0) for _ in range(min(streams, total))]
    to_come, tokens, first, gaps = total - len(open_requests), 0, [], []
    while open_requests or arrivals:
        while arrivals and arrivals[0].since <= now:
            open_requests.append(arrivals.pop(0))
        if not open_requests:
            now = arrivals[0].since
            continue
        sampled = [r for r in open_requests if r.prompt == 0]
        decoding, waiting = len(sampled), [r for r in open_requests if r.prompt]
        room = most = rule.prompts(decoding, sum(r.prompt for r in waiting))
        for r in waiting:
            part = min(r.prompt, room)
            r.prompt, room = r.prompt - part, room - part
            if r.prompt == 0:
                sampled.append(r)
        now += milliseconds(decoding, most - room)
        for r in sampled:
            (gaps if r.started else first).append(now - r.since)
            r.since, r.started, r.answer = now, True, r.answer - 1
        tokens += len(sampled)
        ended = sum(r.answer == 0 for r in sampled)
        open_requests = [r for r in open_requests if r.answer]
        for _ in range(min(ended, 0 if rate else to_come)):
            open_requests.append(request(now))
            to_come -= 1
    first.sort()
    gaps.sort()
    return 1000 * tokens / now, first[len(first) // 2], first[int(0.99 * len(first))], gaps[int(0.99 * len(gaps))]


def main():
    short = {"prompt": (100, 1024), "answer": (100, 300)}
    loads = {
        "32 streams of 1 request": {"streams": 32, "total": 32},
        "32 of 3": {"streams": 32, "total": 96},
        "32 of 10": {"streams": 32, "total": 320},
        "32 of 30": {"streams": 32, "total": 960},
        "48 of 10": {"streams": 48, "total": 480},
        "64 of 6": {"streams": 64, "total": 384},
        "20 a second": {"rate": 20.0, "total": 400, **short},
        "30 a second": {"rate": 30.0, "total": 600, **short},
        "6 long a second": {"rate": 6.0, "total": 90, "prompt": (2000, 3900), "answer": (100, 300)},
    }
    rules = {"not filled": Rule(), "8 steps": Rule(8), "12 steps": Rule(12), "32 steps": Rule(32), "12, 4 decode": Rule(12, least=4)}
    for load, parameters in loads.items():
        print(load)
        for name, rule in rules.items():
            rate, median, slow, gap = run(rule, **parameters)
            print(f"    {name:12} {rate:6.0f} tok/s, first token {median:4.0f}, {slow:4.0f}; gap {gap:5.1f}")


if __name__ == "__main__":
    main()
