"""Whole training steps, each by other means: the same model, the same pairs, the same SGD updates.

- ``rows`` and ``tree``: ``condition_pairs``, ``hidden_and_head``, ``fused_inspo_loss``, all pairs in one forward.
- ``loop``: what ``training.train`` does, which takes pairs of similar length together and reports marginals, too.
- ``trl``: TRL's DPOTrainer, unmodified, with a collator that puts the other response into the context. On a CPU it
  sends every position through the head; ``trl_compact`` lets it pick the scored ones first, as it does on GPUs.
- ``four_forwards``: the step as published InSPO code does it: chosen and rejected sequences in a forward each, policy
  and reference, float32 log_softmax at every position.

All but the last compute the reference's log-probs once, before training: the reference sees no alternative and never
changes.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import inspo_kernels as ik
from training.data import Pair as TrainingPair
from training.layouts import choose_layout
from training.scoring import Batch, Batcher, PairModel, lengths_of, score

from .batches import Lengths
from .contenders import BETA

Pair = tuple[list[int], list[int], list[int]]
LOOP_TOKENS = 4096  # of a forward pass of ``loop``


@dataclass(frozen=True)
class ModelShape:
    """A Llama-shaped model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int

    def build(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """Random weights, the same ones each time. The last two ids are padding and end of sequence."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=32_768,
            pad_token_id=self.vocab - 2,
            eos_token_id=self.vocab - 1,
            bos_token_id=None,
            initializer_range=0.05,
        )
        model = LlamaForCausalLM(config).eval()
        model.to(device, dtype)  # type: ignore[arg-type]  # transformers' wrapper of it hides self
        if dtype == torch.float64:
            _keep_float64(model)
        return model


def _keep_float64(model: PreTrainedModel) -> None:
    """The library's norms round to float32 whatever the model's dtype; torch's own compute in it."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LlamaRMSNorm):
                norm = torch.nn.RMSNorm(child.weight.shape, child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)


def random_pairs(lengths: Sequence[Lengths], vocab: int) -> list[Pair]:
    """Random ids; every response ends with the end-of-sequence id."""
    g = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(vocab - 2, (count,), generator=g).tolist()

    return [(ids(x), [*ids(w - 1), vocab - 1], [*ids(l - 1), vocab - 1]) for x, w, l in lengths]


@dataclass
class Trained:
    """Result of a run: losses, seconds from the first step's begin to the last's end, positions through the trunk."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    positions: int = 0
    reference_seconds: float = 0.0


@dataclass(frozen=True)
class Job:
    """Input of every contender: ``batches`` are the pairs of each update."""

    model: PreTrainedModel
    batches: list[list[Pair]]
    learning_rate: float

    @property
    def pairs(self) -> list[Pair]:
        return [pair for batch in self.batches for pair in batch]


def now(device: torch.device) -> float:
    """Seconds of a clock that is read when the device has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def counting_positions(models: Sequence[PreTrainedModel], trained: Trained) -> Iterator[None]:
    """Count what enters the trunks, padding included."""

    def count(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named["input_ids"] if "input_ids" in named else arguments[0]
        trained.positions += ids.numel()

    hooks = [model.base_model.register_forward_pre_hook(count, with_kwargs=True) for model in models]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def sgd_loop(
    job: Job, backward: Callable[[int], Tensor], trained: Trained, counted: Sequence[PreTrainedModel]
) -> Trained:
    """``backward`` leaves the gradients of batch i in the model and returns the loss."""
    optimizer = torch.optim.SGD(job.model.parameters(), lr=job.learning_rate)
    start = now(job.model.device)
    with counting_positions(counted, trained):
        for i in range(len(job.batches)):
            loss = backward(i)
            optimizer.step()
            optimizer.zero_grad()
            trained.losses.append(loss.item())
    trained.seconds = now(job.model.device) - start
    return trained


class Ours:
    """Our step in one layout."""

    def __init__(self, job: Job, layout: str) -> None:
        self.job, self.layout = job, layout
        start = now(job.model.device)
        with torch.no_grad():
            self.ref_logps = [self._forward(batch, conditioned=False).logps for batch in job.batches]
        self.reference_seconds = now(job.model.device) - start

    def _forward(self, pairs: list[Pair], *, conditioned: bool, ref_logps: Tensor | None = None) -> ik.InSPOOutput:
        model, pad = self.job.model, self.job.model.config.pad_token_id
        batch = ik.condition_pairs(pairs, pad_token_id=pad, conditioned=conditioned, layout=self.layout)
        if self.layout == "tree":  # it scores the marginals, too, which nobody else here does
            same = batch["segment_ids"] < 2 * batch["num_pairs"]
            batch |= {name: batch[name][same] for name in ("rows", "labels", "segment_ids")}
        # Labels and segment ids stay on the CPU, where planning needs no synchronisation.
        names = ("input_ids", "attention_mask", "position_ids", "tree_ends", "rows")
        batch |= {name: batch[name].to(model.device) for name in names if name in batch}
        mask = ik.tree_attention_mask(batch, model) if self.layout == "tree" else batch["attention_mask"]
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        hidden, head = ik.hidden_and_head(model, **inputs, attention_mask=mask)
        scored = {name: batch[name] for name in ("labels", "segment_ids", "num_pairs") if name in batch}
        if self.layout == "tree":
            hidden = hidden.flatten(0, 1).index_select(0, batch["rows"])
        # Of the reference only the sums are read: an objective that needs no reference gives them.
        objective = ik.SimPO() if ref_logps is None else ik.DPO(beta=BETA)
        return ik.fused_inspo_loss(hidden, **scored, objective=objective, ref_logps=ref_logps, **head)

    def __call__(self) -> Trained:
        def backward(i: int) -> Tensor:
            loss = self._forward(self.job.batches[i], conditioned=True, ref_logps=self.ref_logps[i]).loss
            loss.backward()
            return loss

        return sgd_loop(self.job, backward, Trained(reference_seconds=self.reference_seconds), [self.job.model])


class Loop:
    """The step of ``training.train``: forward passes of pairs of similar length, in the layout that costs less.

    Like the loop between two logged lines, it does not score the marginals.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.module = PairModel(job.model, ik.DPO(beta=BETA))
        self.batches = [[TrainingPair(*pair) for pair in batch] for batch in job.batches]
        rows = Batcher(job.model.config.pad_token_id, job.model.device, LOOP_TOKENS)
        pairs = [pair for batch in self.batches for pair in batch]
        self.batcher = choose_layout(
            "auto", job.model, rows, lengths_of(pairs), conditioned=True, log=lambda line: None
        )
        start = now(job.model.device)
        self.ref_logps = [score(self.module, batch, self.batcher, conditioned=False).logps for batch in self.batches]
        self.reference_seconds = now(job.model.device) - start

    def __call__(self) -> Trained:
        def backward(i: int) -> Tensor:
            batch, total = self.batches[i], torch.zeros(())
            for part in self.batcher.plan(batch, conditioned=True):
                tensors = self.batcher([batch[k] for k in part.pairs], conditioned=True, marginals=False)
                ref_logps = self.ref_logps[i][:, part.pairs].reshape(-1)
                loss, _ = self.module(Batch(tensors, ref_logps, scale=1 / len(batch)))
                loss.backward()
                total = total + loss.detach().cpu()
            return total

        return sgd_loop(self.job, backward, Trained(reference_seconds=self.reference_seconds), [self.job.model])


class FourForwards:
    """Policy and reference, chosen and rejected: four forwards a step, log_softmax at every position."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.reference = copy.deepcopy(job.model).requires_grad_(False)

    def _sums(self, model: PreTrainedModel, pairs: list[Pair], *, conditioned: bool) -> tuple[Tensor, Tensor]:
        """Return log-probs of chosen and rejected responses (B,), each from a forward of its own, padded by itself."""
        batch = ik.condition_pairs(pairs, pad_token_id=model.config.pad_token_id, conditioned=conditioned)
        sums = []
        for half in (slice(0, len(pairs)), slice(len(pairs), None)):
            mask = batch["attention_mask"][half].to(model.device)
            length = int(mask.sum(1).max())
            ids = batch["input_ids"][half, :length].to(model.device)
            labels = batch["labels"][half, 1:length].to(model.device)
            logits = model(input_ids=ids, attention_mask=mask[:, :length], use_cache=False).logits
            logits = logits if logits.dtype == torch.float64 else logits.float()
            logps = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            sums.append((logps * (labels >= 0)).sum(1))
        return sums[0], sums[1]

    def __call__(self) -> Trained:
        def backward(i: int) -> Tensor:
            pairs = self.job.batches[i]
            chosen, rejected = self._sums(self.job.model, pairs, conditioned=True)
            with torch.no_grad():
                ref_chosen, ref_rejected = self._sums(self.reference, pairs, conditioned=False)
            loss = -F.logsigmoid(BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()
            loss.backward()
            return loss

        return sgd_loop(self.job, backward, Trained(), [self.job.model, self.reference])


class ConditioningCollator:
    """Collate pairs so that TRL's DPOTrainer trains InSPO: the other response goes into the context of each.

    While ``conditioned`` is false, as for the reference, the rows are those of plain DPO.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id, self.conditioned = pad_token_id, False

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids, completion = [], []
        for scored, other in (("chosen_ids", "rejected_ids"), ("rejected_ids", "chosen_ids")):
            for example in examples:
                context = example["prompt_ids"] + (example[other] if self.conditioned else [])
                ids.append(torch.tensor(context + example[scored]))
                completion.append(torch.tensor([0] * len(context) + [1] * len(example[scored])))
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "completion_mask": pad_sequence(completion, batch_first=True),
        }
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples])
        return batch


class Trl:
    """TRL's trainer. Its datasets hold text, so ids are written out as words of a tokenizer that reads them back."""

    def __init__(self, job: Job, *, compact: bool) -> None:
        from datasets import Dataset, disable_progress_bars
        from transformers import TrainerCallback
        from transformers.trainer_callback import PrinterCallback
        from trl import DPOConfig, DPOTrainer

        disable_progress_bars()
        self.job, self.trained, self.start = job, Trained(), 0.0
        self.losses: list[Tensor] = []
        self.folder = tempfile.TemporaryDirectory()
        model = job.model
        eos = model.config.eos_token_id

        def text(ids: list[int]) -> str:
            return "".join(f" {i}" for i in ids)

        rows = [{"prompt": text(x), "chosen": text(w[:-1]), "rejected": text(l[:-1])} for x, w, l in job.pairs]
        assert all(w[-1] == eos and l[-1] == eos for _, w, l in job.pairs)  # the trainer appends it

        contender = self

        class Clock(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == 0:
                    contender.start = now(model.device)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                contender.trained.seconds = now(model.device) - contender.start

        collator = ConditioningCollator(model.config.pad_token_id)
        self.compact = compact
        with self._around():
            start = now(model.device)
            self.trainer = DPOTrainer(
                model,
                args=DPOConfig(
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
                    logging_steps=1,
                    disable_tqdm=True,
                    report_to=[],
                ),
                data_collator=collator,
                train_dataset=Dataset.from_list(rows),
                processing_class=_id_tokenizer(model.config.vocab_size),
                callbacks=[Clock()],
            )
            self.trainer.remove_callback(PrinterCallback)
            self.reference_seconds = now(model.device) - start
        collator.conditioned = True
        loss_of = self.trainer.compute_loss

        def recorded(*arguments: Any, **named: Any) -> Tensor:
            loss = loss_of(*arguments, **named)
            self.losses.append(loss.detach())  # what is logged is rounded
            return loss

        self.trainer.compute_loss = recorded  # type: ignore[method-assign]  # to see the losses it trains on

    @contextlib.contextmanager
    def _around(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_quiet())
            if self.compact:  # the trainer picks the scored positions first where this says that there is a GPU
                stack.enter_context(mock.patch("trl.trainer.utils._use_triton", lambda device: True))
            yield

    def __call__(self) -> Trained:
        self.trained, self.losses = Trained(reference_seconds=self.reference_seconds), []
        with self._around(), counting_positions([self.job.model], self.trained):
            self.trainer.train()
        self.job.model.eval()
        self.trained.losses = [loss.item() for loss in self.losses]
        return self.trained


def _id_tokenizer(vocab: int) -> Any:
    """Reads "17 4 9" as those ids; the last two of the vocabulary are padding and end of sequence."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {str(i): i for i in range(vocab - 2)} | {"<pad>": vocab - 2, "<eos>": vocab - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No lines and no bars of the libraries inside ours."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    with mock.patch.dict("os.environ", {"TQDM_DISABLE": "1"}), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            yield
        finally:
            logging.set_verbosity(before)


@dataclass(frozen=True)
class StepContender:
    """``prepare`` a job (untimed), then run it as often as wanted."""

    title: str
    prepare: Callable[[Job], Callable[[], Trained]]
    module: str = "torch"
    package: str = "torch"

    def unavailable(self) -> str | None:
        return None if importlib.util.find_spec(self.module) else f"not installed: pip install {self.package}"


STEP_CONTENDERS = {
    "rows": StepContender("inspo_kernels, rows", lambda job: Ours(job, "rows")),
    "tree": StepContender("inspo_kernels, tree", lambda job: Ours(job, "tree")),
    "loop": StepContender("inspo_kernels, the training loop's step", Loop),
    "trl": StepContender("TRL DPOTrainer + conditioning collator", lambda job: Trl(job, compact=False), "trl", "trl"),
    "trl_compact": StepContender(
        "the same, head on scored positions only (TRL does so on GPUs)",
        lambda job: Trl(job, compact=True),
        "trl",
        "trl",
    ),
    "four_forwards": StepContender("four forwards, log_softmax at every position", FourForwards),
}
