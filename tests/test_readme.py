"""The pages' code runs as printed, what they name exists, and generated parts are those of the result files."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import inspo_kernels as ik
from benchmarks.report import PAGES, README, ROOT, render
from training.model import byte_tokenizer

TEXT = README.read_text()
TEXTS = {page.name: page.read_text() for page in PAGES}
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_custom_loop_runs_and_learns(model_folder, capsys):
    loop = next(block for block in BLOCKS if "for step in range" in block)
    name, steps = "Qwen/Qwen3-0.6B", 10
    assert f'name, steps = "{name}", {steps}' in loop
    exec(loop.replace(name, str(model_folder)).replace("lr=5e-7", "lr=1e-3"), {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]
    assert len(losses) == steps and losses[-1] < losses[0]


def test_tree_gives_the_loss_of_rows(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    pairs, ref_logps = [([1, 2, 3], [4, 5], [6]), ([7], [8], [9, 10, 11])], torch.full((4,), -9.0)
    scope = {
        "ik": ik,
        "model": model,
        "pairs": pairs,
        "tokenizer": SimpleNamespace(eos_token_id=0),
        "ref_logps": ref_logps,
    }
    exec(next(block for block in BLOCKS if 'layout="tree"' in block), scope)
    batch = ik.condition_pairs(pairs, pad_token_id=0)
    hidden, head = ik.hidden_and_head(model, **{k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")})
    rows = ik.fused_inspo_loss(hidden, labels=batch["labels"], ref_logps=ref_logps, **head)
    torch.testing.assert_close(scope["out"].loss, rows.loss)
    assert scope["out"].marginal_logps is not None


def test_custom_objective_runs():
    scope = {"ik": ik}
    exec(next(block for block in BLOCKS if "class Mine" in block), scope)
    one = torch.ones(1, dtype=torch.float64)
    sums = ik.PairSums(chosen=-2 * one, rejected=-1.5 * one, chosen_len=one, rejected_len=one, index=torch.arange(1))
    assert scope["Mine"]()(sums).tolist() == [1.5]


def found(pattern):
    """(page, what) of everything that matches in any page."""
    return sorted({(name, match) for name, text in TEXTS.items() for match in re.findall(pattern, text)})


@pytest.mark.parametrize("page, command", found(r"python -m ([\w.]+)"))
def test_named_modules_exist(page, command):
    path = ROOT.joinpath(*command.split("."))
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@pytest.mark.parametrize("page, target", found(r"\]\((?!https?://)([^)]+)\)"))
def test_links_lead_somewhere(page, target):
    path, _, heading = target.partition("#")
    (source,) = (p for p in PAGES if p.name == page)
    target = (source.parent / path).resolve() if path else source
    assert target.exists()
    if heading:
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        assert heading in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]


@pytest.mark.parametrize("page, path", found(r"--config(?:_file)? ((?!FILE)\S+)"))
def test_named_configurations_exist(page, path):
    assert (ROOT / path).exists()


NAMED = re.compile(r"`((?:[\w-]+/)*[\w-]+\.(?:py|yaml|md|png)|(?:[\w-]+/)+)`")
WRITTEN = {"curves.png", "config.yaml", "final/", "best/"}  # by a run


@pytest.mark.parametrize("page, line", found(r"(?m)^.*`[\w/-]+(?:\.(?:py|yaml|md|png)|/)`.*$"))
def test_named_files_exist(page, line):
    """Bare names are those of a folder that the line names, or of the example configurations."""
    names = NAMED.findall(line)
    folders = [ROOT, ROOT / "training/configs", ROOT / "training/configs/accelerate"]
    folders += [(ROOT / f"{name}x").parent for name in names if "/" in name]
    for name in names:
        assert name in WRITTEN or any((folder / name).exists() for folder in folders), name


def test_every_module_has_its_place_in_the_table():
    table = TEXT[TEXT.index("## Where things are") :]
    modules = [*ROOT.glob("inspo_kernels/*.py"), *ROOT.glob("training/*.py")]
    missing = [m for m in modules if m.name != "__init__.py" and not re.search(rf"[`/]{m.name}`", table)]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_parts_are_up_to_date(page):
    assert render(page) == page.read_text(), "run python -m benchmarks.report"
