"""A world whose answers a program judges exactly: reverse a short word, or shift each of its letters by one.

    reverse abcd=  ->  dcba        shift abcd=  ->  bcde

Demonstrations of it are imperfect, and their most frequent error is systematic (the word itself is repeated). So what a
model fitted to them says most often is wrong, while it also knows the right answer: there is something to prefer.
"""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TASKS = ("reverse", "shift")
RIGHT, ECHO = 0.35, 0.50  # shares of demonstrations; the rest are random letters


class Prompt(NamedTuple):
    task: str
    word: str

    def __str__(self) -> str:
        return f"{self.task} {self.word}="


class World:
    """All prompts over an alphabet, split into training and unseen ones.

    ``training`` maps (task, length) to prompts, ``unseen`` is a list with equally many of each (task, length). No
    prompt is in both. Words whose right answer is the word itself are left out: there, the systematic error would
    be right.
    """

    def __init__(self, letters: int, lengths: tuple[int, ...], unseen_per_kind: int, seed: int) -> None:
        self.alphabet = "abcdefghijklmnopqrstuvwxyz"[:letters]
        self.training: dict[tuple[str, int], list[Prompt]] = {}
        self.unseen: list[Prompt] = []
        rng = random.Random(f"world {seed}")
        for task, length in itertools.product(TASKS, lengths):
            prompts = [Prompt(task, "".join(word)) for word in itertools.product(self.alphabet, repeat=length)]
            prompts = [prompt for prompt in prompts if not self.is_right(prompt, prompt.word)]
            rng.shuffle(prompts)
            self.unseen += prompts[:unseen_per_kind]
            self.training[task, length] = prompts[unseen_per_kind:]

    def right_answer(self, prompt: Prompt) -> str:
        if prompt.task == "reverse":
            return prompt.word[::-1]
        following = dict(zip(self.alphabet, self.alphabet[1:] + self.alphabet[0]))
        return "".join(following[letter] for letter in prompt.word)

    def is_right(self, prompt: Prompt, answer: str) -> bool:
        """The judge: nothing but the right answer, letter by letter, is right."""
        return answer == self.right_answer(prompt)

    def draw(self, rng: random.Random) -> Prompt:
        """A training prompt; each task and length is equally likely."""
        return rng.choice(self.training[rng.choice(list(self.training))])

    def demonstrate(self, prompt: Prompt, rng: random.Random) -> str:
        """An imperfect answer: right (35%), the word itself (50%) or random letters (15%)."""
        kind = rng.random()
        if kind < RIGHT:
            return self.right_answer(prompt)
        if kind < RIGHT + ECHO:
            return prompt.word
        return "".join(rng.choices(self.alphabet, k=len(prompt.word)))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a letter, a task and ``=``."""
        words = [*(f"{task} " for task in TASKS), "=", *self.alphabet]
        vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("reverse |shift |."), "isolated")
        tokenizer.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            eos_token="<eos>",
            unk_token="<unk>",
            clean_up_tokenization_spaces=False,
        )
