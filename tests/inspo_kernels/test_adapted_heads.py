"""Test peft adapters on a model and on its output head."""

from __future__ import annotations

import pytest
import torch
from test_models import compose
from tiny_models import make_model

from inspo_kernels import hidden_and_head, linear_logps

peft = pytest.importorskip("peft")

IDS = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(0))


def adapted(kind=peft.LoraConfig, *, tied=False, fresh=False, model_type="llama", **options):
    if kind is peft.LoraConfig:
        options = {"r": 2} | options
    torch.manual_seed(0)
    model = peft.get_peft_model(
        make_model(model_type, torch.float64, tied=tied),
        kind(task_type="CAUSAL_LM", **options),
        autocast_adapter_dtype=False,
    )
    return model if fresh else changed(model)


def changed(model):
    """Randomise fresh adapters, which otherwise change nothing, as if trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def assert_logits_and_gradients_agree(model):
    own, composed = model(input_ids=IDS).logits, compose(*hidden_and_head(model, IDS))
    torch.testing.assert_close(composed, own, rtol=0, atol=float(1e-6 * own.detach().abs().max()))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [torch.autograd.grad(logits.sin().sum(), trained) for logits in (own, composed)]
    for theirs, mine in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=float(1e-6 * theirs.abs().max()))


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["lm_head"], "use_rslora": True, "lora_bias": True},
        {"target_modules": ["lm_head"], "tied": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4], "tied": True},
        {"target_modules": ["lm_head"], "model_type": "gemma2"},
        {"target_modules": ["lm_head"], "model_type": "phi"},
    ],
    ids=str,
)
def test_adapters_give_the_models_logits_and_gradients(options, fresh):
    assert_logits_and_gradients_agree(adapted(fresh=fresh, **options))


def test_the_model_inside_the_wrapper_is_accepted():
    model = adapted(target_modules=["q_proj", "lm_head"])
    one, other = (compose(*hidden_and_head(each, IDS)) for each in (model, model.get_base_model()))
    assert torch.equal(one, other)


def test_the_head_follows_which_adapters_act():
    model = adapted(target_modules=["lm_head"])
    config = peft.LoraConfig(r=3, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model.add_adapter("other", config, autocast_adapter_dtype=False)
    model.set_adapter("other")
    assert_logits_and_gradients_agree(changed(model))
    model.base_model.set_adapter(["default", "other"])
    assert_logits_and_gradients_agree(model)
    for act in (model.disable_adapter, model.merge_adapter):
        context = act()
        if context is None:
            torch.testing.assert_close(compose(*hidden_and_head(model, IDS)), model(input_ids=IDS).logits)
        else:
            with context:
                assert hidden_and_head(model, IDS)[1]["weight"] is model.get_base_model().lm_head.base_layer.weight
                torch.testing.assert_close(compose(*hidden_and_head(model, IDS)), model(input_ids=IDS).logits)


def test_dropout_acts_only_on_the_adapter():
    model = adapted(target_modules=["lm_head"], lora_dropout=0.5).eval()
    assert_logits_and_gradients_agree(model)
    exact = model(input_ids=IDS).logits
    model.train()
    hidden, head = hidden_and_head(model, IDS)
    assert model.get_base_model().lm_head.lora_dropout["default"].training
    base = model.get_base_model().lm_head.base_layer(hidden[..., :32])
    adapter = hidden[..., 32:] @ head["weight"][:, 32:].T
    torch.testing.assert_close(hidden[..., :32] @ head["weight"][:, :32].T, base)
    assert (base + adapter - exact).abs().max() > 1e-3  # some of the adapter's inputs are dropped


def test_fused_logps_train_an_adapter_on_the_head():
    model = adapted(target_modules=["lm_head"])
    hidden, head = hidden_and_head(model, IDS)
    linear_logps(hidden[:, :-1], targets=IDS[:, 1:], **head).sum().backward()
    mine = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    logps = model(input_ids=IDS).logits[:, :-1].log_softmax(-1)
    logps.gather(-1, IDS[:, 1:, None]).sum().backward()
    theirs = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert len(mine) == 2
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (peft.LoraConfig, {"use_dora": True}),
        (peft.IA3Config, {"feedforward_modules": []}),
        (peft.LoHaConfig, {}),
    ],
)
def test_other_adapters_on_the_head_are_refused(kind, options, fresh):
    model = adapted(kind, fresh=fresh, target_modules=["lm_head"], **options)
    with pytest.raises(ValueError, match=r"head.*modules_to_save.*leave the head out of target_modules") as error:
        hidden_and_head(model, IDS)
    assert "weight=" not in str(error.value)  # the base's weight alone would be wrong
    merged = model.merge_and_unload()
    torch.testing.assert_close(compose(*hidden_and_head(merged, IDS)), merged(input_ids=IDS).logits)


def test_prompt_tuning_is_refused():
    model = adapted(peft.PromptTuningConfig, num_virtual_tokens=3)
    with pytest.raises(TypeError, match="learns a prompt, whose positions have no token"):
        hidden_and_head(model, IDS)
