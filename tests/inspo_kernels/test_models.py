"""Test hidden_and_head on tiny random models: its results must give each architecture's own logits."""

from __future__ import annotations

import threading

import pytest
import torch
from tiny_models import MODEL_TYPES, VOCAB, make_model, model_inputs, transformers
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from inspo_kernels import condition_pairs, fused_inspo_loss, hidden_and_head


def compose(hidden, head):
    """Compute logits from the results of hidden_and_head by the documented formula."""
    logits = hidden @ head["weight"].T
    if head["bias"] is not None:
        logits = logits + head["bias"]
    logits = logits * head["logit_scale"]
    return logits if head["softcap"] is None else head["softcap"] * torch.tanh(logits / head["softcap"])


@pytest.fixture(scope="module")
def pairs():
    generator = torch.Generator().manual_seed(1)
    lengths = [(5, 3, 7), (2, 6, 1), (1, 1, 4)]
    return [tuple(torch.randint(3, 79, (n,), generator=generator) for n in pair) for pair in lengths]


@pytest.fixture(scope="module")
def rows(pairs):
    batch = condition_pairs(pairs, pad_token_id=2)
    assert (batch["attention_mask"] == 0).any()
    return batch


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_hidden_and_head_give_the_models_own_logits(model_type, rows):
    model = make_model(model_type)
    real = rows["attention_mask"].bool()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model = model.to(dtype)
        with torch.no_grad():
            own = model(**model_inputs(rows)).logits
            hidden, head = hidden_and_head(model, **model_inputs(rows))
        assert hidden.shape == (*rows["input_ids"].shape, head["weight"].shape[1])
        assert head["weight"] is model.get_output_embeddings().weight
        error = (compose(hidden, head) - own).abs()[real].max() / own.abs()[real].max()
        assert own.dtype == hidden.dtype == dtype
        assert error <= tolerance


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_option_that_shapes_the_logits_matters_here(model_type, rows):
    model = make_model(model_type)
    hidden, head = hidden_and_head(model, **model_inputs(rows))
    neutral = {"bias": None, "softcap": None, "logit_scale": 1.0}
    expected = {
        "cohere": {"logit_scale"},
        "cohere2": {"logit_scale"},
        "gemma2": {"softcap"},
        "gemma3_text": {"softcap"},
        "gptj": {"bias"},
        "granite": {"logit_scale"},
        "granitemoe": {"logit_scale"},
        "phi": {"bias"},
    }.get(model_type, set())
    assert {key for key, value in neutral.items() if head[key] is not value and head[key] != value} == expected
    for key in expected:
        change = compose(hidden, head) - compose(hidden, head | {key: neutral[key]})
        assert change.abs().max() > 0.05


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_packed_sequences_give_the_hidden_states_of_rows(model_type, pairs, rows):
    model = make_model(model_type, torch.float64)
    packed = condition_pairs(pairs, pad_token_id=2, layout="packed")
    if model_type == "opt":
        with pytest.raises(ValueError, match=f"{model_type!r} lets packed sequences attend to each other"):
            hidden_and_head(model, **model_inputs(packed))
        return
    with torch.no_grad():
        by_row, _ = hidden_and_head(model, **model_inputs(rows))
        together, _ = hidden_and_head(model, **model_inputs(packed))
    torch.testing.assert_close(together[0], by_row[rows["attention_mask"].bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_equal_those_through_the_models_own_logits(model_type, tied, rows):
    model = make_model(model_type, torch.float64, tied=tied)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    probe = torch.randn(*rows["input_ids"].shape, VOCAB, dtype=torch.float64) * rows["attention_mask"][..., None]
    trainable = [p for name, p in model.named_parameters() if "vision" not in name and "multi_modal" not in name]

    def gradients(logits):
        return torch.autograd.grad((logits * probe).sum(), trainable, allow_unused=True)

    own = gradients(model(**model_inputs(rows)).logits)
    composed = gradients(compose(*hidden_and_head(model, **model_inputs(rows))))
    scale = max(gradient.abs().max() for gradient in own if gradient is not None)
    for mine, theirs in zip(composed, own, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=float(1e-6 * scale))
    assert sum(mine is not None and bool(mine.abs().max() > 0) for mine in composed) >= 0.9 * len(trainable)


@pytest.mark.parametrize("model_type", ["gemma2", "granite", "phi"])
def test_fused_logps_equal_the_models_in_every_form(model_type, pairs, rows):
    model = make_model(model_type, torch.float64)
    with torch.no_grad():
        logps = model(**model_inputs(rows)).logits[:, :-1].log_softmax(-1)
    expected = []
    for key in ("labels", "marginal_labels"):
        labels = rows[key][:, 1:]
        picked = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        expected.append(picked.where(labels != -100, 0).sum(1))
    expected[1] = expected[1].roll(len(pairs))  # chosen first: the first rows hold the rejected responses' marginals
    ref_logps = torch.zeros(2 * len(pairs))
    packed = condition_pairs(pairs, pad_token_id=2, layout="packed")
    for batch in (rows, packed):
        hidden, head = hidden_and_head(model, **model_inputs(batch))
        scored = {key: batch[key] for key in ("labels", "marginal_labels", "cu_seqlens") if key in batch}
        out = fused_inspo_loss(hidden[0] if batch is packed else hidden, ref_logps=ref_logps, **scored, **head)
        torch.testing.assert_close(out.logps, expected[0], rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(out.marginal_logps, expected[1], rtol=1e-6, atol=1e-5)


def test_the_models_own_mode_decides_about_dropout(rows):
    model = make_model("gpt2")
    first, second = (hidden_and_head(model, **model_inputs(rows))[0] for _ in range(2))
    assert torch.equal(first, second)
    model.train()
    first, second = (hidden_and_head(model, **model_inputs(rows))[0] for _ in range(2))
    assert not torch.equal(first, second)
    assert model.training


def test_the_trunk_runs_once_without_cache_or_logits(rows):
    model = make_model("llama")
    states, logits = [], []
    model.model.register_forward_hook(lambda module, args, output: states.append(output))
    model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output))
    for _ in range(2):
        hidden_and_head(model, **model_inputs(rows))
    assert [output.past_key_values for output in states] == [None, None]
    assert logits[0].numel() <= 6 * VOCAB  # the head is verified on six rows, once
    assert logits[1].numel() == 0


def test_mask_and_positions_reach_the_trunk(rows):
    model = make_model("llama")
    holed = rows["attention_mask"].clone()
    holed[:, 0] = 0
    plain = hidden_and_head(model, **model_inputs(rows))[0]
    for change in ({"attention_mask": holed}, {"position_ids": 3 * rows["position_ids"]}):
        inputs = model_inputs(rows) | change
        real = inputs["attention_mask"].bool()
        hidden, head = hidden_and_head(model, inputs["input_ids"], inputs["attention_mask"], inputs["position_ids"])
        torch.testing.assert_close(compose(hidden, head)[real], model(**inputs).logits[real])
        assert (hidden - plain)[real].abs().max() > 1e-2


def test_further_arguments_reach_the_trunk(rows):
    model = make_model("llama")
    inputs = model_inputs(rows)
    expected, _ = hidden_and_head(model, **inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(hidden_and_head(model, **inputs, inputs_embeds=embeds)[0], expected)


@pytest.mark.parametrize("name", ["labels", "logits_to_keep"])
def test_arguments_about_logits_are_refused(name, rows):
    with pytest.raises(TypeError, match=f"so {name} would have no effect"):
        hidden_and_head(make_model("llama"), rows["input_ids"], **{name: rows["labels"]})


class Tailed(transformers.LlamaForCausalLM):
    """A model with an extra operation between head and logits."""

    change = staticmethod(lambda logits, states: logits)

    def forward(self, **inputs):
        states = self.model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).last_hidden_state
        return CausalLMOutput(logits=self.change(self.lm_head(states), states))


def tailed(change):
    model = make_model("llama")
    model.__class__, model.change = Tailed, change
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda logits, states: 0.71 * logits,
        lambda logits, states: 1.3 * (2.5 * (logits / 1.3)),
        lambda logits, states: 11.0 * torch.tanh(logits / 11.0),
        lambda logits, states: 3.0 * torch.tanh(0.4 * logits / 3.0),
        lambda logits, states: logits[..., : VOCAB - 5],
        lambda logits, states: logits.index_fill(-1, torch.arange(VOCAB - 5, VOCAB), float("-inf")),
    ],
)
def test_scale_cap_and_padding_are_detected(change, rows):
    model = tailed(change)
    real = rows["attention_mask"].bool()
    own = model(**model_inputs(rows)).logits
    composed = compose(*hidden_and_head(model, **model_inputs(rows)))
    own = own[..., : composed.shape[-1]]
    torch.testing.assert_close(composed[real], own[real], rtol=0, atol=float(1e-5 * own[real].detach().abs().max()))
    assert composed.shape[-1] in (VOCAB, VOCAB - 5)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits, states: logits + 0.01 * logits.square(),
        lambda logits, states: logits + states.mean(),
        lambda logits, states: logits.log_softmax(-1),
        lambda logits, states: torch.cat([logits, logits[..., :1]], -1),
        lambda logits, states: logits.flip(-1),
    ],
)
def test_other_logits_are_refused_with_the_difference(change, rows):
    with pytest.raises(ValueError, match=r"'llama': its (logits differ .* by \d|head has 83 words).*fused_inspo_loss"):
        hidden_and_head(tailed(change), **model_inputs(rows))


