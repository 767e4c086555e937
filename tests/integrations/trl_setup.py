"""Make tiny models, tokenizers and data for the tests of InSPOTrainer, and record a run of any trainer."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

import transformers
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from inspo_kernels.integrations.trl import InSPOConfig, InSPOTrainer

disable_progress_bars()
VOCAB = 61
SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": VOCAB - 2,
    "eos_token_id": VOCAB - 1,
    "bos_token_id": None,
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.05, "output_router_logits": True}
# prompt, chosen, rejected: tokens before the end-of-sequence token that TRL adds
LENGTHS = [(5, 4, 9), (3, 7, 2), (8, 1, 3), (2, 6, 6), (7, 3, 5), (4, 5, 1), (6, 2, 7), (3, 8, 4)]


def tokenizer():
    words = {str(i): i for i in range(VOCAB - 2)} | {"<pad>": VOCAB - 2, "<eos>": VOCAB - 1}
    words = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def model(model_type="llama", seed=0, **options):
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **SIZE | options)
    made = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # logits away from 0, so that losses bend
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return made.eval()


def pairs(lengths=LENGTHS, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def text(count):
        return "".join(f" {i}" for i in torch.randint(VOCAB - 2, (count,), generator=generator).tolist())

    return Dataset.from_list([{"prompt": text(x), "chosen": text(w), "rejected": text(l)} for x, w, l in lengths])


def recording(trainer_class):
    """Return a subclass that keeps each pass's loss in ``losses``, because logged losses are rounded."""

    class Recording(trainer_class):
        def compute_loss(self, *args, **kwargs):
            result = super().compute_loss(*args, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            self.losses = [*getattr(self, "losses", []), loss.item()]
            return result

    return Recording


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def make(
    trainer_class,
    config_class,
    folder,
    *,
    policy,
    reference=None,
    data=None,
    trainer=None,
    processing_class=None,
    **options,
):
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "max_length": None,
        "bf16": False,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": [],
    }
    return recording(trainer_class)(
        policy,
        reference,
        args=config_class(str(folder), **defaults | options),
        train_dataset=pairs() if data is None else data,
        processing_class=processing_class or tokenizer(),
        **trainer or {},
    )


def run(*args, **options):
    """Train, and return the losses of passes, the gradients of steps, and the logged metrics."""
    gradients = Gradients()
    trainer = make(*args, **options)
    trainer.add_callback(gradients)
    trainer.train()
    return SimpleNamespace(
        trainer=trainer,
        losses=trainer.losses,
        gradients=gradients.steps,
        logs=[{k: v for k, v in log.items() if k not in TIMED} for log in trainer.state.log_history],
    )


TIMED = {
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "total_flos",
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
}


def both(folder, policy=None, reference=None, **options):
    """Do the same run with DPOTrainer and with InSPOTrainer without conditioning."""
    from trl import DPOConfig, DPOTrainer

    policy = policy or model()
    reference = reference if reference is not None or "trainer" in options else model(seed=5)
    theirs = run(
        DPOTrainer, DPOConfig, folder, policy=copy.deepcopy(policy), reference=copy.deepcopy(reference), **options
    )
    ours = run(InSPOTrainer, InSPOConfig, folder, policy=policy, reference=reference, conditioned=False, **options)
    return theirs, ours


def assert_same(theirs, ours):
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert len(theirs.gradients) == len(ours.gradients) > 0
    for expected, found in zip(theirs.gradients, ours.gradients):
        assert expected.keys() == found.keys()
        # Some parameters, such as a key's bias, have only rounding as their gradient.
        rounding = 1e-3 * torch.stack([gradient.norm() for gradient in expected.values()]).max()
        for name, gradient in expected.items():
            error = (found[name] - gradient).norm() / gradient.norm().clamp(min=rounding)
            assert error <= 2e-5, (name, error)
    assert [sorted(log) for log in ours.logs] == [sorted(log) for log in theirs.logs]
    for expected, found in zip(theirs.logs, ours.logs):
        if abs(expected.get("rewards/margins", 1)) < 1e-6:  # policy equals reference: accuracy is rounding
            expected, found = ({k: v for k, v in log.items() if k != "rewards/accuracies"} for log in (expected, found))
        assert found == pytest.approx(expected, rel=2e-4, abs=2e-5)
