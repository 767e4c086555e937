"""Test objectives against TRL's DPOTrainer, whose compute_loss runs on given log-probs, in float64 where TRL can."""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import inspo_kernels as ik
from inspo_kernels.objectives import OBJECTIVES, make_objective

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

PROMPT, LENGTHS = 2, ((5, 2), (1, 7), (3, 3), (6, 4), (2, 6))  # tokens of the prompts, and of each pair's responses
PAIRS = len(LENGTHS)


@dataclass
class Batch:
    """Log-probs of policy and reference for a padded batch: (2 PAIRS, T - 1), 0 at positions that are not scored."""

    inputs: dict[str, Tensor]
    policy: Tensor
    reference: Tensor

    def to(self, dtype: torch.dtype) -> Batch:
        return replace(self, policy=self.policy.to(dtype), reference=self.reference.to(dtype))

    @property
    def mask(self) -> Tensor:
        return self.inputs["completion_mask"][:, 1:].bool()

    def sums(self, policy: Tensor) -> ik.PairSums:
        """Return sums of per-token log-probs, through which gradients flow back to ``policy``."""
        chosen, rejected = policy.double().sum(1).chunk(2)
        ref_chosen, ref_rejected = self.reference.double().sum(1).chunk(2)
        chosen_len, rejected_len = self.mask.sum(1).double().chunk(2)
        return ik.PairSums(
            chosen=chosen,
            rejected=rejected,
            chosen_len=chosen_len,
            rejected_len=rejected_len,
            index=torch.arange(PAIRS),
            ref_chosen=ref_chosen,
            ref_rejected=ref_rejected,
        )


def make_batch(seed: int, spread: float = 0.3) -> Batch:
    g = torch.Generator().manual_seed(seed)
    lengths = [w for w, _ in LENGTHS] + [l for _, l in LENGTHS]
    longest = PROMPT + max(lengths)
    position = torch.arange(longest).expand(2 * PAIRS, -1)
    ends = PROMPT + torch.tensor(lengths).unsqueeze(1)
    completion_mask = ((position >= PROMPT) & (position < ends)).long()
    scored = completion_mask[:, 1:].bool()
    policy = -3 * torch.rand(scored.shape, generator=g, dtype=torch.float64) * scored
    noise = spread * torch.randn(scored.shape, generator=g, dtype=torch.float64) * scored
    inputs = {
        "input_ids": torch.randint(4, 9, position.shape, generator=g),
        "attention_mask": (position < ends).long(),
        "completion_mask": completion_mask,
    }
    return Batch(inputs, policy, policy + noise)


@pytest.fixture(scope="module")
def model_and_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<unk>", *"abcdef"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    config = transformers.LlamaConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config), fast


@pytest.fixture
def make_trainer(model_and_tokenizer, tmp_path):
    """Return a function that makes a DPOTrainer from DPOConfig's options."""
    datasets = pytest.importorskip("datasets")
    model, tokenizer = model_and_tokenizer
    rows = datasets.Dataset.from_list([{"prompt": "a b", "chosen": " c d", "rejected": " e f"}])

    def make(**options):
        config = trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], **options)
        reference = copy.deepcopy(model)
        return trl.DPOTrainer(model, ref_model=reference, args=config, train_dataset=rows, processing_class=tokenizer)

    return make


def loss_of(trainer, batch: Batch) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Return the trainer's loss, gradient per token and metrics, for models that return the given log-probs."""

    def outputs(log_probs: Tensor):
        nothing = torch.zeros_like(log_probs.detach())
        return SimpleNamespace(log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())

    policy = batch.policy.clone().requires_grad_()
    trainer.ref_model = lambda **_: outputs(batch.reference)
    default = torch.get_default_dtype()
    torch.set_default_dtype(batch.policy.dtype)  # dtype of the constants that TRL turns into tensors
    try:
        value = trainer.compute_loss(lambda **_: outputs(policy), batch.inputs)
    finally:
        torch.set_default_dtype(default)
    (gradient,) = torch.autograd.grad(value, policy)
    return value.detach(), gradient, {name: values[-1] for name, values in trainer._metrics["train"].items()}


@pytest.fixture
def trl_loss(make_trainer):
    return lambda batch, **options: loss_of(make_trainer(**options), batch)


def our_loss(batch: Batch, objective: ik.Objective) -> tuple[Tensor, Tensor]:
    policy = batch.policy.clone().requires_grad_()
    value = objective(batch.sums(policy)).mean()
    (gradient,) = torch.autograd.grad(value, policy)
    return value.detach(), gradient * batch.mask  # a sum's gradient reaches padding, too


def assert_equal(batch: Batch, objective: ik.Objective, theirs: tuple[Tensor, Tensor, dict[str, float]], rtol: float):
    value, gradient = our_loss(batch, objective)
    torch.testing.assert_close(value, theirs[0].to(value.dtype), rtol=rtol, atol=rtol)
    torch.testing.assert_close(gradient, (theirs[1] * batch.mask).to(gradient.dtype), rtol=rtol, atol=rtol)
    chosen, rejected = objective.rewards(batch.sums(batch.policy))
    ours = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
    }
    for name, reward in ours.items():
        assert theirs[2][name] == pytest.approx(reward.item(), rel=max(rtol, 1e-6), abs=1e-7), name


