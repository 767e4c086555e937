"""Test every causal LM type of the installed transformers: log-probs, and trees if the type reads them."""

from __future__ import annotations

import any_model
import pytest
import torch
from any_model import MODEL_TYPES, build
from test_models import compose
from test_tree import scored_hidden

from inspo_kernels import condition_pairs, hidden_and_head, linear_logps, tree_unsupported

# One type for each way in which models differ.
SOME = [
    "bart",
    "bloom",
    "deepseek_v3",
    "falcon_h1",
    "gpt_bigcode",
    "gpt_oss",
    "hyperclovax",
    "llama4_text",
    "mamba",
    "nanochat",
    "roberta",
    "xlnet",
]
PAIRS = [
    tuple(torch.randint(3, 79, (length,), generator=torch.Generator().manual_seed(length)) for length in lengths)
    for lengths in ((5, 13, 17), (12, 16, 1), (1, 1, 14), (20, 2, 3))
]
# Types that need a handwritten tiny configuration, or a package that the tests do not install.
FEWEST_BUILT = 150
FEWEST_TREES = 85


def check(model_type):
    """Return "exact" or the reason of the refusal, and whether the model reads trees."""
    model = build(model_type)
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = mask[2, 4:] = 0
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=mask).logits
        try:
            composed = compose(*hidden_and_head(model, ids, mask))
        except ValueError as error:
            return str(error), False
    own = own[..., : composed.shape[-1]]
    error = (composed.log_softmax(-1) - own.log_softmax(-1))[mask.bool()].abs().max()
    assert error < 2e-5, f"{model_type}: {error:.1e}"
    if tree_unsupported(model) is not None:
        return "exact", False
    check_tree(model, model_type)
    return "exact", True


def check_tree(model, model_type):
    tree = condition_pairs(PAIRS, pad_token_id=2, layout="tree")
    with torch.no_grad():
        hidden, head = scored_hidden(model, tree)
        found = linear_logps(hidden, targets=tree["labels"], **head)
        sums = torch.zeros(4 * len(PAIRS)).index_add(0, tree["segment_ids"], found)[: 2 * len(PAIRS)]
        expected = []
        for pair in PAIRS:  # a row at a time, since some attention gives NaN where padding is longer than its window
            rows = condition_pairs([pair], pad_token_id=2)
            hidden, head = hidden_and_head(model, rows["input_ids"], rows["attention_mask"], rows["position_ids"])
            targets = rows["labels"].roll(-1, 1)
            expected.append(linear_logps(hidden, targets=targets, **head).sum(1))
    error = (sums - torch.stack(expected, 1).flatten()).abs().max()
    assert error < 1e-3, f"{model_type}: {error:.1e} nats"


@pytest.mark.parametrize("model_type", SOME)
def test_a_model_gives_its_own_logps(model_type):
    assert check(model_type)[0] == "exact"


def test_a_head_over_several_streams_is_refused():
    assert "its head is given states" in check("prophetnet")[0]


@pytest.mark.sweep
def test_every_buildable_type_gives_its_own_logps(capsys):
    outcomes, trees, unbuilt = {}, [], {}
    for model_type in MODEL_TYPES:
        try:
            outcomes[model_type], reads_trees = check(model_type)
        except AssertionError:
            raise
        except Exception as error:  # no model can be made of a tiny configuration
            unbuilt[model_type] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            continue
        trees += [model_type] * reads_trees
    refused = {name: reason for name, reason in outcomes.items() if reason != "exact"}
    with capsys.disabled():
        print(f"\n{len(outcomes) - len(refused)} types exact, {len(trees)} of them as trees, too")
        for title, reasons in (("refused", refused), ("not built", unbuilt)):
            for name, reason in reasons.items():
                print(f"{title}: {name}: {reason[:160]}")
    assert len(outcomes) >= FEWEST_BUILT
    assert refused.keys() <= {"prophetnet"}
    assert len(trees) >= FEWEST_TREES


def test_a_first_call_on_padding_finds_the_scale():
    """Hidden states of padding are 0, and any scale fits logits of 0."""
    model = build("granite").eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[0].zero_()
        hidden_and_head(model, input_ids=torch.zeros(1, 4, dtype=torch.int64))
        ids = torch.randint(1, 20, (2, 7))
        hidden, head = hidden_and_head(model, input_ids=ids)
        expected = model(input_ids=ids).logits
    logits = head["logit_scale"] * hidden @ head["weight"].T
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "option"),
    [("glm_moe_dsa", "index_topk"), ("doge", "keep_window_size"), ("llama4_text", "floor_scale")],
)
def test_options_that_act_on_long_rows_forbid_packing(monkeypatch, model_type, option):
    """A trial of a few tokens is shorter than 40, but a packed row is longer than its sequences."""
    monkeypatch.setitem(any_model.OPTIONS, model_type, {option: 40})
    ids, position_ids = torch.randint(3, 79, (1, 100)), torch.arange(20).repeat(5)[None]
    with pytest.raises(ValueError, match="lets packed sequences attend to each other"):
        hidden_and_head(build(model_type), ids, position_ids=position_ids)
