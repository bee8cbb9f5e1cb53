"""How fast transformers reads 8 prompts of 3,900 random tokens, with random weights and PyTorch's flash attention.

    python3 benches/peers/transformers_prefill.py FOLDER...      folders with a config.json of a Llama or Qwen3 model

Prints tok/s of four rounds, as it is and compiled. Needs a GPU, PyTorch and transformers.
"""

import json
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

PROMPTS, LENGTH, TOGETHER = 8, 3900, 4
CLASSES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def run(folder: str, compiled: bool) -> None:
    with open(f"{folder}/config.json") as file:
        values = json.load(file)
    config_class, model_class = CLASSES[values["model_type"]]
    config = config_class(**values)
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = model_class(config).eval()
    torch.manual_seed(0)
    ids = torch.randint(0, 100_000, (PROMPTS, LENGTH), device="cuda")
    body = torch.compile(model.model, dynamic=False) if compiled else model.model

    def once() -> None:
        with torch.no_grad():
            for at in range(0, PROMPTS, TOGETHER):
                hidden = body(input_ids=ids[at : at + TOGETHER], use_cache=False).last_hidden_state
                model.lm_head(hidden[:, -1])
        torch.cuda.synchronize()

    once()
    once()
    rates = []
    for _ in range(4):
        start = time.time()
        once()
        rates.append(round(PROMPTS * LENGTH / (time.time() - start)))
    print(folder, "compiled" if compiled else "eager", "tok/s", rates, flush=True)


for folder in sys.argv[1:]:
    for compiled in (False, True):
        run(folder, compiled)
