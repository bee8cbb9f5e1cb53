#!/usr/bin/env python3
"""Writes one random model in the formats of both engines: Hugging Face safetensors and GGUF.

    python3 benches/peers/make_random_model.py --out /tmp/qwen3-0.6b --dtype float32

Qwen3-0.6B's dimensions unless told otherwise. Random weights are as fast as trained ones.
Needs numpy, torch, safetensors and gguf.
"""
import argparse
import json
import os

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, MODEL_ARCH, MODEL_ARCH_NAMES, RopeScalingType
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024,
    "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu", "attention_bias": False,
    "tie_word_embeddings": True, "bos_token_id": 151643, "eos_token_id": 151645,
}
# Hugging Face name of a layer's tensor -> GGUF name, shape in terms of the configuration.
LAYER = {
    "input_layernorm": ("attn_norm", lambda c: (c["hidden_size"],)),
    "self_attn.q_proj": ("attn_q", lambda c: (c["num_attention_heads"] * c["head_dim"], c["hidden_size"])),
    "self_attn.k_proj": ("attn_k", lambda c: (c["num_key_value_heads"] * c["head_dim"], c["hidden_size"])),
    "self_attn.v_proj": ("attn_v", lambda c: (c["num_key_value_heads"] * c["head_dim"], c["hidden_size"])),
    "self_attn.q_norm": ("attn_q_norm", lambda c: (c["head_dim"],)),
    "self_attn.k_norm": ("attn_k_norm", lambda c: (c["head_dim"],)),
    "self_attn.o_proj": ("attn_output", lambda c: (c["hidden_size"], c["num_attention_heads"] * c["head_dim"])),
    "post_attention_layernorm": ("ffn_norm", lambda c: (c["hidden_size"],)),
    "mlp.gate_proj": ("ffn_gate", lambda c: (c["intermediate_size"], c["hidden_size"])),
    "mlp.up_proj": ("ffn_up", lambda c: (c["intermediate_size"], c["hidden_size"])),
    "mlp.down_proj": ("ffn_down", lambda c: (c["hidden_size"], c["intermediate_size"])),
}


def tensors(config, dtype):
    """Yields (Hugging Face name, GGUF name, tensor); norms are ones."""
    g = torch.Generator().manual_seed(0)

    def make(shape):
        return torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=g) * 0.02

    yield "model.embed_tokens.weight", "token_embd.weight", make((config["vocab_size"], config["hidden_size"])).to(dtype)
    for i in range(config["num_hidden_layers"]):
        for name, (short, shape) in LAYER.items():
            yield f"model.layers.{i}.{name}.weight", f"blk.{i}.{short}.weight", make(shape(config)).to(dtype)
    yield "model.norm.weight", "output_norm.weight", make((config["hidden_size"],)).to(dtype)


def write_gguf(path, config, weights, dtype):
    kind = {"float32": GGMLQuantizationType.F32, "bfloat16": GGMLQuantizationType.BF16, "float16": GGMLQuantizationType.F16}[dtype]
    w = GGUFWriter(path, MODEL_ARCH_NAMES[MODEL_ARCH.QWEN3])
    w.add_block_count(config["num_hidden_layers"])
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(config["num_attention_heads"])
    w.add_head_count_kv(config["num_key_value_heads"])
    w.add_key_length(config["head_dim"])
    w.add_value_length(config["head_dim"])
    w.add_rope_freq_base(config["rope_theta"])
    w.add_rope_scaling_type(RopeScalingType.NONE)
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_vocab_size(config["vocab_size"])
    w.add_tokenizer_model("none")
    for _, name, t in weights:
        if t.ndim == 1 or dtype == "float32":
            w.add_tensor(name, t.float().numpy())
        elif dtype == "float16":
            w.add_tensor(name, t.numpy())
        else:
            raw = t.view(torch.uint16).numpy()
            w.add_tensor(name, raw.view(np.uint8), raw_shape=(*t.shape[:-1], t.shape[-1] * 2), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True, help="folder to write; model.gguf goes beside the checkpoint")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    args = p.parse_args()
    os.makedirs(args.out, exist_ok=True)
    weights = list(tensors(CONFIG, getattr(torch, args.dtype)))
    with open(os.path.join(args.out, "config.json"), "w") as f:
        json.dump(CONFIG | {"torch_dtype": args.dtype}, f, indent=2)
    save_file({name: t for name, _, t in weights}, os.path.join(args.out, "model.safetensors"))
    write_gguf(os.path.join(args.out, "model.gguf"), CONFIG, weights, args.dtype)


if __name__ == "__main__":
    main()
