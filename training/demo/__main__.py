"""Run ``python -m training.demo``: fine-tune a tiny model with SFT, DPO and InSPO, and compare their answers."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from ..errors import InputError, SaveError, Stopped
from ..train import STOPPED
from .report import assumption, examples, over_training, ranking, reflection, table
from .settings import Settings
from .stages import PICTURE, RESULTS, run_demo
from .world import ECHO, RIGHT


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 2 on bad input, 1 if the disk is full, 130 on Ctrl-C, 143 on SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m training.demo", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--seed", type=int, default=0, help="seed of the world, the models and the sampling [0]")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/demo"), help="an earlier demo there is replaced [runs/demo]"
    )
    parser.add_argument("--quick", action="store_true", help="run everything in seconds; the models learn little")
    options = parser.parse_args(arguments)
    settings = Settings.quick(options.seed) if options.quick else Settings(seed=options.seed)

    logging.disable_progress_bar()  # a bar for each file read or written hides the demo's own lines
    shares = f"{RIGHT:.0%} right, {ECHO:.0%} the word itself,\n{1 - RIGHT - ECHO:.0%} random letters"
    print(f"A small world: reverse a word, or shift its letters. Its demonstrations are {shares}.")
    print("A model fitted to them mostly repeats the word; then it learns from its own answers, judged by a program.")
    try:
        results = run_demo(settings, options.output_dir)
    except (InputError, SaveError, Stopped, OSError) as error:
        print(error if isinstance(error, Stopped) else f"error: {error}", file=sys.stderr)
        sys.exit(STOPPED if isinstance(error, Stopped) else 2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        print("interrupted; the next run of the demo starts from the beginning", file=sys.stderr)
        sys.exit(130)
    seconds = results["seconds"]["total"]
    print(f"\nOn unseen prompts, from the prompt alone (seed {settings.seed}, {seconds:.0f} s in all):\n")
    print(f"{table(results)}\n\n{ranking(results)}")
    print(f"\n{over_training(results)}\n\n{examples(results)}\n\n{assumption(results)}\n\n{reflection(results)}\n")
    print(f"picture: {options.output_dir / PICTURE}    numbers: {options.output_dir / RESULTS}")
    model, prompt = options.output_dir / "inspo" / "final", results["examples"][0]["prompt"]
    command = [sys.executable, "-m", "training.generate", "--model", str(model), "--prompt", str(prompt)]
    print(f"ask it:  {shlex.join(command)}")


if __name__ == "__main__":
    main()
