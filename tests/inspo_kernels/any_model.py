"""Build a tiny random model of every causal LM type in transformers, shrunk by the names of its options."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

MODEL_TYPES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB = 83
MOST_PARAMETERS = 5_000_000

# Pattern of an option's name -> its largest value. The first pattern that fits counts.
SIZES = [
    (r".*vocab_size.*|encoder_hash_byte_group_vocab", VOCAB),
    (r"pad_token_id", 0),
    (r"bos_token_id", 1),
    (r"eos_token_id", 2),
    (r".*token_(id|index)|.*_start_id", VOCAB - 1),
    (r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|depth|num_blocks", 2),
    (r"(num_attention_|n_|num_|(en|de)coder_attention_|num_(en|de)coder_attention_)heads?|n_heads", 4),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|num_attention_groups", 2),
    (r"hidden_size|n_embd|d_model|dim|(model|embed|embedding|emb|word_embed_proj)_dim", 32),
    (r"(input_)?embedding_size|backbone_hidden_size|lru_width", 32),
    (r".*head_dim|dim_head|d_kv|.*_rank|hidden_size_per_layer_input", 8),
    (r".*intermediate_size|n_inner|d_ff|.*ffn_dim|dff|dim_ff|d_inner|ffn_hidden_size|.*expert.*_size|mlp_dim", 48),
    (r"num_experts_per_tok(en)?|moe_k|moe_top_?k|top_?k|num_selected_experts|topk_group|n_group|num_expert_group", 2),
    (r"num_(local_|moe_|routed_)?experts|n_routed_experts|moe_num_(routed_)?experts|ffn_num_experts", 4),
    (r"n_shared_experts|num_shared_experts|zero_expert_num", 1),
    (r"(sliding|attention|local|swa)_window|window_size|sliding_window_size|attention_chunk_size", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|seq_length|max_target_positions|model_max_length", 64),
    (r"rotary_dim|index_topk|.*_n_heads|patch_size", 4),
    (r"image_size", 8),
]
# Options that shape the logits, set to values at which ignoring them would change the result.
LOGITS = {"final_logit_softcapping": 1.5, "logits_scaling": 3.7, "logit_scale": 0.37, "lm_head_multiplier": 0.37}
# Values that no pattern can determine.
OPTIONS: dict[str, dict[str, Any]] = {
    "gemma3n_text": {"activation_sparsity_pattern": None, "altup_num_inputs": 2, "intermediate_size": [48] * 8}
    | {"num_hidden_layers": 8, "num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "reformer": {"is_decoder": True},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "deepseek_v2": {"first_k_dense_replace": 1, "n_group": 1, "num_experts_per_tok": 2, "topk_group": 1},
}
# Options that differ between the layers of a type, which refuses one value for all layers.
PER_LAYER = {name: {"head_dim", "num_key_value_heads"} for name in ("gemma4_text", "gemma4_unified_text")}
# Tried in this order: some types need equally many key-value heads and heads, or one layer of each of their kinds.
VARIANTS = [
    [(r"num_hidden_layers|n_layers?|num_layers", layers), *heads]
    for layers in (2, 4, 6, 8)
    for heads in ([], [(r"num_key_value_heads", 4)])
]


def build(model_type: str) -> Any:
    """Return a model in eval mode whose own forward works, or raise the last attempt's error."""
    for rules in VARIANTS:
        try:
            model = _build(model_type, rules)
            with torch.no_grad():
                model(input_ids=torch.tensor([[5, 7, 9, 11, 13]]), attention_mask=torch.ones(1, 5).long())
            return model
        except Exception as error:  # an invalid configuration may raise any error
            last = error
    raise last


def _build(model_type: str, rules: list[tuple[str, int]]) -> Any:
    torch.manual_seed(0)
    kind = transformers.CONFIG_MAPPING[model_type]
    options = _shrunk(kind(), rules) | OPTIONS.get(model_type, {})
    config = kind(**{name: value for name, value in options.items() if name not in PER_LAYER.get(model_type, ())})
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise MemoryError(f"{size:.1e} parameters are left")
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # so that logits are large enough to bend, and a forgotten bias shows
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def _shrunk(config: Any, rules: list[tuple[str, int]]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        part = vars(config).get(name)
        if isinstance(part, transformers.PretrainedConfig):
            options[name] = _shrunk(part, rules)
            if type(part) is not (getattr(type(config), "sub_configs", None) or {}).get(name):
                options[name]["model_type"] = part.model_type
        elif name in LOGITS:
            options[name] = LOGITS[name]
        elif type(value) is int or name == "pad_token_id":
            size = next((size for pattern, size in (*rules, *SIZES) if re.fullmatch(pattern, name)), None)
            if size is not None:
                options[name] = size if value is None or value > size or "token_id" in name else value
    return options
