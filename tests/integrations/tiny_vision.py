"""Build a LLaVA with a few thousand parameters, its processor, and preference data with images."""

from __future__ import annotations

import pytest
import torch
from trl_setup import SIZE, VOCAB

pytest.importorskip("PIL")

import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

IMAGE = VOCAB - 3
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 16,
}


def processor():
    words = {str(i): i for i in range(VOCAB - 3)} | {"<image>": IMAGE, "<pad>": VOCAB - 2, "<eos>": VOCAB - 1}
    words = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=["<image>"]
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def vision_model(seed):
    torch.manual_seed(seed)
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **SIZE}, vision_config=VISION, image_token_index=IMAGE
    )
    made = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return made.eval()


def examples():
    return [
        {
            "images": [Image.new("RGB", (8, 8), (70 * i, 200 - 50 * i, 30))],
            "prompt": "<image> 1 2" + " 3" * i,
            "chosen": f" {i} 5 <eos>",
            "rejected": f" 6 {i} 8 <eos>",
        }
        for i in range(4)
    ]