# TRL's names, if they differ from ours. TRL lacks "one_sided", "ipo" on sums, "simpo", "rdpo" and "orpo".
TRL_NAMES = {"dpo": "sigmoid", "ipo_mean": "ipo"}
OURS_ALONE = {"one_sided", "ipo", "simpo", "rdpo", "orpo"}
FROM_TRL = [name for name in OBJECTIVES if name not in OURS_ALONE]


def test_every_loss_type_of_trl_has_an_objective(trl_loss):
    with pytest.raises(ValueError, match="Unknown loss type: none") as error:
        trl_loss(make_batch(0), loss_type=["none"])
    listed = ast.literal_eval(str(error.value).split("one of ")[1])
    assert {TRL_NAMES.get(name, name) for name in FROM_TRL} == set(listed)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", FROM_TRL)
def test_defaults_equal_trl(name, seed, trl_loss):
    """TRL refuses its own default of label_smoothing for exo_pair; its documentation names 1e-3, the default here."""
    options = {"label_smoothing": 1e-3} if name == "exo_pair" else {}
    batch = make_batch(seed)
    theirs = trl_loss(batch, loss_type=[TRL_NAMES.get(name, name)], **options)
    assert_equal(batch, make_objective(name), theirs, 1e-12)


@pytest.mark.parametrize(
    "options, objective",
    [
        ({"loss_type": ["sigmoid"], "label_smoothing": 0.3}, ik.DPO()),  # which TRL ignores there
        ({"loss_type": ["robust"], "label_smoothing": 0.2, "beta": 0.5}, ik.Robust(beta=0.5, label_smoothing=0.2)),
        ({"loss_type": ["exo_pair"], "label_smoothing": 0.2, "beta": 2.0}, ik.EXO(beta=2.0, label_smoothing=0.2)),
        ({"loss_type": ["aot"], "label_smoothing": 0.2, "beta": 0.5}, ik.AOT(beta=0.5, label_smoothing=0.2)),
        ({"loss_type": ["aot_unpaired"], "label_smoothing": 0.2}, ik.AOTUnpaired(label_smoothing=0.2)),
        ({"loss_type": ["discopop"], "discopop_tau": 0.7, "beta": 0.5}, ik.DiscoPOP(beta=0.5, tau=0.7)),
        ({"loss_type": ["ipo"], "beta": 0.5}, ik.IPOMean(tau=0.5)),
        ({"loss_type": ["sft"], "beta": 0.5}, ik.SFT(beta=0.5)),
        (
            {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
            ik.Mixture([("dpo", 0.8), ("bco_pair", 0.2), ("sft", 1.0)]),
        ),
        ({"loss_type": ["aot", "sigmoid_norm"]}, ik.Mixture([(ik.AOT(), 1.0), (ik.SigmoidNorm(), 1.0)])),
    ],
    ids=lambda value: "+".join(value["loss_type"]) if isinstance(value, dict) else "",
)
def test_parameters_and_mixtures_equal_trl(options, objective, trl_loss):
    batch = make_batch(2, spread=1.0)
    assert_equal(batch, objective, trl_loss(batch, **options), 1e-12)


DIVERGENT = ("dpo", "robust", "hinge", "exo_pair", "discopop", "sigmoid_norm", "ipo_mean")


@pytest.mark.parametrize("name", DIVERGENT)
@pytest.mark.parametrize(
    "divergence, alpha", [("forward_kl", 0.5), ("js", 0.5), ("alpha", 0.5), ("alpha", 0.2), ("alpha", 1.0)]
)
def test_divergences_equal_trl(name, divergence, alpha, trl_loss):
    types = {"forward_kl": "forward_kl", "js": "js_divergence", "alpha": "alpha_divergence"}
    options = {"label_smoothing": 1e-3} if name == "exo_pair" else {}
    # TRL computes alpha divergences in float32 alone.
    exact = divergence != "alpha" or alpha == 1.0
    batch = make_batch(3).to(torch.float64 if exact else torch.float32)
    theirs = trl_loss(
        batch,
        loss_type=[TRL_NAMES.get(name, name)],
        f_divergence_type=types[divergence],
        f_alpha_divergence_coef=alpha,
        **options,
    )
    objective = make_objective(name, divergence=divergence, divergence_alpha=alpha)
    assert_equal(batch, objective, theirs, 1e-12 if exact else 1e-5)


@pytest.mark.parametrize("name", [name for name in FROM_TRL if name not in (*DIVERGENT, "sft")])
def test_divergence_is_refused_where_trl_refuses_it(name, trl_loss):
    with pytest.raises(ValueError, match=f"objective '{name}' takes no 'divergence'"):
        make_objective(name, divergence="js")
    with pytest.raises(ValueError, match="only supported for the following loss types"):
        trl_loss(make_batch(0), loss_type=[TRL_NAMES.get(name, name)], f_divergence_type="js_divergence")


def test_bco_pair_keeps_no_running_mean(make_trainer):
    """With the running mean of BCO's paper, a loss would depend on the trainer's earlier batches."""
    trainer, batch, other = make_trainer(loss_type=["bco_pair"]), make_batch(4), make_batch(5, spread=2.0)
    first, _, again = (loss_of(trainer, b) for b in (batch, other, batch))
    assert first[0] == again[0]
    assert_equal(batch, ik.BCO(), again, 1e-12)
