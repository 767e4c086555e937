"""``ResumableTrainer``: transformers' ``Trainer`` with verified checkpoints and exact resuming."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import upload_folder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel, SchedulerType, Trainer, get_scheduler
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.training_args import OptimizerNames

from .checkpoint import resume_hint, rotate, save_checkpoint
from .config import TrainConfig
from .engine import all_finite, raise_on_all_ranks
from .errors import InputError, NonFiniteError, SaveError, as_input_error, first_of
from .output import RunLog


class ResumableTrainer(Trainer):
    """Writes Trainer's checkpoints to a temporary folder, adds ``run_state`` and a manifest, and renames the folder."""

    config: TrainConfig
    run_log: RunLog
    model: nn.Module
    optimizer: Optimizer

    def run_state(self) -> dict[str, Any]:
        """Return the state of the run that a checkpoint adds to Trainer's, in JSON types."""
        raise NotImplementedError

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a verified checkpoint. If that fails, as on a full disk, warn and let the run go on."""
        folder, step = self.config.folder, self.state.global_step
        if folder is None:
            return
        if not all_finite(self.model):
            raise NonFiniteError(f"after step {step} the model's parameters are not finite; {resume_hint(folder)}")

        def write(to: Path) -> None:
            self._get_output_dir = lambda trial: str(to)  # type: ignore[method-assign]
            try:
                super(ResumableTrainer, self)._save_checkpoint(model, trial)
            finally:
                del self._get_output_dir

        began = time.monotonic()
        try:
            size = save_checkpoint(folder / f"checkpoint-{step}", write, self.run_state())
        except SaveError as error:
            self.run_log.say(f"WARNING: {error}; the run goes on. If it ended now: {resume_hint(folder)}")
            return
        self.run_log.say(f"checkpoint-{step}: {size / 2**30:.2f} GiB in {time.monotonic() - began:.1f} s")
        if self.args.should_save:
            rotate(folder, self.config.save_total_limit)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the trained parameters and the buffers of the module for a checkpoint."""
        if self.args.should_save and output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            tensors = trained_tensors(self.model, self.model.state_dict() if state_dict is None else state_dict)
            save_file(tensors, Path(output_dir) / "model.safetensors")

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository of ``push_to_hub``. Raises InputError on all ranks if that fails."""
        remedy = "; log in with `hf auth login`, or leave push_to_hub out and upload final/ later"
        with raise_on_all_ranks(), as_input_error("push_to_hub: the repository could not be created: ", remedy):
            super().init_hf_repo(token, private)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: only the trained model is uploaded."""

    def upload(self) -> None:
        """Upload ``final/`` to the repository that Trainer has created. If that fails, warn."""
        final = Path(self.args.output_dir or "") / "final"
        try:
            upload_folder(
                repo_id=self.hub_model_id or "",
                folder_path=final,
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                commit_message="Trained model",
            )
            self.run_log.say(f"{final} is uploaded to {self.hub_model_id}")
        except Exception as error:  # the network fails in many ways, and the model is on the disk
            self.run_log.say(f"WARNING: {final} could not be uploaded ({type(error).__name__}: {error})")

    # ---- resuming ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing yet: the reference needs the weights from before training. ``restore`` loads the checkpoint."""

    def _init_training_state(self, max_steps: int, *more: Any) -> tuple[int, int]:
        """Initialise the state as Trainer does, but with the intervals of these options instead of the checkpoint's."""
        counts = super()._init_training_state(max_steps, *more)
        self.state.compute_steps(self.args, max_steps)
        return counts

    def restore(self, path: Path) -> None:
        """Load the checkpoint ``path`` into module, optimizer and schedule. Raises InputError if it does not fit."""
        if self.is_deepspeed_enabled:
            deepspeed_load_checkpoint(self.model_wrapped, str(path))
        elif self.is_fsdp_enabled:
            super()._load_from_checkpoint(str(path), self.model_wrapped)
        else:
            load_trained(self.model, path)
        # The optimizer's state comes from the checkpoint; learning rates and the like come from the run's settings.
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        rates: list[Any] = getattr(self.lr_scheduler, "base_lrs", [])
        self._load_optimizer_and_scheduler(str(path))
        for group, own in zip(self.optimizer.param_groups, settings):
            group.update(own)
        if type(self.lr_scheduler) is LambdaLR:
            self.lr_scheduler.base_lrs = rates
            _step_to(self.lr_scheduler, self.lr_scheduler.last_epoch)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Return the schedule of ``lr_scheduler_type``, with a warm-up that begins above 0: no update is wasted."""
        steps = self.args.get_warmup_steps(num_training_steps)
        if not steps or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        own, self.args.warmup_steps = self.args.warmup_steps, steps + 1
        try:  # a schedule that is one step longer, without its first step
            schedule = super().create_scheduler(num_training_steps + 1, optimizer)
        finally:
            self.args.warmup_steps = own
        if type(schedule) is LambdaLR:
            _step_to(schedule, 1)
        return schedule


def check_optimizer(config: TrainConfig, model: PreTrainedModel, steps: int) -> None:
    """Create optimizer and schedule for a single weight. Raises InputError for what the run would fail with later."""
    chosen = f"optim={OptimizerNames(config.optim).value}, "
    chosen += f"lr_scheduler_type={SchedulerType(config.lr_scheduler_type).value}: "
    with as_input_error(chosen):
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(config, model)
        optimizer = kind([nn.Parameter(torch.zeros(2, 2))], **{k: v for k, v in settings.items() if k != "params"})
        get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=config.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )


def _step_to(schedule: LambdaLR, step: int) -> None:
    """Set the optimizer's learning rates to those of ``schedule`` at ``step``."""
    schedule.last_epoch = step - 1
    with warnings.catch_warnings():  # torch warns if the schedule steps before the optimizer
        warnings.simplefilter("ignore", UserWarning)
        schedule.step()


def trained_tensors(module: nn.Module, state_dict: dict[str, Any]) -> dict[str, Tensor]:
    """Return trained parameters and buffers of ``state_dict``; a tied parameter once, under its first name."""
    registered = dict(module.named_buffers(remove_duplicate=False))
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    # The state of quantised layers also has scales, which are neither.
    buffers = [name for name in module.state_dict() if name in registered]
    found = {name: state_dict.get(name) for name in [*trained, *buffers]}
    return {name: value.detach().contiguous() for name, value in found.items() if isinstance(value, Tensor)}


def load_trained(module: nn.Module, path: Path) -> None:
    """Load the model of checkpoint ``path`` into ``module``. Raises InputError if it does not fit."""
    tensors = load_file(path / "model.safetensors")
    misfit = f"{path} does not fit the model, or the part of it that is trained: "
    if differing := sorted(tensors.keys() ^ trained_tensors(module, module.state_dict()).keys()):
        raise InputError(misfit + f"only one of them has {first_of(differing)}")
    with as_input_error(misfit):
        module.load_state_dict(tensors, strict=False)
