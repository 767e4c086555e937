"""Condition a vision batch: images stay with their prompts, token types with their tokens."""

import torch
from PIL import Image
from tiny import tiny_config, tiny_tokenizer
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

import inspo_kernels as ik

tokenizer = tiny_tokenizer(special=["<image>"])
processor = LlavaProcessor(  # yours: AutoProcessor.from_pretrained(...)
    CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}), tokenizer,
    patch_size=4, vision_feature_select_strategy="default", image_token="<image>", num_additional_image_tokens=1,
)  # fmt: skip
vision = {
    "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
}  # fmt: skip
text = {"model_type": "llama", **tiny_config(tokenizer)}
image = tokenizer.convert_tokens_to_ids("<image>")
torch.manual_seed(0)
model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=image))
examples = [
    {"images": [Image.new("RGB", (8, 8), colour)], "prompt": "<image>Colour?", "chosen": chosen, "rejected": rejected}
    for colour, chosen, rejected in (("red", "Red.", "I see a ball."), ("blue", "Blue.", "Green."))
]

batch = DataCollatorForVisionPreference(processor)(examples)  # or any batch of this form
reference = dict(batch)  # the reference reads the plain rows
conditioned = ik.condition_batch(batch, pad_token_id=tokenizer.pad_token_id)


def labels_and_states(batch):
    """Return labels, hidden states and head."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    return labels, *ik.hidden_and_head(model, **inputs)


with torch.no_grad():
    labels, hidden, head = labels_and_states(reference)
    ref_logps = ik.pair_logps(hidden, labels=labels, **head)[0].flatten()
labels, hidden, head = labels_and_states(conditioned)
out = ik.fused_inspo_loss(hidden, labels=labels, ref_logps=ref_logps, **head)
out.loss.backward()
print({name: tuple(value.shape) for name, value in conditioned.items()}, f"loss {out.loss.item():.4f}")
