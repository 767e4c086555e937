"""Train InSPO (arXiv 2512.23126) in TRL: ``DPOTrainer`` on the fused loss, each response given the other response.

    from inspo_kernels.integrations.trl import InSPOConfig, InSPOTrainer

    trainer = InSPOTrainer(model, args=InSPOConfig(output_dir), train_dataset=pairs)

All options of ``DPOTrainer`` and ``DPOConfig`` keep their meaning. The trainer overrides ``compute_loss``,
``compute_ref_log_probs``, ``log`` and ``_prepare_dataset``, wraps the data collator, and replaces nothing in TRL.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import tree_unsupported
from ..layouts.alternative_dropout import checked_dropout
from ..models.small_runs import mixes_packed_sequences
from .pair_layouts import CONDITIONED, LAYOUTS, REFERENCES, plain
from .pair_metrics import GAPS, MARGINAL, STATISTICS, PairMetrics
from .pair_pass import Finish, PairPass, accept_pair_pass, pair_loss, reference_logps, renew_copied_forward, token_loss
from .trl_losses import fits_tokens, objective_of, objective_parts

_NEEDS = "inspo_kernels.integrations.trl needs TRL 1.16: pip install 'trl>=1.16,<1.17'"
try:
    from accelerate.utils import is_peft_model
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.models.utils import disable_gradient_checkpointing
    from trl.trainer.utils import use_adapter

    from .conditioning_collator import PARTS, AlternativeCoins, ConditioningCollator, CountingFits, Fits, KeepsAll
except (ImportError, RuntimeError) as error:  # TRL imports its parts when first used, and raises RuntimeError then
    raise ImportError(f"{_NEEDS} ({error.__cause__ or error})") from error

_FIELDS = (
    "beta",
    "discopop_tau",
    "f_alpha_divergence_coef",
    "f_divergence_type",
    "label_smoothing",
    "ld_alpha",
    "loss_type",
    "loss_weights",
    "max_length",
    "precompute_ref_log_probs",
    "use_weighting",
)
_METHODS = ("_prepare_dataset", "compute_loss", "compute_ref_log_probs", "log")
_missing = [f"DPOConfig.{n}" for n in _FIELDS if n not in {f.name for f in dataclasses.fields(DPOConfig)}]
_missing += [f"DPOTrainer.{name}" for name in _METHODS if not hasattr(DPOTrainer, name)]
if _missing:
    raise ImportError(f"{_NEEDS} (the one installed has no {', '.join(_missing)})")

logger = logging.getLogger(__name__)

_FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
# Nats per token by which the other response may lower a response's log-prob before the run is warned.
_GAP_WARNING = -0.25


@dataclass
class InSPOConfig(DPOConfig):
    """``DPOConfig`` with InSPO's options. With a plain ``DPOConfig`` their defaults apply.

    Args:
        conditioned: score each response given the other response; False is ``DPOTrainer`` on the fused loss.
        separator: text between the two responses, such as a turn boundary. It is never scored.
        marginal_weight: weight of the same loss on log pi(y | x), which inference uses.
        layout: how conditioned pairs are laid out. "rows" (padded); "packed" (one row without padding); "tree" and
            "packed_tree" (the prompt once, followed by both orders of the responses). "auto": trees if the model can
            read them, else packed rows with flash attention, else rows. Batches with images are laid out in rows.
        alternative_dropout: probability that a training pair is laid out plain, drawn for each epoch and pair. 0 is
            InSPO and 1 the plain baseline. Evaluation conditions every pair.
    """

    conditioned: bool = field(default=True, metadata={"help": "Score each response given the other (InSPO)."})
    separator: str = field(default="", metadata={"help": "Text between the two responses; never scored."})
    marginal_weight: float = field(default=0.0, metadata={"help": "Weight of the same loss on log pi(y | x)."})
    layout: str = field(
        default="auto", metadata={"help": "How conditioned pairs are laid out.", "choices": list(LAYOUTS)}
    )
    alternative_dropout: float = field(
        default=0.0, metadata={"help": "Probability that a training pair is laid out plain, drawn in each epoch."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alternative_dropout = checked_dropout(self.alternative_dropout)
        if self.alternative_dropout and not self.conditioned:
            raise ValueError("alternative_dropout needs conditioned=True: plain pairs have no alternative to drop")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r}: must be one of {', '.join(LAYOUTS)}")
        if not (math.isfinite(self.marginal_weight) and self.marginal_weight >= 0):
            raise ValueError(f"marginal_weight must be zero or positive, got {self.marginal_weight!r}")
        if self.marginal_weight and not self.conditioned:
            raise ValueError("marginal_weight needs conditioned=True: the plain loss already trains the marginals")


def _option(args: Any, name: str) -> Any:
    """Return InSPO's option, or its default if ``args`` is a plain ``DPOConfig``."""
    return getattr(args, name, InSPOConfig.__dataclass_fields__[name].default)


