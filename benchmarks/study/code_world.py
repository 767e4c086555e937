"""Define a world of real text: functions of the Python standard library, completed from header and docstring.

A prompt is a header and the first line of a docstring. An answer is the body, as ``ast.unparse`` writes it::

    def getpass(self, prompt):
        \"\"\"Read a password.\"\"\"
        return self.read(prompt)

Grading executes nothing. It checks whether the function compiles and which names read by the body are bound.
"""

from __future__ import annotations

import ast
import builtins
import functools
import hashlib
import math
import random
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, END = "<pad>", "<end>"
PAD_ID, END_ID = 0, 1
LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "encodings",
    "pydoc_data",
    "site-packages",
    "__pycache__",
}
LONGEST_TEXT = 600  # characters of a prompt and its body; longer functions have too many tokens
BUILTINS = frozenset(dir(builtins))


@dataclass(frozen=True)
class Function:
    """A function: its prompt, its own body, the names that its module binds, and the module's split.

    ``documented``: whether the prompt has a docstring.
    """

    module: str
    prompt: str
    body: str
    names: frozenset[str]
    documented: bool

    @property
    def part(self) -> str:
        """Return the split of the module. All modules of a package are in the same split."""
        turn = hashlib.sha256(self.module.split(".")[0].encode()).digest()[0] % 10
        return "validation" if turn == 0 else "test" if turn in (1, 2) else "training"


@dataclass(frozen=True)
class Library:
    """The functions by split, and an identification of their sources."""

    parts: dict[str, list[Function]]
    files: int
    digest: str


def read_library(folder: Path | None = None, *, most_files: int | None = None) -> Library:
    """Read every function of the standard library in ``folder`` (None: the library of the running Python).

    ``most_files`` limits the number of files, in order of names, for a quick run.

    Functions whose header, docstring and body occur twice are kept once, in the split that comes first by module name.
    Raises FileNotFoundError if the folder holds no sources, as with a Python that ships only bytecode.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    found: dict[str, Function] = {}
    digest, files = hashlib.sha256(), 0
    for file in sorted(folder.rglob("*.py")):
        place = file.relative_to(folder)
        if LEFT_OUT.intersection(place.parts):
            continue
        if files == most_files:
            break
        source = file.read_bytes()
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        files += 1
        digest.update(source)
        module = ".".join(place.with_suffix("").parts)
        for function in functions_of(tree, module):
            found.setdefault(function.prompt + function.body, function)
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no sources of the standard library, which this study reads: use a Python that ships "
            "them, such as one from python.org or pyenv"
        )
    parts: dict[str, list[Function]] = {"training": [], "validation": [], "test": []}
    for function in found.values():
        parts[function.part].append(function)
    return Library(parts, files, digest.hexdigest()[:16])


def functions_of(tree: ast.Module, module: str) -> Iterator[Function]:
    """Yield the functions of a module that compile on their own and are not too long."""
    names = frozenset(bound_names(tree.body, nested=False))
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        docstring = ast.get_docstring(node)
        body = node.body[1:] if docstring is not None else node.body
        if not body:
            continue
        bare = ast.FunctionDef(node.name, node.args, body, [], node.returns, lineno=1)
        header, _, rest = ast.unparse(bare).partition("\n")
        first = docstring.split("\n")[0].strip() if docstring else ""
        if first:
            said = ast.FunctionDef(node.name, node.args, [ast.Expr(ast.Constant(first))], [], node.returns, lineno=1)
            header = ast.unparse(said)
        function = Function(module, header, "\n" + rest, names, bool(first))
        if len(header) + len(rest) < LONGEST_TEXT and parse(function, function.body):
            yield function


def bound_names(body: Iterable[ast.AST], *, nested: bool) -> Iterator[str]:
    """Yield the names that statements bind; without ``nested`` only those bound at their own level, as in a module."""
    for statement in body:
        for node in ast.walk(statement) if nested else _own_level(statement):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                yield node.id
            elif isinstance(node, ast.arg):
                yield node.arg
            elif isinstance(node, ast.alias):
                yield (node.asname or node.name).split(".")[0]
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler)):
                yield node.name or ""


def _own_level(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
        for child in ast.iter_child_nodes(node):
            yield from _own_level(child)


def parse(function: Function, answer: str) -> ast.FunctionDef | None:
    """Return the function with ``answer`` as its body, or None if it does not compile or is not a single function."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(function.prompt + answer)
            compile(tree, "answer", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    (*before, last) = tree.body
    return last if not before and isinstance(last, ast.FunctionDef) else None


def quality(function: Function, answer: str | None) -> float:
    """Grade an answer: 0 if it does not compile, else 1/2 + 1/2 (share of the names it reads that are bound).

    A name is bound if it is a parameter, assigned or imported in the function, a builtin, or bound by the prompt's
    module. An answer that reads no name gets 1/2, so that ``pass`` is not perfect. An answer without end (None) gets 0.
    """
    node = parse(function, answer) if answer is not None else None
    if node is None:
        return 0.0
    body = node.body[1:] if function.documented else node.body
    read = [n.id for part in body for n in ast.walk(part) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
    if not read:
        return 0.5
    known = BUILTINS | function.names | set(bound_names([node.args, *body], nested=True))
    return 0.5 + 0.5 * sum(name in known for name in read) / len(read)


@dataclass(frozen=True)
class Judge:
    """Prefers the first answer with probability sigmoid(a (quality difference) + b (length difference in tokens)).

    ``noise``: the share of verdicts on training pairs that are flipped.
    """

    a: float = 6.0
    b: float = 0.05
    noise: float = 0.15

    def score(self, quality: float, length: int) -> float:
        return self.a * quality + self.b * length

    def prefers(self, first: float, second: float) -> float:
        """Return the probability of preferring the answer whose score is ``first``."""
        return 1 / (1 + math.exp(second - first))


class Vocabulary:
    """A byte-pair encoding of a given size, trained on the training split alone."""

    def __init__(self, functions: Iterable[Function], size: int) -> None:
        self.tokenizer = Tokenizer(models.BPE())
        # A line break and the following indentation form one token.
        pieces = pre_tokenizers.Split(Regex(r"\n *| ?\w+| ?[^\w\s]+|\s+"), "isolated")
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, bytes_of])
        self.tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[PAD, END],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        self.tokenizer.train_from_iterator((f.prompt + f.body for f in functions), trainer)
        self._encode = functools.cache(lambda text: self.tokenizer.encode(text).ids)

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return list(self._encode(text))

    def prompt(self, function: Function) -> list[int]:
        return self.encode(function.prompt)

    def body(self, function: Function) -> list[int]:
        return [*self.encode(function.body), END_ID]

    def text(self, answer: Sequence[int]) -> str | None:
        """Return the text of an answer's ids; None for an answer without end."""
        return self.tokenizer.decode(list(answer[:-1])) if answer and answer[-1] == END_ID else None


def damaged(body: Sequence[int], size: int, rng: random.Random) -> list[int]:
    """Return a draft of ``body`` with one to three corruptions: tokens removed, repeated or replaced at random."""
    draft = list(body[:-1])
    for _ in range(rng.randint(1, 3)):
        at, count = rng.randrange(len(draft) + 1), rng.randint(1, 6)
        piece = draft[at : at + count]
        kind = rng.random()
        new = [] if kind < 0.5 else piece * 2 if kind < 0.75 else [rng.randrange(2, size) for _ in piece]
        draft[at : at + count] = new
    return [*(draft or [rng.randrange(2, size)]), END_ID]
