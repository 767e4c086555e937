"""Test that result files name their commits, and that --resume completes interrupted cells."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from benchmarks import loss, result_files, step


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Create a clean checkout with one code file, one result and one page, and let ``commit`` look at it."""

    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    for name in ("benchmarks/result_files.py", "benchmarks/results/loss_cpu.json", "docs/study.md", "package/code.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    monkeypatch.setattr(result_files, "__file__", str(tmp_path / "benchmarks" / "result_files.py"))
    return tmp_path


def test_results_and_pages_are_no_changes(checkout):
    (checkout / "benchmarks/results/loss_cpu.json").write_text("new\n")
    (checkout / "docs/study.md").write_text("new\n")
    assert "+changes" not in result_files.commit()


def test_changed_code_marks_the_commit(checkout):
    (checkout / "package/code.py").write_text("new\n")
    assert result_files.commit().endswith("+changes")


def test_a_copy_without_git_reads_the_commit_variable(checkout, monkeypatch):
    shutil.rmtree(checkout / ".git")
    assert result_files.commit() is None
    monkeypatch.setenv("INSPO_KERNELS_COMMIT", "1234567")
    assert result_files.commit() == "1234567"


def test_resumed_file_names_every_commit(tmp_path, monkeypatch):
    file = tmp_path / "loss.json"
    arguments = ["--shape", "quick", "--rounds", "1", "--only", "time", "--json", str(file), "--contenders"]
    commits = iter(["aaaaaaa", "bbbbbbb", "bbbbbbb"])
    monkeypatch.setattr(result_files, "commit", lambda: next(commits))
    loss.main([*arguments, "torch"])
    for contenders in (["torch", "log_softmax"], ["torch"]):
        loss.main([*arguments, *contenders, "--resume"])
    assert json.loads(file.read_text())["package"]["commit"] == "aaaaaaa, bbbbbbb"


@pytest.mark.parametrize(
    "main, words",
    [
        (loss.main, ["--shape", "quick", "--contenders", "torch"]),
        (step.main, ["--quick", "--shares", "0.5", "--updates", "1", "--contenders", "rows", "four_forwards"]),
    ],
)
def test_resume_repeats_a_cell_with_too_few_rounds(main, words, tmp_path):
    """Imitate a first call that was killed after its first round."""
    file = tmp_path / "result.json"
    arguments = [*words, "--only", "time", "--json", str(file)]
    main([*arguments, "--rounds", "1"])
    main([*arguments, "--rounds", "3", "--resume"])
    (cell,) = json.loads(file.read_text())["cells"]
    assert cell.get("rounds", cell["contenders"].get("torch", {}).get("rounds")) == 3
    main([*arguments, "--rounds", "2", "--resume"])
    assert json.loads(file.read_text())["cells"] == [cell]


def test_resume_without_a_file_starts_one(tmp_path):
    file = tmp_path / "loss.json"
    words = ["--shape", "quick", "--rounds", "1", "--only", "time", "--contenders", "torch", "--json", str(file)]
    for _ in range(2):
        loss.main([*words, "--resume"])
    result = json.loads(file.read_text())
    assert result["finished"] and result["command"].count("benchmarks.loss") == 1
