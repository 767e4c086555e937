"""Train inside TRL: DPOTrainer with a conditioning collator, and InSPOTrainer."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

import inspo_kernels as ik
from inspo_kernels.layouts.conditioning import IGNORE_INDEX

from .contenders import BETA
from .harness import Timer
from .step_jobs import Job, Pair, Trained, counting_positions, now


class ConditioningCollator:
    """Collate pairs so that TRL's DPOTrainer trains InSPO: each response has the other in its context.

    While ``conditioned`` is false, as for the reference, the rows are those of plain DPO.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id, self.conditioned = pad_token_id, False

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        pairs = [tuple(one[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")) for one in examples]
        rows = ik.condition_pairs(pairs, pad_token_id=self.pad_token_id, conditioned=self.conditioned)
        batch = {name: rows[name] for name in ("input_ids", "attention_mask")}
        batch["completion_mask"] = (rows["labels"] != IGNORE_INDEX).long()
        known = [name for name in ("ref_chosen_logps", "ref_rejected_logps") if name in examples[0]]
        return batch | {name: torch.tensor([one[name] for one in examples]) for name in known}


class Clock(TrainerCallback):
    """Record the times at which steps begin, and at which the last one ended."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.begins, self.end = device, list[float](), 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begins.append(now(self.device))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.end = now(self.device)


class StopAfter(TrainerCallback):
    """End training after the first step that ends later than ``seconds`` from now."""

    def __init__(self, seconds: float) -> None:
        self.timer = Timer(seconds)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= self.timer.left < 0


class TrainerStep:
    """Train with TRL's DPOTrainer, or with InSPOTrainer if ``layout`` is given.

    Datasets of these trainers hold text, so ids are written as words that a special tokenizer reads back. With
    ``compact``, DPOTrainer selects the scored positions before the head, as on a GPU. Only the last step is logged. On
    that step InSPOTrainer also scores the marginals.
    """

    def __init__(self, job: Job, *, compact: bool = False, layout: str | None = None) -> None:
        self.job, self.compact, self.layout = job, compact, layout
        self.clock = Clock(job.model.device)
        self.losses: list[Tensor] = []
        self.folder = tempfile.TemporaryDirectory()
        collator = ConditioningCollator(job.model.config.pad_token_id) if layout is None else None
        with self._around():
            start = now(job.model.device)
            self.trainer = self._build(collator)
            self.trainer.remove_callback(PrinterCallback)
            self.reference_seconds = now(job.model.device) - start
        if collator is not None:
            collator.conditioned = True
        loss_of = self.trainer.compute_loss

        def recorded(*arguments: Any, **named: Any) -> Any:
            loss = loss_of(*arguments, **named)
            self.losses.append(loss.detach())  # the logged loss is rounded
            return loss

        self.trainer.compute_loss = recorded

    def _build(self, collator: ConditioningCollator | None) -> Any:
        """Return the trainer. It computes the reference's log-probs in its constructor."""
        from datasets import Dataset, disable_progress_bars
        from trl import DPOConfig, DPOTrainer

        disable_progress_bars()
        job, model = self.job, self.job.model
        classes: tuple[Any, Any, dict[str, str]] = (DPOTrainer, DPOConfig, {})
        if self.layout is not None:
            from inspo_kernels.integrations.trl import InSPOConfig, InSPOTrainer

            classes = (InSPOTrainer, InSPOConfig, {"layout": self.layout})
        trainer_class, config_class, options = classes
        assert all(w[-1] == l[-1] == model.config.eos_token_id for _, w, l in job.pairs)  # the trainer appends it
        return trainer_class(
            model,
            args=config_class(
                self.folder.name,
                beta=BETA,
                per_device_train_batch_size=len(job.batches[0]),
                max_steps=len(job.batches),
                learning_rate=job.learning_rate,
                lr_scheduler_type="constant",
                optim="sgd",
                max_grad_norm=0.0,
                max_length=None,
                precompute_ref_log_probs=True,
                gradient_checkpointing=False,
                train_sampling_strategy="sequential",
                bf16=False,
                use_cpu=model.device.type == "cpu",
                save_strategy="no",
                logging_steps=len(job.batches),
                disable_tqdm=True,
                report_to=[],
                **options,
            ),
            data_collator=collator,
            train_dataset=Dataset.from_list([_as_text(pair) for pair in job.pairs]),
            processing_class=_id_tokenizer(model.config.vocab_size),
            callbacks=[self.clock],
        )

    @contextlib.contextmanager
    def _around(self) -> Iterator[None]:
        # The trainer selects scored positions first if this reports a GPU.
        on_gpu = mock.patch("trl.trainer.utils._use_triton", lambda device: True)
        with _quiet(), on_gpu if self.compact else contextlib.nullcontext():
            yield

    def __call__(self) -> Trained:
        self.losses.clear()
        self.clock.begins.clear()
        trained = Trained(reference_seconds=self.reference_seconds)
        with self._around(), counting_positions([self.job.model], trained):
            self.trainer.train()
        self.job.model.eval()
        trained.seconds = self.clock.end - self.clock.begins[0]
        trained.losses = [loss.item() for loss in self.losses]
        return trained


def _as_text(pair: Pair) -> dict[str, str]:
    """Return a row of the dataset whose responses lack the end-of-sequence id."""
    prompt, chosen, rejected = ("".join(f" {i}" for i in ids) for ids in (pair[0], pair[1][:-1], pair[2][:-1]))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _id_tokenizer(vocab: int) -> Any:
    """Build a tokenizer that reads "17 4 9" as the ids 17, 4, 9. The last two ids are padding and end of sequence."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {str(i): i for i in range(vocab - 2)} | {"<pad>": vocab - 2, "<eos>": vocab - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' lines and progress bars."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    with mock.patch.dict("os.environ", {"TQDM_DISABLE": "1"}), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            yield
        finally:
            logging.set_verbosity(before)
