from __future__ import annotations

import pytest
import torch
from helpers import tiny_model, token_pairs
from safetensors.torch import load_file, save_file

import inspo_kernels as ik
from training import references
from training.batching import Batcher
from training.config import TrainConfig
from training.data import Pair, Pairs
from training.errors import InputError, Stopped
from training.inputs import Inputs
from training.references import References
from training.scoring import PairModel, score, weights_digest

BATCHER = Batcher(pad_token_id=0, device=torch.device("cpu"), max_tokens=60)
PAIRS = [Pair(*ids, f"pair {i}") for i, ids in enumerate(token_pairs(5))]


def digest(pairs):
    return Pairs.of_lists(pairs, "").digest


def reference(model, cache, said, pairs=PAIRS, bf16=False, batcher=BATCHER, stop_requested=lambda: False, used=None):
    """Return the reference log-probs of a run on ``pairs`` that caches them in ``cache``."""
    config = TrainConfig(reference_cache=cache and str(cache), bf16=bf16)
    digests = {"model": weights_digest(model), "train_data": digest(pairs), "eval_data": digest([])}
    inputs = Inputs(model, None, 0, (), pairs, [], digests)
    return References.compute(
        config,
        inputs,
        PairModel(model, ik.DPO()),
        batcher,
        used or range(len(pairs)),
        log=said.append,
        stop_requested=stop_requested,
    ).train


def test_scores_are_the_models_log_probs_in_order():
    model = tiny_model()
    scores = score(PairModel(model, ik.DPO()), PAIRS, BATCHER, conditioned=True)
    for i, (x, y_w, y_l, _) in enumerate(PAIRS):
        for row, (y, other) in enumerate(((y_w, y_l), (y_l, y_w))):
            for table, context in ((scores.logps, x + other), (scores.marginal_logps, x)):
                logps = model(torch.tensor([context + y])).logits.double().log_softmax(-1)[0, len(context) - 1 : -1]
                expected = logps[torch.arange(len(y)), y].sum()
                torch.testing.assert_close(table[row, i], expected, rtol=1e-5, atol=1e-5)
            assert scores.lengths[row, i] == len(y)


def test_reference_cache_depends_on_weights_and_data(tmp_path):
    said = []
    first = reference(tiny_model(), tmp_path, said)
    assert torch.equal(reference(tiny_model(), tmp_path, said), first)
    assert "pairs computed" in said[0] and "read from" in said[1]
    changed = tiny_model()
    with torch.no_grad():
        changed.lm_head.weight[7, 3] += 0.5
    assert not torch.equal(reference(changed, tmp_path, said), first)
    reference(tiny_model(), tmp_path, said, PAIRS[::-1])
    reference(tiny_model(rms_norm_eps=1e-3), tmp_path, said)
    reference(tiny_model(), tmp_path, said, bf16=True)
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    reference(eager, tmp_path, said)
    assert len(said) == 7
    assert all("pairs computed" in line for line in said[2:])


def test_a_longer_run_scores_only_new_pairs(tmp_path):
    said, whole = [], reference(tiny_model(), tmp_path / "whole", [])
    part = reference(tiny_model(), tmp_path, said, used=[1, 3])
    assert part.isnan().any(0).tolist() == [True, False, True, False, True]
    assert torch.equal(reference(tiny_model(), tmp_path, said)[:, [1, 3]], part[:, [1, 3]])
    assert [line.split(",")[0] for line in said] == [f"reference log-probs: {n} pairs computed" for n in (2, 3)]
    torch.testing.assert_close(reference(tiny_model(), tmp_path, said), whole)


@pytest.mark.parametrize("damage", ["truncated", "row missing", "not finite"])
def test_a_corrupted_cache_is_recomputed(tmp_path, damage):
    said = []
    expected = reference(tiny_model(), tmp_path, said)
    (file,) = tmp_path.glob("reference-*")
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        logps = load_file(file)["logps"]
        save_file({"logps": logps[:, :-1].contiguous() if damage == "row missing" else logps / 0}, file)
    assert torch.equal(reference(tiny_model(), tmp_path, said), expected)
    assert "damaged" in said[1]


def test_a_nonfinite_reference_names_the_pairs():
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[PAIRS[3].chosen[0]] = float("nan")
    guilty = [p.origin for p in PAIRS if PAIRS[3].chosen[0] in p.prompt + p.chosen[:-1] + p.rejected[:-1]]
    with pytest.raises(InputError, match=rf"not finite on {len(guilty)} pairs \({', '.join(guilty)}\)"):
        reference(model, None, [])


def test_a_stopped_reference_pass_resumes(tmp_path, monkeypatch):
    """The passes after the stop score only the remaining pairs, and the result is that of an uninterrupted run."""
    monkeypatch.setattr(references, "CHUNK", 2)
    expected, said, asked = reference(tiny_model(), None, []), [], iter([False, False, False, True])
    with pytest.raises(Stopped, match=r"SIGTERM: reference log-probs of \d pairs are scored, kept in .*reference-"):
        reference(tiny_model(), tmp_path, said, stop_requested=lambda: next(asked))
    scored = []
    monkeypatch.setattr(
        references, "score", lambda module, pairs, *a, **k: scored.extend(pairs) or score(module, pairs, *a, **k)
    )
    assert torch.equal(reference(tiny_model(), tmp_path, said), expected)
    assert 0 < len(scored) < len(PAIRS)


def test_a_full_disk_at_the_reference_only_warns(tmp_path, monkeypatch):
    def full(*what):
        raise OSError("No space left on device")

    expected, said = reference(tiny_model(), None, []), []
    monkeypatch.setattr(references, "save_file", full)
    assert torch.equal(reference(tiny_model(), tmp_path, said), expected)
    assert "could not be written (No space left on device); the run goes on" in said[0]
    assert not list(tmp_path.iterdir())


def test_a_file_as_reference_cache_only_warns(tmp_path):
    said, cache = [], tmp_path / "file"
    cache.write_text("")
    assert reference(tiny_model(), cache, said).isfinite().all()
    assert "could not be written" in said[0] and "the run goes on" in said[0]
