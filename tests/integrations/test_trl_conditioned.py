"""Test InSPOTrainer with conditioning against the package's own loss, and its user-visible behaviour."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from datasets import load_from_disk
from torch.utils.flop_counter import FlopCounterMode
from trl_setup import LENGTHS, MOE, VOCAB, make, model, pairs, run, tokenizer

import inspo_kernels as ik
from inspo_kernels.backends import torch_backend
from inspo_kernels.integrations.trl import InSPOConfig, InSPOTrainer
from inspo_kernels.integrations.trl_losses import LOSS_TYPES

LAYOUTS = ["rows", "packed", "tree", "packed_tree"]


def trainer(folder, policy=None, reference=None, **options):
    policy, reference = policy or model(), reference or model(seed=5)
    made = make(InSPOTrainer, InSPOConfig, folder, policy=policy, reference=reference, **options)
    made.model.train()
    return made


def ids_of(dataset):
    end = [VOCAB - 1]
    read = tokenizer()
    return [
        (read(row["prompt"]).input_ids, read(row["chosen"]).input_ids + end, read(row["rejected"]).input_ids + end)
        for row in dataset
    ]


def own_loss(policy, reference, triples, **options):
    """Return the loss of a plain loop, as in the README's first example."""

    def forward(model, conditioned):
        batch = ik.condition_pairs(triples, pad_token_id=VOCAB - 2, conditioned=conditioned, **separator)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        return *ik.hidden_and_head(model, **inputs), batch

    separator = {"separator_ids": options.pop("separator_ids", ())}
    with torch.no_grad():
        hidden, head, batch = forward(reference, conditioned=False)
        logps = ik.linear_logps(hidden[:, :-1], targets=batch["labels"][:, 1:], **head)
    hidden, head, batch = forward(policy, conditioned=True)
    return ik.fused_inspo_loss(
        hidden,
        labels=batch["labels"],
        marginal_labels=batch["marginal_labels"],
        ref_logps=logps.double().sum(1),
        **options,
        **head,
    )


def assert_equal_gradients(found, expected):
    for (name, parameter), other in zip(found.named_parameters(), expected.parameters()):
        error = (parameter.grad - other.grad).norm() / other.grad.norm().clamp(min=1e-12)
        assert error <= 2e-5, (name, error)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("options", "objective", "terms"),
    [
        ({}, ik.DPO(beta=0.1), {}),
        ({"separator": " 7 8", "beta": 0.4}, ik.DPO(beta=0.4), {"separator_ids": [7, 8]}),
        ({"marginal_weight": 0.3, "loss_type": ["hinge"]}, ik.Hinge(beta=0.1), {"marginal_weight": 0.3}),
        ({"loss_type": ["sigmoid", "sft"]}, ik.Mixture([("dpo", 1.0), ("sft", 1.0)]), {}),
        ({"loss_type": ["aot"], "marginal_weight": 1.0}, ik.AOT(), {"marginal_weight": 1.0}),
    ],
    ids=str,
)
def test_conditioned_loss_is_the_packages_own(tmp_path, layout, options, objective, terms):
    policy, reference, data = model(), model(seed=5), pairs(LENGTHS[:4])
    twin = copy.deepcopy(policy)
    made = trainer(tmp_path, policy, reference, data=data, layout=layout, **options)
    out = own_loss(twin, made.ref_model, ids_of(data), objective=objective, **terms)
    out.loss.backward()
    loss = made.compute_loss(made.model, next(iter(made.get_train_dataloader())))
    loss.backward()
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-5)
    assert_equal_gradients(made.model, twin)
    logged = {}
    made.log(logged)
    for name, value in out.metrics().items():
        if name in logged:
            assert logged[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
    assert logged["num_tokens"] == {
        "rows": 2 * 64,
        "packed": 2 * 64,
        "tree": 2 * 64 - 18,
        "packed_tree": 2 * 64 - 18,
    }[layout] + (2 * 2 * 4 if "separator" in options else 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {"ld_alpha": 0.4},
        {"use_weighting": True, "marginal_weight": 0.5},
        {"ld_alpha": 0.2, "loss_type": ["sft", "ipo"]},
    ],
    ids=str,
)
def test_token_weights_are_the_same_in_every_layout(tmp_path, layout, options):
    losses = []
    for name in ("rows", layout):
        made = trainer(tmp_path, layout=name, **options)
        losses.append(made.compute_loss(made.model, next(iter(made.get_train_dataloader()))).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_conditioned_rows_train_as_through_trl(tmp_path):
    """TRL's trainer gets the same conditioned rows from a collator, and the same reference log-probs."""
    from trl import DPOConfig, DPOTrainer

    policy, reference = model(), model(seed=5)
    theirs = make(DPOTrainer, DPOConfig, tmp_path, policy=copy.deepcopy(policy), reference=reference)
    ours = trainer(tmp_path, policy, reference, layout="rows")
    batch = next(iter(theirs.get_train_dataloader()))
    refs = dict(zip(("ref_chosen_logps", "ref_rejected_logps"), ours.compute_ref_log_probs(reference, batch)))
    twin = ik.condition_batch(batch, pad_token_id=VOCAB - 2)
    theirs.precompute_ref_logps = True
    expected = theirs.compute_loss(theirs.model, twin | {k: v.float() for k, v in refs.items()})
    loss = ours.compute_loss(ours.model, next(iter(ours.get_train_dataloader())))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def counted():
    """Return a counter that also sees in-place additions of matmuls, which torch's own counter misses."""

    def in_place(total, a, b, out_shape=None, **kwargs):  # given shapes
        return 2 * a[0] * a[1] * b[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})


