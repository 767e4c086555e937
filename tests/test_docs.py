"""Check the pages: code runs as printed, links and names exist, generated parts match the result files."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import inspo_kernels as ik
from benchmarks.report import DOCS, PAGES, README, ROOT, render
from training.model import byte_tokenizer
from training.train import main

CONTRIBUTING = ROOT / "CONTRIBUTING.md"
TEXTS = {page: page.read_text() for page in (README, CONTRIBUTING, *sorted(DOCS.glob("*.md")))}
BLOCKS = {page.name: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for page, text in TEXTS.items()}
RECORDS = re.search(r"```json\n(.*?)```", TEXTS[DOCS / "quick_start.md"], re.DOTALL).group(1)


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
    loop = next(block for block in BLOCKS["README.md"] if "for step in range" in block)
    name, steps = "Qwen/Qwen3-0.6B", 10
    assert f'name, steps = "{name}", {steps}' in loop
    exec(loop.replace(name, str(model_folder)).replace("lr=5e-7", "lr=1e-3"), {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]
    assert len(losses) == steps and losses[-1] < losses[0]


def test_own_data_configuration_is_read(model_folder, tmp_path, monkeypatch, capsys):
    """The quick start's YAML file and its two forms of records, with the column names that the file maps."""
    monkeypatch.chdir(tmp_path)
    text = re.search(r"```yaml\n(.*?)```", TEXTS[DOCS / "quick_start.md"], re.DOTALL).group(1)
    config, name = yaml.safe_load(text), "Qwen/Qwen3-0.6B"
    assert config["model"] == name
    Path("mine.yaml").write_text(text.replace(name, str(model_folder)))
    records = RECORDS
    for column, other in config["columns"].items():
        records = records.replace(f'"{column}":', f'"{other}":')
    for form, record in enumerate(records.splitlines()):
        Path(config["train_data"]).write_text(f"{record}\n")
        main(["--config", "mine.yaml", "--dry_run", "true"])
        assert "1 kept" in capsys.readouterr().out, form


