"""Test trees: the context of each scored row, both forms of the mask, and whole models against rows."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import MODEL_TYPES, VOCAB, make_model, model_inputs, transformers
from torch.nn.functional import scaled_dot_product_attention

from inspo_kernels import (
    condition_pairs,
    fused_inspo_loss,
    hidden_and_head,
    linear_logps,
    tree_attention_mask,
    tree_unsupported,
)
from inspo_kernels.layouts.path_attention import PathMask
from inspo_kernels.layouts.tree import MAX_DENSE_TOKENS, block_mask, dense_mask

PAD = 2
TREES = ("tree", "packed_tree")
ids = st.lists(st.integers(0, 9), min_size=1, max_size=5)
any_pairs = st.lists(st.tuples(ids, ids, ids), min_size=1, max_size=3)
separators = st.lists(st.integers(0, 9), max_size=2)


def random_pairs(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(3, 79, (n,), generator=generator) for n in pair) for pair in lengths]


# One-token segments in every place, and prompts both longer and shorter than the responses.
PAIRS = random_pairs([(5, 3, 7), (2, 6, 1), (1, 1, 4), (9, 1, 1)])


def events_of_rows(batch, num_pairs):
    """Count how often each segment scores each token after each context in the rows layout."""
    events = Counter()
    for row in range(2 * num_pairs):
        tokens = batch["input_ids"][row].tolist()
        pair, marginal = row % num_pairs, 3 if row < num_pairs else 2
        for kind, key in ((row // num_pairs, "labels"), (marginal, "marginal_labels")):
            labels = [] if batch[key] is None else batch[key][row].tolist()
            for t, label in enumerate(labels):
                if label != -100:
                    events[kind * num_pairs + pair, tuple(tokens[:t]), label] += 1
    return events


def events_of_tree(batch):
    """Return the same counts for a tree, where the mask gives a row's context in order of positions."""
    mask = dense_mask(batch["tree_ends"], batch["position_ids"], None)[:, 0].flatten(0, 1)
    length = batch["input_ids"].shape[1]
    events = Counter()
    for row, label, segment in zip(batch["rows"].tolist(), batch["labels"].tolist(), batch["segment_ids"].tolist()):
        seen = mask[row]
        positions = batch["position_ids"][row // length][seen]
        assert positions.tolist() == [*range(len(positions))]
        assert bool(seen[row % length])
        events[segment, tuple(batch["input_ids"][row // length][seen].tolist()), label] += 1
    return events


@settings(deadline=None)
@given(any_pairs, separators, st.booleans(), st.sampled_from(TREES))
def test_scored_rows_see_only_their_own_sequence(pairs, separator, conditioned, layout):
    options = {"pad_token_id": PAD, "separator_ids": separator, "conditioned": conditioned}
    tree = condition_pairs(pairs, layout=layout, **options)
    assert events_of_tree(tree) == events_of_rows(condition_pairs(pairs, **options), len(pairs))
    assert tree["num_pairs"] == len(pairs)
    assert "attention_mask" not in tree
    seen = dense_mask(tree["tree_ends"], tree["position_ids"], None)[:, 0]
    for row, length in enumerate([seen.shape[1]] if layout == "packed_tree" else tree["tree_ends"][:, 0].tolist()):
        for token in range(length):
            on = tree["paths"][tree["path_of"][row, token]][: tree["position_ids"][row, token] + 1]
            assert torch.equal(on, seen[row, token].nonzero().flatten() + row * seen.shape[1])


@settings(deadline=None)
@given(any_pairs, separators, st.booleans())
def test_trees_hold_the_prompt_once_and_isolate_padding(pairs, separator, conditioned):
    options = {"pad_token_id": PAD, "separator_ids": separator, "conditioned": conditioned}
    tree, packed = (condition_pairs(pairs, layout=layout, **options) for layout in TREES)
    copies = 2 if conditioned else 1
    lengths = [len(x) + copies * (len(w) + len(l) + len(separator) * (copies - 1)) for x, w, l in pairs]
    assert tree["input_ids"].shape == (len(pairs), max(lengths))
    assert packed["input_ids"].shape == (1, sum(lengths))
    mask = dense_mask(tree["tree_ends"], tree["position_ids"], None)[:, 0]
    for row, length in enumerate(lengths):
        assert tree["input_ids"][row, length:].eq(PAD).all()
        assert tree["position_ids"][row, length:].eq(0).all()
        rest = max(lengths) - length
        assert torch.equal(mask[row, length:, length:], torch.eye(rest, dtype=torch.bool))
        assert not mask[row, length:, :length].any() and not mask[row, :length, length:].any()
        for name in ("input_ids", "position_ids"):
            start = sum(lengths[:row])
            assert torch.equal(packed[name][0, start : start + length], tree[name][row, :length])


def test_a_small_tree_by_hand():
    batch = condition_pairs([([5, 6], [7], [8, 9])], pad_token_id=0, separator_ids=[3], layout="tree")
    assert batch["input_ids"].tolist() == [[5, 6, 8, 9, 3, 7, 7, 3, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 4, 5]]
    assert batch["tree_ends"].tolist() == [[10, 10, 6, 6, 6, 6, 10, 10, 10, 10]]
    scored = zip(batch["rows"].tolist(), batch["labels"].tolist(), batch["segment_ids"].tolist())
    assert sorted(scored) == [(1, 7, 2), (1, 8, 3), (2, 9, 3), (4, 7, 0), (7, 8, 1), (8, 9, 1)]


@pytest.mark.parametrize("layout", TREES)
def test_truncation_and_errors_are_those_of_every_layout(layout):
    options = {"pad_token_id": 0, "max_length": 5, "separator_ids": [9]}
    long = [([1, 2, 3, 4], [5, 6], [7]), ([1], [2], [3])]
    with pytest.raises(ValueError, match=r"pair 0: .* take 8 tokens, above max_length=5"):
        condition_pairs(long, layout=layout, **options)
    kept = condition_pairs(long, layout=layout, truncation="drop", **options)
    assert torch.equal(kept["input_ids"], condition_pairs(long[1:], layout=layout, **options)["input_ids"])
    assert (kept["dropped"], kept["truncated"]) == ([0], 0)
    cut = condition_pairs(long, layout=layout, truncation="prompt_left", **options)
    whole = condition_pairs([([4], [5, 6], [7]), long[1]], layout=layout, **options)
    assert torch.equal(cut["input_ids"], whole["input_ids"])
    assert (cut["dropped"], cut["truncated"]) == ([], 1)


@settings(deadline=None, max_examples=40)
@given(any_pairs, st.booleans(), st.sampled_from(TREES), st.sampled_from([None, 2]))
def test_attention_over_paths_equals_that_of_the_dense_mask(pairs, conditioned, layout, window):
    batch = condition_pairs(pairs, pad_token_id=PAD, conditioned=conditioned, layout=layout)
    rows, length = batch["position_ids"].shape
    real = torch.zeros(rows * length, dtype=torch.bool).index_fill(0, batch["paths"].flatten(), True)
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(rows, 2, length, 3, generator=generator, dtype=torch.float64) for _ in range(4)]
    upstream = states.pop() * real.view(rows, 1, length, 1)  # nothing reads what padding attends to
    results = []
    for mask in (
        PathMask.of(batch["paths"], batch["path_of"], batch["position_ids"], window),
        dense_mask(batch["tree_ends"], batch["position_ids"], window),
    ):
        leaves = [state.clone().requires_grad_() for state in states]
        value = (scaled_dot_product_attention(*leaves, attn_mask=mask) * upstream).sum()
        results.append((value, *torch.autograd.grad(value, leaves)))
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(*[st.integers(1, 150)] * 3), min_size=1, max_size=2),
    st.sampled_from(TREES),
    st.sampled_from([None, 1, 40, 130, 1000]),
)
def test_the_block_mask_equals_the_dense_mask(lengths, layout, window):
    batch = condition_pairs([[[1] * n for n in pair] for pair in lengths], pad_token_id=0, layout=layout)
    ends, positions = batch["tree_ends"], batch["position_ids"]
    dense = dense_mask(ends, positions, window)
    mask = block_mask(ends, positions, window)
    rows, length = ends.shape
    grid = torch.meshgrid(*map(torch.arange, (rows, 1, length, length)), indexing="ij")
    assert torch.equal(mask.mask_mod(*grid), dense)

    blocks = -(-length // 128)
    padded = torch.nn.functional.pad(dense, (0, -length % 128) * 2)
    seen = padded.unflatten(3, (blocks, 128)).unflatten(2, (blocks, 128)).sum((3, 5))
    part, whole = (
        torch.zeros(rows, 1, blocks, blocks + 1, dtype=torch.bool).scatter(
            3, indices.long().where(torch.arange(blocks) < counts[..., None], blocks), True
        )[..., :blocks]
        for counts, indices in (
            (mask.kv_num_blocks, mask.kv_indices),
            (mask.full_kv_num_blocks, mask.full_kv_indices),
        )
    )
    assert not (part & whole).any()
    assert not (whole & (seen < 128 * 128)).any()
    assert ((part | whole) >= (seen > 0)).all()
    if window is None:
        assert torch.equal(part | whole, seen > 0)
        assert torch.equal(whole, seen == 128 * 128)
    assert mask.shape == (rows, 1, length, length)


def scored_hidden(model, batch):
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    hidden, head = hidden_and_head(model, attention_mask=tree_attention_mask(batch, model), **inputs)
    return hidden.flatten(0, 1).index_select(0, batch["rows"]), head


def loss_of(model, pairs, layout, **options):
    """Return the loss in any layout. A tree's output has the same fields as the rows layout's."""
    conditioned = options.pop("conditioned", True)
    separator = options.pop("separator_ids", ())
    batch = condition_pairs(pairs, pad_token_id=PAD, layout=layout, conditioned=conditioned, separator_ids=separator)
    if layout == "rows":
        hidden, head = hidden_and_head(model, **model_inputs(batch))
        return fused_inspo_loss(
            hidden, labels=batch["labels"], marginal_labels=batch["marginal_labels"], **options, **head
        )
    hidden, head = scored_hidden(model, batch)
    scored = {name: batch[name] for name in ("labels", "segment_ids", "num_pairs")}
    return fused_inspo_loss(hidden, **scored, **options, **head)


def use_attention(model, attention):
    try:
        model.set_attn_implementation(attention)
    except ValueError:
        pytest.skip(f"{type(model).__name__} has no {attention} attention")
    if model.config.get_text_config()._attn_implementation != attention:
        pytest.skip(f"{type(model).__name__} cannot change its attention implementation")
    return model


@pytest.fixture
def all_float64(monkeypatch):
    """Norms, rotary embeddings and eager softmax compute in float32 whatever the model's dtype; here in float64.

    Integers too become float64 where the model's code says float32: it multiplies position ids by float64 frequencies.
    """
    to, softmax = torch.Tensor.to, torch.nn.functional.softmax

    def exact_to(tensor, *args, **kwargs):
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in kwargs.items()}
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", exact_to)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))


@pytest.fixture
def flex_in_eager_mode():
    """Run flex_attention's mathematics without its compiler, from the BlockMask's token-wise function."""
    with torch.compiler.set_stance("force_eager"):
        yield


def close(one, other, tolerance):
    scale = float(torch.as_tensor(other).abs().max())
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_architecture_gives_the_logps_of_rows(model_type, attention, all_float64, flex_in_eager_mode):
    model = make_model(model_type, torch.float64)
    if not (model_type == "gptj" and attention == "eager"):
        use_attention(model, attention)
    assert tree_unsupported(model) is None
    options = {"objective": "simpo", "separator_ids": [7, 8]}
    with torch.no_grad():
        # A row at a time: where a window is shorter than the padding, eager rows are NaN in float64.
        rows = [loss_of(model, [pair], "rows", **options) for pair in PAIRS]
        trees = [loss_of(model, PAIRS, layout, **options) for layout in TREES]
    for name in ("logps", "marginal_logps"):
        expected = torch.stack([getattr(out, name) for out in rows], 1).flatten()
        for tree in trees:
            close(getattr(tree, name), expected, 1e-9)


SEVEN = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "mixtral"]