def head_matmuls(made):
    """Count the head's matmuls in one micro-batch in units of 2NHV, where N counts the pairs' scored tokens."""
    made.compute_loss(made.model, next(iter(made.get_train_dataloader())))  # the first pass verifies the head
    batch = next(iter(made.get_train_dataloader()))
    refs = made.compute_ref_log_probs(made.ref_model, batch)
    made.compute_ref_log_probs = lambda *_: refs
    with counted() as counter:
        made.compute_loss(made.model, batch).backward()
    read = batch.get("conditioned") or {"inputs": batch, "tree": None}
    inputs = {
        name: read["inputs"][name] for name in ("input_ids", "attention_mask", "position_ids") if name in read["inputs"]
    }
    if read["tree"]:
        inputs["attention_mask"] = ik.tree_attention_mask(read["tree"], made.model)
    with counted() as of_trunk:
        made.model.base_model(**inputs).last_hidden_state.sum().backward()
    config = made.model.config
    unit = 2 * N * config.hidden_size * config.vocab_size
    return (counter.get_total_flops() - of_trunk.get_total_flops()) / unit


N = sum(w + l + 2 for _, w, l in LENGTHS[:4])


@pytest.mark.parametrize("options", [{}, {"loss_type": ["aot"]}, {"use_weighting": True}], ids=str)
@pytest.mark.parametrize("layout", ["rows", "packed", "tree"])
def test_marginals_cost_a_matmul_only_at_logged_steps(tmp_path, layout, options):
    for steps, matmuls in ((10, 3), (1, 4)):
        made = trainer(tmp_path, layout=layout, logging_steps=steps, **options)
        made.state.logging_steps = steps
        assert head_matmuls(made) == pytest.approx(matmuls, rel=1e-3)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_takes_three_matmuls(tmp_path, loss_type):
    made = trainer(tmp_path, loss_type=[loss_type], label_smoothing=0.1, conditioned=False)
    chosen = sum(w + 1 for _, w, _ in LENGTHS[:4])
    expected = (3 * chosen + (N - chosen)) / N if loss_type == "sft" else 3  # SFT's rejected responses: a report
    assert head_matmuls(made) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("loss_type", [["aot"], ["aot_unpaired"], ["sigmoid", "aot"]], ids=str)
def test_coupled_losses_recompute_beyond_the_workspace(tmp_path, monkeypatch, loss_type):
    rows, held = 4, 16  # the workspace grows up to fourfold where one call does not fit
    monkeypatch.setattr(torch_backend.TorchBackend, "default_workspace_bytes", lambda *shape: rows * 4 * VOCAB)
    made = trainer(tmp_path, loss_type=loss_type, layout="rows")
    assert head_matmuls(made) == pytest.approx(3 + (N - held) / N, rel=1e-3)


