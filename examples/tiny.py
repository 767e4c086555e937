"""Provide a random model and a character tokenizer, so that every example runs offline in seconds."""

import string

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"


def tiny_tokenizer(special=()):
    """Return a tokenizer with padding, end-of-sequence and ``special`` tokens."""
    words = [*CHARACTERS, "<pad>", "<eos>", *special]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    named = {"pad_token": "<pad>", "eos_token": "<eos>", "additional_special_tokens": list(special)}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def tiny_config(tokenizer):
    """Return the configuration of a Llama with 60,000 parameters."""
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id")}
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        **ids,
    }


def tiny_model(tokenizer, seed=0):
    """Return the model, in evaluation mode."""
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny_config(tokenizer))).eval()