def real_pairs():
    """Return real pairs as bytes, with a few lengths that a tiny model processes quickly."""
    file = os.environ.get("INSPO_PAIRS")
    if not file:
        pytest.skip("set INSPO_PAIRS to a .jsonl file of prompt, chosen, rejected")
    with open(file, encoding="utf-8") as lines:
        texts = [json.loads(line) for line in lines]

    def encode(text):
        return [byte % VOCAB for byte in (text if isinstance(text, str) else json.dumps(text)).encode()]

    pairs = [tuple(encode(text[name]) for name in ("prompt", "chosen", "rejected")) for text in texts]
    return sorted((pair for pair in pairs if all(pair)), key=lambda pair: sum(map(len, pair)))[:3]


def fit(model_type, pairs, layout, dtype, steps):
    """Return the loss, the first step's gradients and the last step's weights."""
    torch.manual_seed(0)
    model = make_model(model_type, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    reference = torch.linspace(-40, -50, 2 * len(pairs), dtype=torch.float64)
    for step in range(steps):
        out = loss_of(model, pairs, layout, ref_logps=reference, marginal_weight=0.5, separator_ids=[7])
        out.loss.backward()
        if step == 0:
            loss = out.loss.detach()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return loss, gradients, {name: p.detach() for name, p in model.named_parameters()}


def assert_fits_agree(model_type, pairs, dtype, tolerance, steps):
    rows, *trees = (fit(model_type, pairs, layout, dtype, steps) for layout in ("rows", *TREES))
    assert len(rows[1]) == len(rows[2])  # every parameter got a gradient
    start = make_model(model_type, dtype).state_dict()
    moved = [(weight - start[name]).abs().max() > 1e-4 * start[name].abs().max() for name, weight in rows[2].items()]
    assert sum(moved) > 0.8 * len(moved)
    for tree in trees:
        close(tree[0], rows[0], tolerance)
        for mine, theirs in zip(tree[1:], rows[1:]):
            for name, expected in theirs.items():
                close(mine[name], expected, tolerance)


@pytest.mark.parametrize("model_type", SEVEN)
def test_trees_train_as_rows_for_20_steps(model_type, all_float64):
    assert_fits_agree(model_type, PAIRS, torch.float64, 1e-9, steps=20)


@pytest.mark.parametrize("model_type", SEVEN)
def test_float32_trees_train_as_rows(model_type):
    assert_fits_agree(model_type, PAIRS, torch.float32, 1e-5, steps=20)


@pytest.mark.parametrize("model_type", SEVEN)
def test_real_pairs_train_as_they_do_in_rows(model_type, all_float64):
    assert_fits_agree(model_type, real_pairs(), torch.float64, 1e-9, steps=2)


@pytest.mark.parametrize("layout", TREES)
def test_the_reference_from_plain_trees(layout):
    model = make_model("llama", torch.float64)
    with torch.no_grad():
        out = loss_of(model, PAIRS, "rows", objective="simpo", conditioned=False)
        batch = condition_pairs(PAIRS, pad_token_id=PAD, conditioned=False, layout=layout)
        hidden, head = scored_hidden(model, batch)
        logps = linear_logps(hidden, targets=batch["labels"], **head)
    sums = torch.zeros(2 * len(PAIRS), dtype=torch.float64).index_add(0, batch["segment_ids"], logps)
    close(sums, out.logps, 1e-9)
    assert loss_of(model, PAIRS, layout, objective="simpo", conditioned=False).marginal_logps is None


def test_gradient_checkpointing_and_autocast():
    rows = fit("llama", PAIRS, "rows", torch.float32, 1)
    model = make_model("llama")
    model.train()  # checkpoints are made in training mode alone; this model has no dropout
    model.gradient_checkpointing_enable()
    reference = torch.linspace(-40, -50, 2 * len(PAIRS), dtype=torch.float64)
    options = {"ref_logps": reference, "marginal_weight": 0.5, "separator_ids": [7]}
    loss_of(model, PAIRS, "tree", **options).loss.backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, rows[1][name], 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        outs = [loss_of(model, PAIRS, layout, **options) for layout in ("rows", *TREES)]
    exact = loss_of(model, PAIRS, "rows", **options).logps
    error = (outs[0].logps - exact).abs().max()
    assert error > 0  # autocast was on
    for out in outs[1:]:
        assert (out.logps - exact).abs().max() <= 2 * error


@pytest.mark.sweep
@pytest.mark.skipif(shutil.which("g++") is None, reason="flex_attention on a CPU is compiled with g++")
def test_compiled_flex_attention_gives_the_logps_of_rows():
    model = use_attention(make_model("llama"), "flex_attention")
    pairs = random_pairs([(150, 40, 90), (20, 70, 30), (1, 1, 130)])  # several blocks of 128, some of them empty
    with torch.no_grad():
        tree = loss_of(model, pairs, "packed_tree", objective="simpo")
        rows = loss_of(use_attention(model, "sdpa"), pairs, "rows", objective="simpo")
    for name in ("logps", "marginal_logps"):
        close(getattr(tree, name), getattr(rows, name), 1e-5)


def tiny(model_type, **options):
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(model_type, **sizes | options)
    return transformers.AutoModelForCausalLM.from_config(config)


class Bidirectional(transformers.LlamaModel):
    def forward(self, input_ids, attention_mask=None, **inputs):
        everything = torch.zeros(len(input_ids), 1, input_ids.shape[1], input_ids.shape[1])
        return super().forward(input_ids, attention_mask=everything, **inputs)


class CountsFromOne(transformers.GPT2Model):
    """Gives positions 1, 2, ... where it is given none, as Kosmos-2.5 and RoBERTa do."""

    def forward(self, input_ids, position_ids=None, **inputs):
        own = torch.arange(1, input_ids.shape[1] + 1).expand_as(input_ids)
        return super().forward(input_ids, position_ids=own if position_ids is None else position_ids, **inputs)


LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
LONG_ROPE |= {"original_max_position_embeddings": 32}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: tiny("mamba"), "'mamba' carries a state from token to token.*use layout='rows'"),
        (
            lambda: tiny("gpt_neo", attention_types=[[["local"], 1]]),
            "'gpt_neo' counts its window of 256 tokens along the row",
        ),
        (lambda: tiny("bloom"), "'bloom' takes no position_ids.*layout='rows'"),
        (
            lambda: tiny("phi3", rope_parameters=LONG_ROPE),
            "rotary embedding .longrope. depends on the longest sequence",
        ),
        (lambda: tiny("llama", rope_parameters=DYNAMIC_ROPE), "rotary embedding .dynamic. depends on the longest"),
    ],
)
def test_models_that_cannot_read_trees_are_refused(make, reason):
    model = make()
    assert re.search(reason, tree_unsupported(model))
    with pytest.raises(ValueError, match=reason):
        tree_attention_mask(condition_pairs(PAIRS, pad_token_id=PAD, layout="tree"), model)