def test_marginals_are_reported_only_at_logged_steps(tmp_path):
    made = run(
        InSPOTrainer,
        InSPOConfig,
        tmp_path,
        policy=model(),
        reference=model(seed=5),
        logging_steps=2,
        max_steps=4,
        logging_first_step=True,
    )
    logs = [log for log in made.logs if "loss" in log]
    assert [log["step"] for log in logs] == [1, 2, 4]
    names = {"marginal/logps/chosen", "marginal/rewards/margins", "marginal/conditioning_gap/rejected"}
    assert all(names <= set(log) for log in logs)
    made = trainer(tmp_path, logging_steps=2)
    made.state.logging_steps = 2
    batch = next(iter(made.get_train_dataloader()))
    made.compute_loss(made.model, batch)
    logs = {}
    made.log(logs)
    assert "logps/chosen" in logs and "marginal/logps/chosen" not in logs


def test_auto_layout_follows_the_model(tmp_path):
    layouts = {}
    for attention in ("sdpa", "eager"):
        policy = model()
        policy.set_attn_implementation(attention)
        layouts[attention] = trainer(tmp_path, policy).data_collator.layout
    layouts["mamba"] = trainer(tmp_path, model("mamba", num_heads=2), model("mamba", num_heads=2)).data_collator.layout
    assert layouts == {"sdpa": "packed_tree", "eager": "tree", "mamba": "rows"}


@pytest.mark.parametrize("conditioned", [True, False])
@pytest.mark.parametrize("layout", ["auto", "rows", "packed"])
def test_router_loss_is_added(tmp_path, conditioned, layout):

    policy = model("mixtral", **MOE)
    made = trainer(tmp_path, policy, model("mixtral", 5, **MOE), layout=layout, conditioned=conditioned)
    loss = made.compute_loss(made.model, next(iter(made.get_train_dataloader()))).item()
    logged = {}
    made.log(logged)
    made.aux_loss_enabled = False
    plain = made.compute_loss(made.model, next(iter(made.get_train_dataloader()))).item()
    assert loss == pytest.approx(plain + 0.05 * logged["aux_loss"], rel=1e-5) and logged["aux_loss"] > 0


def test_training_resumes_as_if_uninterrupted(tmp_path):
    def weights(**options):
        made = trainer(tmp_path / "run", save_strategy="steps", save_steps=2, max_steps=4, **options)
        made.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2") if resume else None)
        return copy.deepcopy(made.model.state_dict())

    resume = False
    whole = weights()
    resume = True
    again = weights()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_pairs_above_max_length_are_dropped_and_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        made = trainer(tmp_path, max_length=16, trainer={"eval_dataset": pairs([(5, 4, 9), (3, 2, 2)])})
    totals = [x + w + l + 2 for x, w, l in LENGTHS]
    assert len(made.train_dataset) == sum(total <= 16 for total in totals) == 4
    assert made.dropped_pairs == {"train": 4, "eval": 1}
    assert "dropped 4 of 8 pairs" in caplog.text and "max_length=16" in caplog.text
    for batch in made.get_train_dataloader():
        assert batch["conditioned"]["scored"]["num_pairs"] == len(batch["input_ids"]) // 2


@pytest.mark.parametrize("conditioned", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        [{"ld_alpha": 0.2}, {"ld_alpha": 0.9}, {"ld_alpha": 0.2}],
        [{"max_length": n, "truncation_mode": "keep_end"} for n in (13, 20, 13)],
    ],
    ids=["ld_alpha", "max_length"],
)
def test_precomputed_references_follow_their_options(tmp_path, conditioned, changes):
    """TRL identifies cached log-probs by the fingerprint of the data."""
    folder = tmp_path / "data"
    pairs().save_to_disk(folder)
    losses = []
    for change in changes:
        options = {"data": load_from_disk(folder), "conditioned": conditioned} | change
        given = trainer(tmp_path, precompute_ref_log_probs=True, **options)
        live = trainer(tmp_path, **options)
        loss, expected = (
            made.compute_loss(made.model, next(iter(made.get_train_dataloader()))).item() for made in (given, live)
        )
        losses.append(loss)
        assert loss == pytest.approx(expected, rel=1e-5)
    assert losses[0] == losses[2] != losses[1]