def test_a_learned_scale_is_refused_by_name(rows):
    model = tailed(lambda logits, states: logits * model.temperature)
    model.temperature = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match="its logits depend on temperature beside"):
        hidden_and_head(model, **model_inputs(rows))


def test_a_changed_config_is_verified_again(rows):
    model = make_model("granite")
    assert hidden_and_head(model, **model_inputs(rows))[1]["logit_scale"] == pytest.approx(1 / 3.7)
    model.config.logits_scaling = 2.5
    assert hidden_and_head(model, **model_inputs(rows))[1]["logit_scale"] == 0.4


class ScaledLinear(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


class FrozenLinear(nn.Module):
    """A head without parameters, as quantized layers are."""

    def __init__(self, dtype):
        super().__init__()
        self.register_buffer("weight", torch.randn(VOCAB, 32).mul(50).to(dtype))

    def forward(self, hidden):
        return nn.functional.linear(hidden, self.weight.to(hidden.dtype))


def test_a_head_without_parameters_gives_its_logits(rows):
    model = make_model("llama")
    model.lm_head = FrozenLinear(torch.float32)
    own, composed = model(**model_inputs(rows)).logits, compose(*hidden_and_head(model, **model_inputs(rows)))
    torch.testing.assert_close(composed, own)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (FrozenLinear(torch.int8), r"FrozenLinear, which has a weight of torch.int8 \(83, 32\) instead of a float"),
        (nn.Sequential(nn.Linear(32, VOCAB)), r"output head is .*Sequential, which has no weight"),
        (ScaledLinear(32, VOCAB), r"ScaledLinear, is not a linear map .* differs from .* by \d\.\de"),
        (None, "has no single output head"),
    ],
)
def test_a_nonlinear_head_is_refused(head, message, rows):
    model = make_model("llama")
    model.lm_head = head
    with pytest.raises(ValueError, match=message + ".*fused_inspo_loss"):
        hidden_and_head(model, **model_inputs(rows))