class InSPOTrainer(DPOTrainer):
    """``DPOTrainer`` whose policy scores each response given the other response.

    It takes the arguments of ``DPOTrainer``; ``args`` is an ``InSPOConfig`` or a ``DPOConfig``. The reference sees the
    prompt alone: its log-probs come from TRL's own batch. A pair is dropped if its prompt and both responses exceed
    ``max_length``; ``dropped_pairs`` holds the counts by dataset.

    It logs the metrics of ``DPOTrainer``. With ``conditioned=True`` it also logs ``marginal/rewards/...`` and
    ``marginal/logps/...``, given the prompt alone as in inference. ``marginal/conditioning_gap/...`` is the mean of
    log pi(y|x, other) - log pi(y|x) in nats per token. Marginals cost extra rows in the head, so they are scored only
    at logged steps and in evaluation. If the loss depends on them (``marginal_weight``, "sft"), each step scores them.

    Raises:
        ValueError: at construction, for a loss type, option or layout that cannot be conditioned.
    """

    _tag_names = ["trl", "dpo", "inspo"]  # noqa: RUF012  # as in TRL
    _name = "InSPO"
    _paper = {  # noqa: RUF012  # as in TRL; the model card of each checkpoint cites it
        "title": "InSPO: Unlocking Intrinsic Self-Reflection for LLM Preference Optimization",
        "id": "2512.23126",
        "citation": (
            "@article{li2025inspo,\n"
            "    title   = {{InSPO: Unlocking Intrinsic Self-Reflection for LLM Preference Optimization}},\n"
            "    author  = {Yu Li and Tian Lan and Zhengling Qi},\n"
            "    year    = 2025,\n"
            "    journal = {arXiv:2512.23126},\n"
            "}"
        ),
    }
    # The type hints of Trainer are wider than the types that DPOTrainer sets.
    args: Any
    model: Any
    train_dataset: Any

    def __init__(self, model: Any = None, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        self.dropped_pairs: dict[str, int] = {}
        for given in (model, ref_model):  # may be copies of a model that this trainer has trained
            renew_copied_forward(given)
        if args is not None and not _option(args, "conditioned"):
            self._tag_names, self._name, self._paper = DPOTrainer._tag_names, DPOTrainer._name, DPOTrainer._paper
        super().__init__(model, ref_model, args, **kwargs)
        args = self.args
        self._parts = objective_parts(args)
        self._objective = objective_of(self._parts)  # one object for all steps: torch.compile compiles for each object
        self._conditioned, self._marginal_weight = _option(args, "conditioned"), _option(args, "marginal_weight")
        self._needs_marginals = self._conditioned and (self._marginal_weight > 0 or fits_tokens(self._parts))
        split = self.accelerator.parallelism_config
        copies = 1 if split is None else split.tp_size
        self._pair_metrics = PairMetrics(args.beta, lambda sums: self.accelerator.reduce(sums, "sum"), copies)
        self._gap_seen = False
        self._coins: AlternativeCoins | None = None
        if dropout := _option(args, "alternative_dropout"):
            self._drop_alternatives(dropout)
        accept_pair_pass(self._causal_lm(self.model))
        if self._conditioned:
            self._condition_batches()

    def _drop_alternatives(self, dropout: float) -> None:
        if self._needs_marginals:
            cause = "marginal_weight" if self._marginal_weight else 'loss_type "sft"'
            raise ValueError(
                f"alternative_dropout: {cause} needs log-probs with and without the other response, and a dropped pair "
                "has none with it; use another loss or alternative_dropout=0"
            )
        self._coins = AlternativeCoins(dropout, self.args.seed)
        self.add_callback(self._coins)

    def get_train_dataloader(self) -> Any:
        """Return DPOTrainer's data loader; with ``alternative_dropout`` its collator lays some pairs out plain."""
        collator: Any = self.data_collator
        if self._coins is not None:
            self.data_collator = dataclasses.replace(collator, coins=self._coins)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def _condition_batches(self) -> None:
        """Wrap the data collator."""
        tokenizer = _tokenizer(self.processing_class)
        vision = not {"image", "images"}.isdisjoint(next(iter(self.train_dataset)))
        if vision and hasattr(self.data_collator, "max_length"):
            self.data_collator.max_length = None  # pairs that are too long are dropped, never cut
        self.data_collator = ConditioningCollator(
            collator=self.data_collator,
            layout=self._layout(vision),
            strict=_option(self.args, "layout") != "auto",
            pad_token_id=tokenizer.pad_token_id,
            separator_ids=_separator_ids(tokenizer, self.args),
            max_length=self.args.max_length if vision else None,  # text pairs are dropped with the dataset
        )

    def _layout(self, vision: bool) -> str:
        wanted, model = _option(self.args, "layout"), self._causal_lm(self.model)
        prompts = is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning
        if vision or prompts:
            if wanted not in ("auto", "rows"):
                kind = "batches with images" if vision else "prompt-learning adapters"
                raise ValueError(f"layout={wanted!r} does not hold {kind}: use layout='rows' or 'auto'")
            return "rows"
        if not self.aux_loss_enabled:
            trees = tree_unsupported(model)
        else:
            trees = "the router loss of a mixture of experts needs a padding mask, which trees do not have: use 'rows'"
        attention = model.config.get_text_config()._attn_implementation
        if wanted == "auto":
            if trees is None:
                return "tree" if attention == "eager" else "packed_tree"
            return "packed" if attention in _FLASH and not mixes_packed_sequences(model) else "rows"
        if wanted in ("tree", "packed_tree") and trees is not None:
            raise ValueError(f"layout={wanted!r}: {trees}")
        if wanted == "packed" and mixes_packed_sequences(model):
            raise ValueError("layout='packed': in this model packed sequences see each other; use layout='rows'")
        return wanted

    def _causal_lm(self, model: Any) -> Any:
        """Return the causal LM inside engines, adapters and ``torch.compile``."""
        model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return model.get_base_model() if is_peft_model(model) else model

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        reference_options = (args.ld_alpha, args.bf16, args.fp16)
        if not _option(args, "conditioned"):
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
            if not args.precompute_ref_log_probs or not isinstance(dataset, Dataset):
                return dataset
            with args.main_process_first(desc=f"identifying {dataset_name} by the reference's options"):
                return dataset.filter(KeepsAll((*reference_options, args.max_length, args.truncation_mode)))
        uncut = copy.copy(args)
        uncut.max_length = None  # TRL would drop prompts of that length before they are counted here
        dataset = super()._prepare_dataset(dataset, processing_class, uncut, dataset_name)
        if any(part not in next(iter(dataset)) for part in PARTS):
            return dataset
        between = len(_separator_ids(_tokenizer(processing_class), args))
        if not isinstance(dataset, Dataset):
            return dataset.filter(CountingFits(args.max_length, between, name=dataset_name))
        fits = Fits(args.max_length, between, reference_options)
        with args.main_process_first(desc=f"dropping pairs of {dataset_name} that are too long"):
            kept = dataset.filter(fits, num_proc=args.dataset_num_proc)
        self.dropped_pairs[dataset_name] = len(dataset) - len(kept)
        if len(kept) < len(dataset):
            message = fits.reason(f"{len(dataset) - len(kept)} of {len(dataset)}", dataset_name)
            if not len(kept):
                raise ValueError(message)
            logger.warning(message)
        return kept

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        """Return the reference's summed log-probs (B,) of chosen and rejected responses, given the prompt alone."""
        accept_pair_pass(self._causal_lm(model))
        adapter: Any = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            policy = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)
        laid_out = plain(inputs)
        finish = partial(reference_logps, ld_alpha=self.args.ld_alpha)
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, adapter, self.accelerator.autocast():
            results = model(**laid_out["inputs"], pair_pass=PairPass(laid_out, finish))
        chosen, rejected = results["logps"].chunk(2)
        return chosen, rejected

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch; with ``return_outputs`` also the model's outputs for TRL's own batch."""
        laid_out = inputs[CONDITIONED] if CONDITIONED in inputs else plain(inputs)
        if "ref_logps" in laid_out:
            ref_logps = torch.tensor(laid_out["ref_logps"], device=self.accelerator.device)
        elif self.args.precompute_ref_log_probs:
            ref_logps = torch.cat([inputs[name] for name in REFERENCES])
        else:
            reference = self.model if self.ref_model is None else self.ref_model
            ref_logps = torch.cat(self.compute_ref_log_probs(reference, inputs))
        mode = "train" if self.model.training else "eval"
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        pair_pass = PairPass(laid_out, self._finish(ref_logps), marginals=self._conditioned and self._marginals(mode))
        results = model(**laid_out["inputs"], **router, pair_pass=pair_pass)
        loss = results["loss"]
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * results["aux_loss"]
        self._pair_metrics.add(mode, results, ref_logps, laid_out["num_tokens"])
        if not return_outputs:
            return loss
        with torch.no_grad():  # compute_metrics gets logits given the prompt alone, as in inference
            return loss, model(**plain(inputs)["inputs"])

    def _finish(self, ref_logps: Tensor) -> Finish:
        loss: Any = partial(pair_loss, objective=self._objective)
        if self.args.ld_alpha is not None or self.args.use_weighting:
            options = {"ld_alpha": self.args.ld_alpha, "use_weighting": self.args.use_weighting}
            loss = partial(token_loss, parts=self._parts, **options)
        return partial(loss, ref_logps=ref_logps, marginal_weight=self._marginal_weight, statistics=STATISTICS)

    def _marginals(self, mode: str) -> bool:
        """Return whether this pass scores marginals: if the loss needs them, at logged steps, and in evaluation."""
        if self._needs_marginals or mode == "eval":
            return True
        step, state, strategy = self.state.global_step + 1, self.state, self.args.logging_strategy
        if strategy == "epoch":
            return step % max(1, round(state.max_steps / max(1, state.num_train_epochs))) == 0
        if strategy == "no" or not state.logging_steps:
            return False
        return step % state.logging_steps == 0 or (step == 1 and self.args.logging_first_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the passes since the last call to ``logs``, and log them."""
        mode = "train" if self.model.training else "eval"
        metrics = self._pair_metrics.flush(mode)
        self._warn_of_gap(metrics)
        logs.update({f"eval_{name}" if mode == "eval" else name: value for name, value in metrics.items()})
        super().log(logs, start_time)

    def _warn_of_gap(self, metrics: dict[str, float]) -> None:
        gaps = [metrics[MARGINAL + name] for name in GAPS if MARGINAL + name in metrics]
        if self._gap_seen or not gaps:
            return
        self._gap_seen = True
        if min(gaps) < _GAP_WARNING:
            logger.warning(
                "the model finds a response less likely after the other response than right after the prompt "
                "(%+.2f nats per token). Conditioned training may then fail to improve answers from the prompt alone, "
                "or make them worse. Watch the marginal/ metrics. Set marginal_weight, or first fit the model to "
                "sequences of the form prompt + draft + answer",
                min(gaps),
            )


def _tokenizer(processing_class: Any) -> Any:
    return getattr(processing_class, "tokenizer", processing_class)


def _separator_ids(tokenizer: Any, args: Any) -> list[int]:
    separator = _option(args, "separator")
    return tokenizer(separator, add_special_tokens=False)["input_ids"] if separator else []
