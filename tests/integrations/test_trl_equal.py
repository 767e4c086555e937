"""Compare InSPOTrainer without conditioning with TRL's DPOTrainer: losses, gradients and metrics of each step."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.multiprocessing
from trl_setup import LENGTHS, MOE, assert_same, both, make, model, pairs, run

from inspo_kernels.integrations.trl import InSPOConfig, InSPOTrainer
from inspo_kernels.integrations.trl_losses import LOSS_TYPES
from inspo_kernels.objectives import OBJECTIVES, SFT
from inspo_kernels.objectives.margin import Divergent

NAMES = list(LOSS_TYPES)
DIVERGENT = [name for name, objective in LOSS_TYPES.items() if issubclass(OBJECTIVES[objective], (Divergent, SFT))]
SMOOTHED = {"label_smoothing": 0.1}


def lora():
    import peft

    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_equals_trl(tmp_path, loss_type):
    assert_same(*both(tmp_path, loss_type=[loss_type], beta=0.3, **SMOOTHED))


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.3]},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": ["aot", "hinge"], "loss_weights": [1.0, -0.5], **SMOOTHED},
        {"loss_type": ["robust"], "loss_weights": [2.5], **SMOOTHED},
        {"f_divergence_type": "forward_kl", "beta": 0.02},
        {"f_divergence_type": "js_divergence", "loss_type": ["ipo"]},
        {"f_divergence_type": "alpha_divergence", "loss_type": ["hinge", "sft"], "f_alpha_divergence_coef": 0.7},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
        {"use_weighting": True},
        {"use_weighting": True, "loss_type": ["sigmoid", "ipo"]},
        {"ld_alpha": 0.4},
        {"ld_alpha": 0.0, "loss_type": ["ipo", "sft"], "loss_weights": [0.5, 1.0]},
        {"ld_alpha": 0.4, "use_weighting": True},
        {"precompute_ref_log_probs": True},
        {"precompute_ref_log_probs": True, "ld_alpha": 0.3},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 2},
        {"gradient_checkpointing": True},
        {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5, "max_steps": 3},
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.sweep),
        {"max_length": 9},
        {"max_length": 9, "truncation_mode": "keep_end"},
        {"discopop_tau": 0.3, "loss_type": ["discopop"]},
        {"eval_strategy": "steps", "eval_steps": 1, "trainer": {"eval_dataset": pairs(LENGTHS[:5], seed=3)}},
    ],
    ids=str,
)
def test_options_equal_trl(tmp_path, options):
    assert_same(*both(tmp_path, reference=model(seed=5), **options))


@pytest.mark.sweep
def test_a_compiled_mixture_compiles_once(tmp_path):
    options = {"loss_type": ["sigmoid", "ipo"], "loss_weights": [0.8, 0.3], "conditioned": False}
    options |= {"torch_compile": True, "torch_compile_backend": "eager", "num_train_epochs": 9}
    graphs = []
    for steps in (3, 6):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        make(
            InSPOTrainer, InSPOConfig, tmp_path, policy=model(), reference=model(seed=5), max_steps=steps, **options
        ).train()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[1]


# Each loss type together with two others: a mixture adds its parts, and treats all types alike.
@pytest.mark.sweep
@pytest.mark.parametrize("second_is", [1, 4])
@pytest.mark.parametrize("first", LOSS_TYPES)
def test_mixtures_of_two_equal_trl(tmp_path, first, second_is):
    second = NAMES[(NAMES.index(first) + second_is) % len(NAMES)]
    assert_same(*both(tmp_path, loss_type=[first, second], loss_weights=[0.7, 0.4], beta=0.3, **SMOOTHED))


@pytest.mark.sweep
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("options", [{}, {"ld_alpha": 0.4}, {"use_weighting": True}], ids=str)
def test_every_combination_of_options_equals_trl(tmp_path, loss_type, divergence, options):
    if divergence != "reverse_kl" and loss_type not in DIVERGENT:
        pytest.skip("TRL has no such divergence")
    if "use_weighting" in options and loss_type in ("aot", "aot_unpaired", "hinge", "sft"):
        pytest.skip("TRL refuses to weigh aot, and fails in sft and hinge, whose losses it multiplies in place")
    options = {"loss_type": [loss_type], "f_divergence_type": divergence, "beta": 0.1, **SMOOTHED, **options}
    if divergence == "forward_kl":  # exponents of log-ratios: a large step would also amplify rounding
        options["learning_rate"] = 1e-3
    assert_same(*both(tmp_path, **options))


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}], ids=str)
def test_lora_equals_trl(tmp_path, options):
    assert_same(*both(tmp_path, trainer={"peft_config": lora()}, learning_rate=0.02, **options))


def test_continued_adapter_equals_trl(tmp_path):
    import peft

    torch.manual_seed(0)
    policy = peft.get_peft_model(model(), lora())
    assert_same(*both(tmp_path, policy=policy, trainer={}, learning_rate=0.02))


@pytest.mark.parametrize("options", [{}, {"use_weighting": True}], ids=str)
def test_mixture_of_experts_equals_trl(tmp_path, options):
    policy, reference = (model("mixtral", seed, **MOE) for seed in (0, 5))
    theirs, ours = both(tmp_path, policy=policy, reference=reference, **options)
    assert "aux_loss" in ours.logs[0]
    assert_same(theirs, ours)


def test_prompt_tuning_equals_trl(tmp_path):
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert_same(*both(tmp_path, trainer={"peft_config": config}))


def test_metrics_for_compute_metrics_equal_trl(tmp_path):
    def largest(prediction):
        return {"largest": float(prediction.predictions.max())}

    from trl import DPOConfig, DPOTrainer

    found = []
    policy, reference = model(), model(seed=5)
    for trainer, config, options in (
        (DPOTrainer, DPOConfig, {}),
        (InSPOTrainer, InSPOConfig, {"conditioned": False}),
        (InSPOTrainer, InSPOConfig, {}),
    ):
        extra = {"compute_metrics": largest, "eval_dataset": pairs(LENGTHS[:4], seed=3)}
        made = make(
            trainer,
            config,
            tmp_path,
            policy=copy.deepcopy(policy),
            reference=copy.deepcopy(reference),
            trainer=extra,
            **options,
        )
        found.append(made.evaluate())
    assert found[0]["eval_largest"] == found[1]["eval_largest"] == found[2]["eval_largest"]
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=1e-5)


def test_evaluating_another_dataset_equals_trl(tmp_path):
    from trl import DPOConfig, DPOTrainer

    policy, reference, other = model(), model(seed=5), pairs(LENGTHS[:3], seed=7)
    made = [
        make(trainer, config, tmp_path, policy=copy.deepcopy(policy), reference=copy.deepcopy(reference), **options)
        for trainer, config, options in (
            (DPOTrainer, DPOConfig, {}),
            (InSPOTrainer, InSPOConfig, {"conditioned": False}),
        )
    ]
    theirs, ours = (trainer.evaluate(other) for trainer in made)
    for name, value in theirs.items():
        if "per_second" not in name and "runtime" not in name:
            assert ours[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name


@pytest.mark.parametrize("copied", ["policy", "reference"])
def test_a_copy_of_a_trained_model_equals_trl(tmp_path, copied):
    """The next round of iterated DPO: a deep copy keeps the forward that the trainer gave to the original."""
    from trl import DPOConfig, DPOTrainer

    rounds = []
    for trainer, config, options in ((DPOTrainer, DPOConfig, {}), (InSPOTrainer, InSPOConfig, {"conditioned": False})):
        first = run(trainer, config, tmp_path, policy=model(), reference=model(seed=5), **options)
        models = {"policy": first.trainer.model, "reference": model(seed=6), copied: copy.deepcopy(first.trainer.model)}
        rounds.append(run(trainer, config, tmp_path, **models, **options))
    assert_same(*rounds)
    made, ids = rounds[1].trainer.model, torch.tensor([[1, 2, 3]])
    fresh = model()
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(made.eval()(ids).logits, fresh(ids).logits)