def test_a_parametrized_head_gets_its_gradients(rows):
    model = make_model("llama", torch.float64)
    nn.utils.parametrizations.weight_norm(model.lm_head)
    parameters = list(model.lm_head.parameters())
    own, mine = (
        torch.autograd.grad(logits.square().mean(), parameters)
        for logits in (
            model(**model_inputs(rows)).logits,
            compose(*hidden_and_head(model, **model_inputs(rows))),
        )
    )
    assert len(own) == 2
    torch.testing.assert_close(mine, own)


def test_a_model_without_a_head_is_refused(rows):
    with pytest.raises(ValueError, match="has no single output head"):
        hidden_and_head(make_model("llama").model, **model_inputs(rows))


def test_verification_leaves_no_trace(rows):
    model = make_model("gpt2").train()  # with dropout
    state, before = torch.get_rng_state(), {name: buffer.clone() for name, buffer in model.named_buffers()}
    first = hidden_and_head(model, **model_inputs(rows))[0]
    torch.set_rng_state(state)
    assert torch.equal(first, hidden_and_head(model, **model_inputs(rows))[0])  # as many random numbers
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert not model.lm_head._forward_hooks and not model.lm_head._forward_pre_hooks


def test_threads_may_share_a_model(rows):
    """Another thread runs the whole model while this thread is about to run the head."""
    model = make_model("llama")
    expected = model(**model_inputs(rows)).logits
    found = []

    def other():
        with torch.no_grad():
            found.append(model(**model_inputs(rows)).logits)
            found.append(compose(*hidden_and_head(model, **model_inputs(rows))))

    def meanwhile(*_):
        handle.remove()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    handle = model.base_model.register_forward_hook(meanwhile)
    found.append(compose(*hidden_and_head(model, **model_inputs(rows))))
    assert len(found) == 3
    for logits in found:
        torch.testing.assert_close(logits, expected)


