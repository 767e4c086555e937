"""Build tiny random models of common architectures, with options at which mistakes change the result."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

VOCAB = 83
SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT_SIZE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MOE |= {"experts_implementation": "eager"}  # the grouped matmul does not support float64
SHARED_EXPERT = {"shared_expert_intermediate_size": 24}
GEMMA = {"head_dim": 8, "sliding_window": 4}
# Every option that shapes the logits has a value at which ignoring it would change them.
OPTIONS = {
    "cohere": {"logit_scale": 0.37},
    "cohere2": {"logit_scale": 0.37, "sliding_window": 4},
    "gemma": {"head_dim": 8},
    # In float64 eager attention is NaN in a padded row with more padding than its window, hence the wide one.
    "gemma2": GEMMA | {"final_logit_softcapping": 0.6, "sliding_window": 16},
    "gemma3_text": GEMMA | {"final_logit_softcapping": 0.6},
    "gpt2": GPT_SIZE,
    "gpt_neox": {"num_key_value_heads": None},
    "gptj": GPT_SIZE,
    "granite": {"logits_scaling": 3.7},
    "granitemoe": MOE | {"logits_scaling": 3.7},
    "mistral": {"sliding_window": 4},
    "mixtral": MOE,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 24, "num_key_value_heads": None},
    "qwen2_moe": MOE | SHARED_EXPERT,
    "qwen3": {"head_dim": 8},
    "qwen3_moe": MOE | {"head_dim": 8},
}
MODEL_TYPES = [
    "cohere",
    "cohere2",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "gptj",
    "granite",
    "granitemoe",
    "llama",
    "mistral",
    "mixtral",
    "olmo",
    "olmo2",
    "olmo3",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "stablelm",
    "starcoder2",
]


def make_model(model_type, dtype=torch.float32, *, tied=False):
    torch.manual_seed(0)
    options = SIZE | OPTIONS.get(model_type, {})
    if model_type == "gemma3":
        options = {
            "text_config": SIZE | OPTIONS["gemma3_text"],
            "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
            | {"num_attention_heads": 2, "image_size": 8, "patch_size": 4},
            "mm_tokens_per_image": 4,
            "image_token_index": VOCAB - 1,
        }
    config = transformers.AutoConfig.for_model(model_type, tie_word_embeddings=tied, **options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # so that a forgotten bias or norm shows and logits are large enough for soft-caps to bend
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.to(dtype).eval()


def model_inputs(batch):
    return {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}