def test_training_from_python_runs(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text(RECORDS.splitlines()[0])
    scope = {"folder": str(model_folder)}
    exec(next(block for block in BLOCKS["training.md"] if "train(" in block), scope)
    assert scope["result"].metrics and Path("runs/mine/final").exists()


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
    exec(next(block for block in BLOCKS["layouts.md"] if 'layout="tree"' in block), scope)
    batch = ik.condition_pairs(pairs, pad_token_id=0)
    hidden, head = ik.hidden_and_head(model, **{k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")})
    rows = ik.fused_inspo_loss(hidden, labels=batch["labels"], ref_logps=ref_logps, **head)
    torch.testing.assert_close(scope["out"].loss, rows.loss)
    assert scope["out"].marginal_logps is not None


def test_custom_objective_runs():
    scope = {"ik": ik}
    exec(next(block for block in BLOCKS["objectives.md"] if "class Mine" in block), scope)
    one = torch.ones(1, dtype=torch.float64)
    sums = ik.PairSums(chosen=-2 * one, rejected=-1.5 * one, chosen_len=one, rejected_len=one, index=torch.arange(1))
    assert scope["Mine"]()(sums).tolist() == [1.5]


def test_before_and_after_give_one_loss(model_folder):
    """The README's two fragments compute the same number from the same batch."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    pairs = [([1, 2, 3], [4, 5], [6]), ([7], [8], [9, 10, 11])]
    batch = ik.condition_pairs(pairs, pad_token_id=0)
    labels, ref_logps = batch["labels"], torch.full((4,), -9.0)
    ref_chosen, ref_rejected = ref_logps.chunk(2)
    mask, beta = labels != -100, 0.1
    scope = {"ik": ik, "F": torch.nn.functional, "model": model, "beta": beta, "mask": mask, "ref_logps": ref_logps}
    scope |= {"ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
    scope |= {name: batch[name] for name in ("input_ids", "attention_mask")}
    before, after = BLOCKS["README.md"][:2]
    exec(before, scope, plain := {})
    exec(after, scope | {"labels": labels}, fused := {})
    torch.testing.assert_close(fused["loss"], plain["loss"])


@pytest.mark.parametrize("page", ["README.md", "trl.md"])
def test_trl_snippets_train(model_folder, tmp_path, monkeypatch, page):
    pytest.importorskip("trl")
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    block = next(block for block in BLOCKS[page] if "train_dataset" in block)
    for printed, used in (
        ("Qwen/Qwen3-0.6B", str(model_folder)),
        ("beta=0.1", 'beta=0.1, bf16=False, max_steps=1, report_to="none"'),
    ):
        assert block.count(printed) == 1
        block = block.replace(printed, used)
    pair = {"prompt": "Name a prime.", "chosen": "Seven.", "rejected": "Nine."}
    exec(block, scope := {"dataset": Dataset.from_list([pair] * 8)})
    assert scope["trainer"].state.global_step == 1 and scope["trainer"].args.conditioned


def found(pattern):
    """Return (page, match) for every match in any page."""
    return sorted({(page.name, match) for page, text in TEXTS.items() for match in re.findall(pattern, text)})


@pytest.mark.parametrize("page, command", found(r"python -m ([\w.]+)"))
def test_named_modules_exist(page, command):
    path = ROOT.joinpath(*command.split("."))
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@pytest.mark.parametrize("page, target", found(r"\]\((?!https?://)([^)]+)\)"))
def test_links_lead_somewhere(page, target):
    path, _, heading = target.partition("#")
    (source,) = (p for p in TEXTS if p.name == page)
    target = (source.parent / path).resolve() if path else source
    assert target.exists()
    if heading:
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        assert heading in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]


@pytest.mark.parametrize("page, path", found(r"--config(?:_file)? ((?!FILE|mine)\S+)"))
def test_named_configurations_exist(page, path):
    assert (ROOT / path).exists()


NAMED = re.compile(r"`((?:[\w-]+/)*[\w-]+\.(?:py|yaml|md|png)|(?:[\w-]+/)+)`")
WRITTEN = {
    "checkpoint-STEP/",
    "curves.png",
    "config.yaml",
    "final/",
    "best/",
    "runs/demo/",
    "results.json",
    "picture.png",
}
WRITTEN |= {"mine.yaml"}  # written by the reader


@pytest.mark.parametrize("page, line", found(r"(?m)^.*`[\w/-]+(?:\.(?:py|yaml|md|png)|/)`.*$"))
def test_named_files_exist(page, line):
    """Bare names must be in a folder that the line names, or be example configurations."""
    if page == "fidelity.md":  # it names files of the authors' repository
        return
    names = NAMED.findall(line)
    folders = [ROOT, ROOT / "training/configs", ROOT / "training/configs/accelerate"]
    if page == CONTRIBUTING.name:  # its tables name the package that they describe
        folders += [ROOT / "inspo_kernels", ROOT / "training"]
    folders += [(ROOT / f"{name}x").parent for name in names if "/" in name]
    for name in names:
        assert name in WRITTEN or any((folder / name).exists() for folder in folders), name


@pytest.mark.parametrize("symptom", re.findall(r"(?m)^\*\*`([^`]+)`", TEXTS[DOCS / "troubleshooting.md"]))
def test_quoted_messages_exist(symptom):
    """The code contains some part of each quoted message between its "..."."""
    if "keyword argument" in symptom:  # Python's own message
        return
    code = "".join(
        path.read_text() for folder in ("inspo_kernels", "training") for path in (ROOT / folder).rglob("*.py")
    )
    code = re.sub(r'"\s*f?"', "", code)  # adjacent literals
    parts = [part.strip(" ,") for part in symptom.split("...")]
    assert any(part in code for part in parts if len(part) > 7), symptom


def test_readme_is_short():
    assert len(TEXTS[README].splitlines()) <= 150


def test_every_page_is_in_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert not [page.name for page in DOCS.glob("*.md") if f" {page.name}\n" not in navigation]


def test_every_public_name_is_in_the_reference():
    listed = re.findall(r"^::: inspo_kernels\.([\w.]+)", TEXTS[DOCS / "api.md"], re.MULTILINE)
    names = [*ik.__all__, "integrations.trl.InSPOConfig", "integrations.trl.InSPOTrainer"]
    assert sorted(listed) == sorted(names)


def test_no_passage_stands_twice():
    """No two pages share 25 consecutive words, except that the pages of the studies repeat their findings."""
    pages = {page: text for page, text in TEXTS.items() if not page.name.startswith("study")}
    seen: dict[str, str] = {}
    for page, text in pages.items():
        text = re.sub(r"```.*?```|<sub>.*?</sub>|^\|.*?$", "", text, flags=re.DOTALL | re.MULTILINE)
        words = text.split()
        for start in range(len(words) - 24):
            passage = " ".join(words[start : start + 25])
            assert seen.setdefault(passage, page.name) == page.name, passage


def test_every_module_has_its_place_in_the_table():
    text = TEXTS[CONTRIBUTING]
    table = text[text.index("## Where things are") :]
    modules = [*ROOT.glob("inspo_kernels/*.py"), *ROOT.glob("training/*.py")]
    missing = [m.name for m in modules if m.name != "__init__.py" and not re.search(rf"[`/]{m.name}`", table)]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_parts_are_up_to_date(page):
    assert render(page) == page.read_text(), "run python -m benchmarks.report"
