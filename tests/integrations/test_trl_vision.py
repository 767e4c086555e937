"""Test vision batches: TRL's collator, condition_batch and InSPOTrainer, with a LLaVA of a few thousand parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from tiny_vision import examples, processor, vision_model
from trl_setup import assert_same, run

import inspo_kernels as ik
from inspo_kernels.integrations.trl import InSPOConfig, InSPOTrainer

OPTIONS = {"remove_unused_columns": False}


def trained(trainer, config, folder, **options):
    data = Dataset.from_list(examples())
    return run(
        trainer,
        config,
        folder,
        policy=vision_model(0),
        reference=vision_model(1),
        data=data,
        processing_class=processor(),
        **OPTIONS | options,
    )


def test_vision_equals_trl(tmp_path):
    from trl import DPOConfig, DPOTrainer

    assert_same(
        trained(DPOTrainer, DPOConfig, tmp_path), trained(InSPOTrainer, InSPOConfig, tmp_path, conditioned=False)
    )


def test_conditioned_images_stay_with_their_prompts(tmp_path):
    """Each pair has the same log-probs alone, with its own image, and in the batch."""
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    policy, collator = vision_model(0), DataCollatorForVisionPreference(processor())

    def logps(rows):
        batch = ik.condition_batch(collator(copy.deepcopy(rows)), pad_token_id=processor().tokenizer.pad_token_id)
        labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
        hidden, head = ik.hidden_and_head(policy, **batch)
        return ik.linear_logps(hidden[:, :-1], targets=labels[:, 1:], **head).sum(1)

    together = logps(examples())
    apart = torch.stack([logps([example]) for example in examples()], dim=1).flatten()
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(apart, logps([dict(e, images=examples()[0]["images"]) for e in examples()]), atol=1e-3)


def test_conditioned_vision_trains_and_drops_long_pairs(tmp_path, caplog):
    lengths = [4 + 2 + i + (2 + 1) + (3 + 1) for i in range(4)]  # image and prompt, both responses with their ends
    made = trained(InSPOTrainer, InSPOConfig, tmp_path, max_length=lengths[2], max_steps=1)
    assert made.trainer.data_collator.dropped == 1 and "dropped 1 pairs" in caplog.text
    assert "marginal/logps/chosen" in made.logs[0]


def test_tree_layout_of_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="layout='tree' does not hold batches with images"):
        trained(InSPOTrainer, InSPOConfig, tmp_path, layout="tree")
