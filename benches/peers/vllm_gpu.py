"""vLLM's offline figures on the GPU that nano-vllm's are taken on, for one folder with a config.json.

    python3 benches/peers/vllm_gpu.py FOLDER [prompts] [requests] [latency:128]...

prompts: 8 prompts of 3,900 tokens, ten calls, with a rest of four seconds before the first and the ninth, since a rested
card is faster. requests: 256, prompts and answers of 100 to 1,024 tokens, twice. latency:B: the time of 257 tokens less
that of one, by 256, for B prompts of 128 tokens, twice. Needs a GPU and vLLM (measured with 0.23.0; where FlashInfer is not
installed, VLLM_USE_FLASHINFER_SAMPLER=0).
"""

import os
import random
import sys
import time

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
TOKENS = 100_000  # prompts are drawn from so many


def main() -> None:
    folder, wanted = sys.argv[1].rstrip("/"), sys.argv[2:] or ["prompts", "requests", "latency:128"]
    import vllm

    start = time.time()
    llm = vllm.LLM(
        model=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        gpu_memory_utilization=0.9,
        max_model_len=4096,
        enable_prefix_caching=False,
        seed=0,
    )
    name = f"vllm {vllm.__version__} {os.path.basename(folder)}"
    print(f"{name}: ready after {time.time() - start:.1f} s", flush=True)
    draw = random.Random(0)

    def prompts(lengths: list[int]) -> list[dict]:
        return [{"prompt_token_ids": [draw.randrange(TOKENS) for _ in range(n)]} for n in lengths]

    def seconds(asked: list[dict], answers: list[int]) -> float:
        params = [
            vllm.SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n, detokenize=False) for n in answers
        ]
        begin = time.perf_counter()
        outputs = llm.generate(asked, params, use_tqdm=False)
        taken = time.perf_counter() - begin
        assert [len(output.outputs[0].token_ids) for output in outputs] == answers
        return taken

    seconds(prompts([16]), [4])
    for what in wanted:
        if what == "prompts":
            rates = []
            for call in range(10):
                if call in (0, 8):
                    time.sleep(4)
                rates.append(8 * 3900 / seconds(prompts([3900] * 8), [1] * 8))
            print(f"{name}: prompts", " ".join(f"{rate:.0f}" for rate in rates), "tok/s", flush=True)
        elif what == "requests":
            for _ in range(2):
                lengths, answers = ([draw.randint(100, 1024) for _ in range(256)] for _ in range(2))
                taken = seconds(prompts(lengths), answers)
                print(f"{name}: 256 requests {sum(answers) / taken:.0f} output tok/s", flush=True)
        else:
            count = int(what.removeprefix("latency:"))
            for _ in range(2):
                asked = prompts([128] * count)
                first = seconds(asked, [1] * count)
                each = (seconds(asked, [257] * count) - first) / 256 * 1e3
                print(f"{name}: {count} sequences, {each:.3f} ms a token", flush=True)


if __name__ == "__main__":
    main()