def test_a_changed_model_is_refused_with_the_reason():
    model = make_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert re.search("'flash_attention_2' takes no mask.*attn_implementation='sdpa'", tree_unsupported(model))
    model = make_model("llama")
    assert tree_unsupported(model) is None
    model.model = Bidirectional(model.config)
    assert re.search(
        r"'llama' does not read a small pair as a tree .* differ by \d.*layout='rows'", tree_unsupported(model)
    )
    model = make_model("olmo3")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert re.search("no mask is known for layers of type chunked_attention", tree_unsupported(model))


def test_positions_that_do_not_start_at_zero_are_refused():
    model = make_model("gpt2")
    model.transformer = CountsFromOne(model.config).eval()
    assert re.search(r"'gpt2' does not read a small pair .* differ by \d", tree_unsupported(model))
    packed = condition_pairs(PAIRS, pad_token_id=PAD, layout="packed")
    with pytest.raises(ValueError, match="lets packed sequences attend to each other, or counts positions"):
        hidden_and_head(model, **model_inputs(packed))


def test_dense_masks_have_a_longest_row():
    length = MAX_DENSE_TOKENS + 1
    batch = condition_pairs([([1] * (length - 4), [1], [1])], pad_token_id=0, layout="tree")
    assert batch["input_ids"].shape[1] == length
    model = use_attention(make_model("llama"), "eager")
    with pytest.raises(ValueError, match=rf"a row of {length} tokens is too long .*{MAX_DENSE_TOKENS}.*flex_attention"):
        tree_attention_mask(batch, model)
    for attention in ("sdpa", "flex_attention"):
        assert tree_attention_mask(batch, use_attention(model, attention)).shape == (1, 1, length, length)


def test_the_lazy_tree_mask_cannot_be_read():
    mask = tree_attention_mask(condition_pairs(PAIRS, pad_token_id=PAD, layout="tree"), make_model("llama"))
    for read in (lambda: mask + 1.0, lambda: mask[:, :, :3, :3], lambda: mask.to(torch.float32)):
        with pytest.raises(RuntimeError, match="the mask of a tree holds no numbers"):
            read()


def test_a_mask_is_only_made_for_trees():
    with pytest.raises(KeyError, match="tree_ends"):
        tree_attention_mask(condition_pairs(PAIRS, pad_token_id=PAD), make_model("llama"))