def test_another_learning_rate_keeps_the_references(tmp_path, monkeypatch):
    folder, calls = tmp_path / "data", []
    pairs().save_to_disk(folder)
    compute = InSPOTrainer.compute_ref_log_probs
    monkeypatch.setattr(InSPOTrainer, "compute_ref_log_probs", lambda *a: calls.append(1) or compute(*a))
    for rate, precise in ((0.1, True), (0.2, True), (0.2, False)):
        options = {"learning_rate": rate, "bf16": not precise, "max_length": 40}
        trainer(tmp_path, data=load_from_disk(folder), precompute_ref_log_probs=True, **options)
        calls.append(0)
    assert [len(list(batches)) for batches in "".join(map(str, calls)).split("0")] == [2, 0, 2, 0]


def test_a_stream_drops_pairs_and_counts(tmp_path, caplog):
    data = pairs().to_iterable_dataset()
    with caplog.at_level(logging.WARNING):
        made = trainer(tmp_path, data=data, max_length=16)
        kept = sum(len(batch["input_ids"]) // 2 for batch in made.get_train_dataloader())
    assert kept == 4 and "dropped 4 pairs" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_as_long_as_max_length_are_counted(tmp_path, caplog, stream):
    """TRL would drop them without a word, because its completions would be empty."""
    data = pairs([(12, 2, 2), (11, 1, 1), (3, 2, 2), (2, 1, 2), (2, 2, 2)])
    with caplog.at_level(logging.WARNING):
        made = trainer(tmp_path, data=data.to_iterable_dataset() if stream else data, max_length=10)
        kept = sum(len(batch["input_ids"]) // 2 for batch in made.get_train_dataloader())
    assert kept == 3 and ("dropped 2 pairs" if stream else "dropped 2 of 5 pairs") in caplog.text
    assert made.dropped_pairs == ({} if stream else {"train": 2})


@pytest.mark.parametrize("max_length", [2, 9])
def test_no_pair_that_fits_is_an_error(tmp_path, max_length):
    with pytest.raises(ValueError, match=rf"dropped 8 of 8 pairs.*max_length={max_length}"):
        trainer(tmp_path, max_length=max_length)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "trees"}, "layout='trees': must be one of auto, rows"),
        ({"marginal_weight": -1.0}, "marginal_weight must be zero or positive"),
        ({"marginal_weight": 0.1, "conditioned": False}, "needs conditioned=True"),
        ({"loss_type": ["simpo"]}, "'simpo' has no fused objective; choose from sigmoid, ipo"),
        ({"loss_type": ["sigmoid", "hinge"], "loss_weights": [1.0]}, "same length as `loss_type`"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


def test_layouts_that_the_model_cannot_read_are_refused(tmp_path):
    for layout, words in (("tree", "state"), ("packed", "see each other")):
        with pytest.raises(ValueError, match=f"layout='{layout}'.*{words}"):
            trainer(tmp_path, model("mamba", num_heads=2), model("mamba", num_heads=2), layout=layout)
    with pytest.raises(ValueError, match=r"layout='tree'.*router loss"):
        trainer(tmp_path, model("mixtral", **MOE), model("mixtral", **MOE), layout="tree")
    policy = model()
    policy.set_attn_implementation("eager")
    assert trainer(tmp_path, policy, layout="packed").data_collator.layout == "packed"


def test_a_gap_is_warned_of_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run(InSPOTrainer, InSPOConfig, tmp_path, policy=model(), reference=model(seed=5))
    gaps = [record for record in caplog.records if "less likely after the other response" in record.message]
    assert len(gaps) <= 1


def test_other_responses_lower_log_probs_warns(tmp_path, caplog):
    made = trainer(tmp_path)
    for _ in range(2):
        made._warn_of_gap({"marginal/conditioning_gap/chosen": -1.5, "marginal/conditioning_gap/rejected": 0.1})
    assert caplog.text.count("-1.50 nats per token") == 1


def test_plain_config_conditions_by_default(tmp_path):
    from trl import DPOConfig

    made = make(InSPOTrainer, DPOConfig, tmp_path, policy=model(), reference=model(seed=5))
    made.train()
    assert any("marginal/logps/chosen" in log for log in made.state.log_history)


@pytest.mark.parametrize(("conditioned", "paper", "tag"), [(True, "2512.23126", True), (False, "2305.18290", False)])
def test_the_model_card_cites_the_method(tmp_path, conditioned, paper, tag):
    trainer(tmp_path, conditioned=conditioned).create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert [name for name in ("2512.23126", "2305.18290") if f"papers/{name}" in card] == [paper]
    assert ("Li and Tian Lan" in card) == tag == ("- inspo" in card) and ("Rafailov" in card) != tag
