from __future__ import annotations

import copy
import json
import math
import os
import shutil

import pytest
import torch
from helpers import (
    EVENTFUL,
    PAIRS,
    TINY,
    metrics,
    options,
    tiny_model,
    token_pairs,
    without_timings,
    write_jsonl,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.batching import EpochBatches, used_indices
from training.config import TrainConfig
from training.errors import InputError, NonFiniteError
from training.options import parse_config
from training.output import locked
from training.train import main, train

OBJECTIVES = ("dpo", "one_sided", "ipo", "simpo", "rdpo", "orpo", "hinge", "aot", "aot_unpaired", "sft")


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def run(model=None, pairs=None, **given):
    """Do a run in memory that writes nothing."""
    config = TrainConfig(**{"max_steps": 1, "learning_rate": 1e-3, "logging_steps": 1, **given})
    return train(config, pairs or token_pairs(), model=model or tiny_model(), quiet=True)


def test_the_command_line_saves_a_usable_model(tmp_path, curves, capsys):
    out = tmp_path / "out"
    main(options(out, "--eval_data", str(PAIRS), "--eval_steps", "2", "--logging_steps", "1"))
    printed = capsys.readouterr().out
    assert "24 pairs read, 24 kept" in printed and "objective=dpo" in printed
    assert "log pi(y|x,other) - log pi(y|x) per token" in printed

    model, tokenizer = (c.from_pretrained(out / "final") for c in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer("Name a fruit.", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]

    rows = metrics(out)
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == [1, 2, 3]
    for kind in ("rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected"):
        for name in (kind, f"marginal/{kind}", "grad_norm", "num_tokens", "learning_rate", "epoch"):
            assert all(math.isfinite(row[name]) for row in training), name
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 3]
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert parse_config(["--config", str(out / "config.yaml")]) == parse_config(
        options(out, "--eval_data", str(PAIRS), "--eval_steps", "2", "--logging_steps", "1")
    )


@pytest.mark.parametrize("conditioned", [True, False], ids=["conditioned", "plain"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_learns_the_fixture(objective, conditioned):
    config = TrainConfig(
        model=TINY,
        train_data=str(PAIRS),
        objective=objective,
        conditioned=conditioned,
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        warmup_steps=0.0,
        lr_scheduler_type="constant",
        per_device_train_batch_size=24,
    )
    rows = train(config, quiet=True).metrics
    assert len(rows) == 3
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.01
    assert ("marginal/rewards/margins" in rows[0]) == conditioned


@pytest.mark.parametrize("given", [{"conditioned": False}, {"reference_conditioned": True}])
def test_the_first_plain_loss_is_ln_2(given):
    (row,) = run(**given, per_device_train_batch_size=6, max_batch_tokens=60).metrics
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert row["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_an_unconditioned_reference_changes_the_first_loss():
    model = tiny_model(initializer_range=0.5)
    (row,) = run(model).metrics
    assert abs(row["loss"] - math.log(2)) > 1e-3
    assert row["marginal/rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_marginal_weight_adds_the_objective_given_the_prompt_alone():
    (without,), (with_it,) = (run(marginal_weight=w).metrics for w in (0.0, 0.5))
    # Given the prompt alone, policy and reference agree before the first update: ln 2.
    assert with_it["loss"] == pytest.approx(without["loss"] + 0.5 * math.log(2), abs=1e-5)


@pytest.mark.parametrize("conditioned", [True, False])
def test_accumulation_equals_the_large_ragged_batch(conditioned):
    results = [
        run(
            tiny_model(),
            token_pairs(7),
            per_device_train_batch_size=7,
            max_batch_tokens=tokens,
            conditioned=conditioned,
            max_grad_norm=1e9,
        )
        for tokens in (10_000, 120, 1)
    ]
    for result in results[1:]:
        for name in ("loss", "grad_norm", "rewards/margins", "num_tokens"):
            assert result.metrics[0][name] == pytest.approx(results[0].metrics[0][name], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("objective", ["aot", "sft"])
def test_coupled_objectives_are_not_split_into_passes(objective):
    """``max_batch_tokens`` limits only the passes of the reference and of evaluations."""
    given = {"objective": objective, "per_device_train_batch_size": 7, "max_grad_norm": 1e9, "conditioned": False}
    rows = [run(tiny_model(), token_pairs(7), max_batch_tokens=most, **given).metrics[0] for most in (10_000, 1)]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-6)
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-6)
    if objective == "sft":  # the mean over all chosen tokens, not over responses
        tokens = sum(len(pair[1]) for pair in token_pairs(7)) / 7
        assert rows[0]["loss"] == pytest.approx(-rows[0]["logps/chosen"] / tokens, rel=1e-5)


def test_a_step_is_adamw_on_the_mean_loss():
    pairs, model = token_pairs(5), tiny_model()
    mine = copy.deepcopy(model)
    # Plain SimPO by hand, straight from the logits.
    losses = []
    for x, y_w, y_l in pairs:
        means = []
        for y in (y_w, y_l):
            logps = mine(torch.tensor([x + y])).logits.log_softmax(-1)[0, len(x) - 1 : -1]
            means.append(logps[torch.arange(len(y)), y].mean())
        losses.append(-torch.nn.functional.logsigmoid(2.0 * (means[0] - means[1]) - 1.0))
    optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-2, weight_decay=0.0)
    torch.stack(losses).mean().backward()
    torch.nn.utils.clip_grad_norm_(mine.parameters(), 0.1)
    optimizer.step()
    trained = run(
        model,
        pairs,
        objective="simpo",
        conditioned=False,
        learning_rate=1e-2,
        warmup_steps=0.0,
        max_grad_norm=0.1,
        per_device_train_batch_size=6,
        max_batch_tokens=60,
    )
    assert trained.metrics[0]["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    for name, tensor in mine.state_dict().items():
        torch.testing.assert_close(trained.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_weight_decay_applies_only_to_matrices():
    model = tiny_model(attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1  # biases start at 0, which does not decay
    plain, decayed = (run(copy.deepcopy(model), weight_decay=w).model.state_dict() for w in (0.0, 0.9))
    for name, tensor in plain.items():
        assert torch.equal(decayed[name], tensor) == (tensor.ndim == 1), name


@pytest.mark.parametrize("tied", [False, True])
def test_a_resumed_run_is_bit_identical(tmp_path, tied):
    more = ["--max_steps", "7", *EVENTFUL, "--model.tie_word_embeddings", str(tied).lower()]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    main(options(whole, *more))
    assert not list(whole.glob("*.partial"))

    # Imitate a kill while saving step 6 that loses the reference. The trained policy must not recompute it.
    shutil.copytree(whole, broken, ignore=shutil.ignore_patterns("final", "checkpoint-6", "reference-*"))
    (broken / "checkpoint-6.partial").mkdir()
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    main(options(broken, *more, "--resume_from_checkpoint", "auto"))

    one, other = (AutoModelForCausalLM.from_pretrained(run / "final").state_dict() for run in (whole, broken))
    assert same(one, other)
    assert without_timings(metrics(whole)) == without_timings(metrics(broken))
    assert (whole / "samples.jsonl").read_text() == (broken / "samples.jsonl").read_text()


def test_resume_takes_names_and_auto_may_start_fresh(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    main(options(first, "--save_steps", "1", "--resume_from_checkpoint", "auto"))
    main(options(second, "--resume_from_checkpoint", str(first / "checkpoint-2")))
    assert "after step 2" in capsys.readouterr().out
    assert without_timings(metrics(first)) == without_timings(metrics(second))  # a checkpoint brings the rows before it
    one, other = (AutoModelForCausalLM.from_pretrained(run / "final").state_dict() for run in (first, second))
    assert same(one, other)


def test_a_resumed_run_must_have_the_same_settings(tmp_path, capsys):
    """Another seed builds another base, and the old weights would silently use its reference log-probs."""
    out = tmp_path / "out"
    main(options(out, "--save_steps", "1"))
    shutil.rmtree(out / "final")
    before = (out / "config.yaml").read_text()
    changed = ["--seed", "7", "--objective", "hinge", "--logging_steps", "2", "--resume_from_checkpoint", "auto"]
    with pytest.raises(SystemExit, match="2"):
        main(options(out, "--save_steps", "1", *changed))
    error = capsys.readouterr().err
    assert "seed was 42, is 7" in error and "objective was 'dpo', is 'hinge'" in error and "log_every" not in error
    assert (out / "config.yaml").read_text() == before
    main(options(out, "--save_steps", "1", "--logging_steps", "2", "--resume_from_checkpoint", "auto"))


def test_a_folder_serves_one_run_at_a_time(tmp_path, capsys):
    with locked(tmp_path / "out"), pytest.raises(SystemExit, match="2"):
        main(options(tmp_path / "out"))
    assert "another run is writing there" in capsys.readouterr().err
    main(options(tmp_path / "out"))


def test_a_failed_start_changes_no_files(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--model", str(tmp_path / "nowhere"), "--train_data", str(PAIRS), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "config.yaml").exists() and not (tmp_path / "out" / "log.txt").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        main(options(tmp_path / "file"))
    assert "not a folder" in capsys.readouterr().err


def test_a_run_can_return_to_an_earlier_checkpoint(tmp_path):
    out = tmp_path / "out"
    main(options(out, "--save_steps", "1", "--logging_steps", "1"))
    first = AutoModelForCausalLM.from_pretrained(out / "final").state_dict()
    shutil.rmtree(out / "final")
    main(
        options(out, "--save_steps", "1", "--logging_steps", "1", "--resume_from_checkpoint", str(out / "checkpoint-1"))
    )
    assert same(AutoModelForCausalLM.from_pretrained(out / "final").state_dict(), first)
    assert [row["step"] for row in metrics(out)] == [1, 2, 3]


def test_output_folders_of_other_runs_are_refused(tmp_path, capsys):
    done, unfinished = tmp_path / "done", tmp_path / "unfinished"
    main(options(done, "--save_steps", "2"))
    shutil.copytree(done, unfinished, ignore=shutil.ignore_patterns("final"))
    kept = (done / "metrics.jsonl").read_bytes()
    for out, more, message in (
        (done, [], "holds a finished run; continue it"),
        (done, ["--resume_from_checkpoint", "auto"], "holds a finished run of 3 steps; raise max_steps"),
        (unfinished, [], "unfinished run with checkpoint-3; continue it with --resume_from_checkpoint auto"),
        (
            unfinished,
            ["--resume_from_checkpoint", str(tmp_path / "checkpoint-9")],
            "or no checkpoint: it has no manifest.json",
        ),
    ):
        with pytest.raises(SystemExit):
            main(options(out, *more))
        assert message in capsys.readouterr().err
    assert (done / "metrics.jsonl").read_bytes() == kept


def test_a_nonfinite_loss_stops_and_names_the_pair(monkeypatch):
    monkeypatch.setattr("training.architecture.check_finite", lambda model: None)  # as if training did it
    pairs, model = token_pairs(6), tiny_model()
    pairs[4][1].insert(0, 200)  # a token of this pair alone
    with torch.no_grad():
        model.model.embed_tokens.weight[200] = float("nan")
    before = weights(model)
    message = r"step 1: loss nan.*before the update.*cause it: train_data pair 4\..*no checkpoint was kept$"
    with pytest.raises(NonFiniteError, match=message):
        run(model, pairs, objective="simpo", per_device_train_batch_size=6, max_batch_tokens=60)
    after = weights(model)
    assert same({k: v.nan_to_num(7.0) for k, v in after.items()}, {k: v.nan_to_num(7.0) for k, v in before.items()})


def test_a_nonfinite_gradient_stops_before_the_update():
    model = tiny_model()
    before = weights(model)
    model.lm_head.weight.register_hook(lambda grad: grad / 0)
    with pytest.raises(NonFiniteError, match=r"step 1: loss \d.*gradient norm (nan|inf).*all pairs of the step"):
        run(model)
    assert same(weights(model), before)


def test_divergence_exits_with_1_and_no_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("training.architecture.check_finite", lambda model: None)  # as if training did it
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[3 + 68] = float("inf")  # some byte of the fixture
    from training.model import byte_tokenizer

    for part in (model, byte_tokenizer()):
        part.save_pretrained(tmp_path / "base")
    with pytest.raises(SystemExit) as stopped:
        main(options(tmp_path / "out", "--model", str(tmp_path / "base"), "--objective", "simpo", "--max_steps", "9"))
    assert stopped.value.code == 1
    assert "pairs.jsonl:" in capsys.readouterr().err
    assert not (tmp_path / "out/final").exists()


def test_bad_data_ends_the_command_with_2(tmp_path, capsys):
    file = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a"}])
    with pytest.raises(SystemExit) as stopped:
        main(options(tmp_path / "out", "--train_data", file))
    assert stopped.value.code == 2
    assert "d.jsonl:2: 'chosen' is missing" in capsys.readouterr().err


def test_a_mismatched_tokenizer_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"pairs\.jsonl:1: token id \d+, but the model's vocabulary ends at 99"):
        train(parse_config(options(tmp_path / "out", "--model.vocab_size", "100")), quiet=True)


def test_pairs_beyond_the_models_positions_are_an_error():
    with pytest.raises(InputError, match=r"pair \d: .* have \d+ tokens, but the model 12 positions"):
        run(tiny_model(max_position_embeddings=12))


def test_evaluation_pairs_must_exist_and_be_held_out(tmp_path, capsys):
    with pytest.raises(InputError, match="eval_steps and eval_strategy need eval_data"):
        run(eval_steps=1)
    prompts = ("Name a fruit that grows on trees.", "New?")
    seen = write_jsonl(tmp_path / "e.jsonl", [{"prompt": p, "chosen": "a", "rejected": "b"} for p in prompts])
    main(options(tmp_path / "out", "--eval_data", seen, "--max_steps", "1"))
    assert "1 of 2 eval_data pairs have a prompt of train_data" in capsys.readouterr().out


def test_bf16_autocast_keeps_float32_parameters():
    result = run(conditioned=False, bf16=True)
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    exact = run(conditioned=False).metrics[0]
    assert 0 < abs(result.metrics[0]["logps/chosen"] - exact["logps/chosen"]) < 0.5
    assert result.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-2)


def test_training_disables_dropout():
    model = tiny_model(attention_dropout=0.5)
    (row,) = run(model, conditioned=False).metrics
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_without_output_dir_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    before = weights(model)
    result = run(model)
    assert result.model is model and result.final is None
    assert not same(weights(model), before)
    assert not os.listdir(tmp_path)


def test_reference_cache_is_shared_between_runs(tmp_path, capsys):
    cache = ["--reference_cache", str(tmp_path / "cache")]
    main(options(tmp_path / "one", *cache))
    main(options(tmp_path / "two", *cache, "--learning_rate", "5e-3", "--beta", "0.7"))
    printed = capsys.readouterr().out
    assert printed.count("pairs computed") == 1 and printed.count("pairs read from") == 1
    assert not list((tmp_path / "one").glob("reference-*"))


def test_each_epoch_is_a_permutation_of_its_own():
    batches = EpochBatches(10, 4, seed=1)
    epochs = []
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        parts = list(batches)
        assert [len(part) for part in parts] == [4, 4, 2] and len(batches) == 3
        epochs.append([i for part in parts for i in part])
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert list(EpochBatches(10, 4, seed=1)) != list(EpochBatches(10, 4, seed=2))
    assert used_indices(10, 7, seed=1) == sorted(epochs[0][:7]) and list(used_indices(10, 12, seed=1)) == [*range(10)]


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant_with_warmup"])
def test_learning_rate_warms_up_and_follows_its_schedule(shape):
    rows = run(learning_rate=1.0, lr_scheduler_type=shape, warmup_steps=0.25, max_steps=40, max_grad_norm=1e-9).metrics
    rates = [row["learning_rate"] for row in rows]
    assert rates[:10] == pytest.approx([i / 11 for i in range(1, 11)])
    assert rates[10] == 1.0
    halfway = {"cosine": 0.5, "linear": 0.5, "constant_with_warmup": 1.0}[shape]
    assert rates[25] == pytest.approx(halfway)
    assert all(rate > 0 for rate in rates)


@pytest.mark.skipif("INSPO_PAIRS" not in os.environ, reason="INSPO_PAIRS=FILE is not set: real pairs are NOT tested")
@pytest.mark.parametrize("conditioned", ["true", "false"])
@pytest.mark.parametrize("objective", ["dpo", "simpo", "ipo", "rdpo", "orpo"])
def test_real_pairs_train_reload_and_generate(tmp_path, objective, conditioned):
    records = [json.loads(line) for line in open(os.environ["INSPO_PAIRS"], encoding="utf-8")]
    records = [r for r in records if sum(map(len, r.values())) < 900][:60]
    prompts = sorted({r["prompt"] for r in records})
    held_out = set(prompts[::4])
    data = [
        write_jsonl(tmp_path / f"{kind}.jsonl", [r for r in records if (r["prompt"] in held_out) == (kind == "eval")])
        for kind in ("train", "eval")
    ]
    out = tmp_path / "out"
    main(
        options(
            out,
            "--train_data",
            data[0],
            "--eval_data",
            data[1],
            "--objective",
            objective,
            "--conditioned",
            conditioned,
            "--max_length",
            "1000",
            "--truncation",
            "drop",
        )
    )
    rows = metrics(out)
    for layout in ("conditioned", "marginal"):
        low, high = rows[-1][f"eval_{layout}/rewards/accuracies_ci"]
        assert 0 <= low <= rows[-1][f"eval_{layout}/rewards/accuracies"] <= high <= 1
    first, last = (row["eval_loss"] for row in rows if "eval_loss" in row)
    assert first != last and math.isfinite(last)
    model, tokenizer = (c.from_pretrained(out / "final") for c in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer(records[0]["prompt"], return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=2, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_conditioned_reference_keeps_a_plain_reference_for_marginals():
    config = TrainConfig(max_steps=1, logging_steps=1, reference_conditioned=True)
    start, trained, _ = train(
        config, token_pairs(), eval_pairs=token_pairs(seed=1), model=tiny_model(), quiet=True
    ).metrics
    for layout in ("conditioned", "marginal"):
        assert start[f"eval_{layout}/rewards/accuracies"] == 0.5
        for name in ("chosen", "rejected", "margins"):
            assert start[f"eval_{layout}/rewards/{name}"] == pytest.approx(0.0, abs=1e-5), (layout, name)
    assert "marginal/logps/chosen" in trained and not any(name.startswith("marginal/rewards") for name in trained)
