"""Define whole training steps that make the same SGD updates of the same model on the same pairs.

- ``rows`` and ``tree``: ``condition_pairs``, ``hidden_and_head``, ``fused_inspo_loss``, all pairs in one forward.
- ``loop``: the step of ``training.train``, which groups pairs of similar length into micro-batches.
- ``trl``: TRL's DPOTrainer, unmodified, with a collator that puts the other response into the context. On a CPU it
  sends every position through the head. ``trl_compact`` lets it select the scored positions first, as on GPUs.
- ``trainer_rows`` and ``trainer``: InSPOTrainer on the same rows, and in the layout that it chooses.
- ``four_forwards``: the step of the published InSPO code: separate forwards for chosen and rejected sequences, for
  policy and reference, with float32 log_softmax at every position.

All but the last compute the reference's log-probs once, before training, because the reference sees no alternative and
never changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import inspo_kernels as ik
from training.data import Pair as TrainingPair
from training.layouts import choose_layout
from training.pairs import lengths_of
from training.scoring import Batch, Batcher, PairModel, score

from .contenders import BETA, not_installed
from .step_jobs import Job, Pair, Trained, counting_positions, layout_loss, moved, now
from .step_trainers import TrainerStep

LOOP_TOKENS = 4096  # of a forward pass of ``loop``


class Step:
    """Take an SGD step per batch of a job. ``counted`` are the models whose positions are counted."""

    reference_seconds = 0.0

    def __init__(self, job: Job) -> None:
        self.job, self.counted = job, [job.model]

    def backward(self, i: int) -> Tensor:
        """Compute the gradients of batch i and return its loss."""
        raise NotImplementedError

    def __call__(self) -> Trained:
        job, trained = self.job, Trained(reference_seconds=self.reference_seconds)
        optimizer = torch.optim.SGD(job.model.parameters(), lr=job.learning_rate)
        start = now(job.model.device)
        with counting_positions(self.counted, trained):
            for i in range(len(job.batches)):
                loss = self.backward(i)
                optimizer.step()
                optimizer.zero_grad()
                trained.losses.append(loss.item())
        trained.seconds = now(job.model.device) - start
        return trained


class Ours(Step):
    """Our step in one layout."""

    def __init__(self, job: Job, layout: str) -> None:
        super().__init__(job)
        self.layout = layout
        start = now(job.model.device)
        with torch.no_grad():
            self.ref_logps = [self._forward(batch, conditioned=False).logps for batch in job.batches]
        self.reference_seconds = now(job.model.device) - start

    def _forward(self, pairs: list[Pair], *, conditioned: bool, ref_logps: Tensor | None = None) -> ik.InSPOOutput:
        model, pad = self.job.model, self.job.model.config.pad_token_id
        batch = ik.condition_pairs(pairs, pad_token_id=pad, conditioned=conditioned, layout=self.layout)
        # Only the sums of the reference are needed, so an objective without a reference suffices.
        objective = ik.SimPO() if ref_logps is None else ik.DPO(beta=BETA)
        return layout_loss(model, moved(batch, model.device), objective=objective, ref_logps=ref_logps)

    def backward(self, i: int) -> Tensor:
        loss = self._forward(self.job.batches[i], conditioned=True, ref_logps=self.ref_logps[i]).loss
        loss.backward()
        return loss


class Loop(Step):
    """The step of ``training.train``: micro-batches of pairs of similar length, in the cheaper layout.

    It does not score the marginals, like the training loop on steps that are not logged.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
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

    def backward(self, i: int) -> Tensor:
        batch, total = self.batches[i], torch.zeros(())
        for part in self.batcher.plan(batch, conditioned=True):
            tensors = self.batcher([batch[k] for k in part.pairs], conditioned=True, marginals=False)
            ref_logps = self.ref_logps[i][:, part.pairs].reshape(-1)
            loss, _ = self.module(Batch(tensors, ref_logps, scale=1 / len(batch)))
            loss.backward()
            total = total + loss.detach().cpu()
        return total


class FourForwards(Step):
    """A step with four forwards (policy and reference, chosen and rejected) and log_softmax at every position."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.reference = copy.deepcopy(job.model).requires_grad_(False)
        self.counted.append(self.reference)

    def _sums(self, model: PreTrainedModel, pairs: list[Pair], *, conditioned: bool) -> tuple[Tensor, Tensor]:
        """Return log-probs (B,) of chosen and rejected responses, each from its own forward with its own padding."""
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

    def backward(self, i: int) -> Tensor:
        pairs = self.job.batches[i]
        chosen, rejected = self._sums(self.job.model, pairs, conditioned=True)
        with torch.no_grad():
            ref_chosen, ref_rejected = self._sums(self.reference, pairs, conditioned=False)
        loss = -F.logsigmoid(BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()
        loss.backward()
        return loss


@dataclass(frozen=True)
class StepContender:
    """A title, and ``prepare``, which sets up a job (untimed) and returns the call to time.

    ``tolerance`` limits the relative difference of losses and weights from ``four_forwards`` in float64.
    """

    title: str
    prepare: Callable[[Job], Callable[[], Trained]]
    package: str = "torch"
    tolerance: float = 1e-9

    def unavailable(self) -> str | None:
        return not_installed(self.package)


def _trainer(title: str, *, compact: bool = False, layout: str | None = None) -> StepContender:
    """Return a contender that runs in TRL, which keeps sums and the reference's log-probs in float32."""
    prepare = partial(TrainerStep, compact=compact, layout=layout)
    return StepContender(title, prepare, "trl", tolerance=1e-4)


STEP_CONTENDERS = {
    "rows": StepContender("inspo_kernels, rows", lambda job: Ours(job, "rows")),
    "tree": StepContender("inspo_kernels, tree", lambda job: Ours(job, "tree")),
    "loop": StepContender("inspo_kernels, the training loop's step", Loop),
    "trl": _trainer("TRL DPOTrainer + conditioning collator"),
    "trl_compact": _trainer("the same, head on scored positions only (TRL does so on GPUs)", compact=True),
    "trainer_rows": _trainer("InSPOTrainer, rows", layout="rows"),
    "trainer": _trainer("InSPOTrainer, the layout it chooses", layout="auto"),
    "four_forwards": StepContender("four forwards, log_softmax at every position", FourForwards),
}
# Not in the table of whole steps: these are compared with ``trl_compact`` alone.
TRAINERS = ("trainer_rows", "trainer")