def test_packing_is_tried_without_a_trace(rows):
    model = make_model("gpt2").train()
    packed = {"input_ids": torch.ones(1, 4).long(), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    state = torch.get_rng_state()
    first = hidden_and_head(model, **packed)[0]
    torch.set_rng_state(state)
    assert torch.equal(first, hidden_and_head(model, **packed)[0])
    assert all(module.training for module in model.modules())


def test_router_losses_stay_reachable(rows):
    model = make_model("mixtral")
    hidden, _, outputs = hidden_and_head(model, **model_inputs(rows), output_router_logits=True, return_outputs=True)
    expected = model(**model_inputs(rows), output_router_logits=True).aux_loss
    torch.testing.assert_close(outputs.aux_loss, expected)
    assert outputs.aux_loss.requires_grad
    model.config.output_router_logits = True  # a router loss that nobody asks for is not computed
    assert torch.equal(hidden_and_head(model, **model_inputs(rows))[0], hidden)


@pytest.mark.parametrize("called_before", [True, False])
def test_compiled_steps_equal_eager_steps(called_before, rows):
    torch._dynamo.reset()
    model = make_model("gemma2")

    def step(input_ids, attention_mask):
        return compose(*hidden_and_head(model, input_ids, attention_mask)).log_softmax(-1)

    inputs = rows["input_ids"], torch.ones_like(rows["attention_mask"])
    own = model(*inputs).logits.log_softmax(-1)
    if called_before:
        step(*inputs)
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs), own)


class Engine(nn.Module):
    """Forwards attributes to the module it wraps, as DeepSpeed's engine does."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


@pytest.mark.parametrize("wrap", [Engine, nn.DataParallel, torch.compile])
def test_a_wrapped_model_is_refused_with_advice(wrap, rows):
    with pytest.raises(TypeError, match=r"is a wrapper.*one nn\.Module whose forward calls hidden_and_head"):
        hidden_and_head(wrap(make_model("llama")), **model_inputs(rows))


def test_a_sharded_model_is_refused(rows, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = fully_shard(make_model("llama"), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match="is a wrapper"):
            hidden_and_head(model, **model_inputs(rows))
    finally:
        torch.distributed.destroy_process_group()


def test_other_objects_are_refused(rows):
    with pytest.raises(TypeError, match="expected a transformers causal LM, got torch"):
        hidden_and_head(nn.Linear(2, 2), **model_inputs(rows))


def test_an_encoder_decoder_is_refused(rows):
    """Without ids for its decoder, BART shows the encoder all ids and lets the decoder repeat them."""
    sizes = {"vocab_size": VOCAB, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {f"{part}_{size}": 2 for part in ("encoder", "decoder") for size in ("attention_heads", "ffn_dim")}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes))
    with pytest.raises(TypeError, match=r"got the encoder-decoder transformers\.models\.bart"):
        hidden_and_head(model, input_ids=rows["input_ids"], attention_mask=rows["attention_mask"])


@pytest.mark.parametrize("argument", ["use_cache", "return_dict"])
def test_arguments_that_the_call_sets_itself_are_refused(argument):
    with pytest.raises(TypeError, match=f"{argument}.*remove it"):
        hidden_and_head(make_model("llama"), torch.ones(1, 3).long(), **{argument: True})
