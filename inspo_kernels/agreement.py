"""Check that all ranks that share a loss got the same arguments, with a few bytes in the first collective.

Ranks that disagree would wait for each other forever, or compute wrong results. So every rank sends an 8-byte
fingerprint of each argument, its number of words and the range of its labels. All ranks read the same answer, in the
host read that planning needs anyway. If a rank refuses its own arguments it says so, and the others raise as well.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .groups import VocabGroup, gather, sequence_totals

# Arguments that must be equal on all ranks, in the order in which a difference is reported.
_SAME = (
    "hidden",
    "weight",
    "weight's rows",
    "labels",
    "objective",
    "num_pairs",
    "ref_logps",
    "pair_weights",
    "marginal_weight",
    "softcap",
    "logit_scale",
    "temperature",
    "ignore_index",
    "reduction",
    "statistics",
    "max_workspace_bytes",
    "backend",
    "requires_grad",
)
# Ranks of process_group hold different rows. Ranks of sequence_group hold different tokens and run their own passes.
_MAY_DIFFER = {
    "process_group": {"weight's rows"},
    "sequence_group": {"hidden", "labels", "max_workspace_bytes", "backend", "requires_grad"},
}
_HEADER = ("status", "words", "valid", "lowest", "highest")
_WIDTH = len(_HEADER) + len(_SAME)
# The columns of a message that must be equal on all ranks of a group.
_COLUMNS = {
    group: [len(_HEADER) + i for i, name in enumerate(_SAME) if name not in others]
    for group, others in _MAY_DIFFER.items()
}
_REFUSED, _ELSEWHERE = 1, 2
# Ranks of a sequence also send their counts of scored tokens, for up to this many segments. A second collective, whose
# size depends on the batch, would have to wait until the host has read that all ranks agree.
_MOST_COUNTS = 256


class Split:
    """The groups of a call that have more than one rank; ``vocab`` is set once the ranks have agreed."""

    def __init__(self, groups: dict[str, Any]) -> None:
        self.groups = groups
        self.vocab: VocabGroup | None = None
        self.agreed = False
        self._totals: tuple[Tensor, list[int]] | None = None
        self.sequence = groups.get("sequence_group")

    @classmethod
    def of(cls, process_group: Any, sequence_group: Any = None) -> Split | None:
        """Return the split of these groups, or None if no group has more than one rank; raise under torch.compile."""
        named = {"process_group": process_group, "sequence_group": sequence_group}
        given = {name: group for name, group in named.items() if group is not None}
        if given and torch.compiler.is_compiling():
            raise ValueError(
                f"{next(iter(given))} is not supported under torch.compile: call the loss outside the compiled "
                "function, or in one that is decorated with torch.compiler.disable"
            )
        groups = {name: group for name, group in given.items() if _size(name, group) > 1}
        return cls(groups) if groups else None

    def refuse(self, device: torch.device) -> None:
        """Tell the other ranks about an error of this rank, unless the first collective has been made."""
        if not self.agreed:
            words = torch.zeros(_WIDTH, dtype=torch.int64, device=device)
            words[0] = _REFUSED
            self._gather(words, words[:0])

    def agree(self, plan: Tensor, same: Mapping[str, Any], words: int, device: torch.device) -> list[int]:
        """Compare the ranks' arguments, and read ``plan`` on the host with the answer.

        Args:
            plan: (n,) int64: whether the segments are valid, lowest and highest label, then counts of scored tokens.
            same: the arguments that must be equal on all ranks, by name.
            words: rows of this rank's weight.
            device: where the group communicates.

        Raises:
            ValueError: on every rank; the message names the argument and the ranks that differ.
        """
        same = {**same, "weight's rows": words}
        parts = [torch.tensor([0, words], device="cpu"), plan[:3], *(_word(same.get(name)) for name in _SAME)]
        message = torch.cat([part.to(device, non_blocking=True) for part in parts])
        counts = plan[3:].to(device, non_blocking=True)
        tables = self._gather(message, counts)
        here = [table.flatten() for table in tables.values()]
        if plan.device == message.device:
            here.append(plan)
        read = iter(torch.cat(here).tolist())
        for name, table in tables.items():
            messages = [list(islice(read, table.shape[1])) for _ in range(len(table))]
            own = dist.get_rank(self.groups[name])
            _check(name, messages, self.vocab_size(words), own)
            if name == "process_group":
                starts = tuple(accumulate((message[1] for message in messages), initial=0))
                if not starts[-1]:
                    raise ValueError("weight has no rows on any rank of process_group")
                self.vocab = VocabGroup(self.groups[name], own, starts)
            elif len(counts) <= _MOST_COUNTS:
                columns = slice(_WIDTH, _WIDTH + len(counts))
                self._totals = table[:, columns].sum(0), [sum(each) for each in zip(*(m[columns] for m in messages))]
        return list(read) if plan.device == message.device else plan.tolist()

    def total_counts(self, counts: Tensor) -> tuple[Tensor, list[int]]:
        """Return ``counts`` (n,) of scored tokens summed over the sequence's ranks, on the device and on the host."""
        if self._totals is None:
            (total,) = sequence_totals(self.sequence, counts)
            self._totals = total, total.tolist()
        return self._totals

    def vocab_size(self, words: int) -> int:
        """Return the number of words of all ranks, if this rank holds ``words``."""
        return words if self.vocab is None else self.vocab.vocab_size

    def _gather(self, message: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """Return the messages of all ranks of each group; the second group learns of errors in the first."""
        self.agreed = True
        tables: dict[str, Tensor] = {}
        for name, group in self.groups.items():
            sent = message
            if name == "sequence_group":
                sent = torch.cat([message, message.new_zeros(_MOST_COUNTS)])
                if len(counts) <= _MOST_COUNTS:
                    sent[_WIDTH : _WIDTH + len(counts)] = counts
            table = tables[name] = gather(sent, group, f"the arguments of the other ranks of {name}")
            columns = torch.tensor(_COLUMNS[name], device="cpu").to(message.device, non_blocking=True)
            wrong = (table[:, columns] != message[columns]).any() | (table[:, 0] != 0).any()
            message = torch.cat([torch.where(message[:1] == 0, wrong * _ELSEWHERE, message[:1]), message[1:]])
        return tables


@contextmanager
def errors_shared(split: Split | None, hidden: Any) -> Iterator[None]:
    """Tell the other ranks about an error before the first collective, so that they raise instead of waiting."""
    try:
        yield
    except Exception:
        if split is not None:
            split.refuse(hidden.device if isinstance(hidden, Tensor) else torch.device("cpu"))
        raise


def splits_words(split: Split | None) -> bool:
    """Return whether ranks hold different words of the head."""
    return split is not None and "process_group" in split.groups


def _check(name: str, messages: list[list[int]], vocab_size: int, own: int) -> None:
    """Raise unless the messages of all ranks of group ``name`` agree."""

    def refuse(wrong: list[bool], problem: str) -> None:
        if any(wrong):
            raise ValueError(f"{_named(wrong)} of {name} {problem}: see its own error")

    refuse([message[0] == _REFUSED for message in messages], "refused its arguments")
    for column in _COLUMNS[name]:
        values = [message[column] for message in messages]
        usual = Counter(values).most_common(1)[0][0]
        if len(set(values)) > 1:
            argument = _SAME[column - len(_HEADER)]
            raise ValueError(
                f"{name}: {_named([value != usual for value in values])} got a different {argument} than rank "
                f"{values.index(usual)}; all ranks of the group must be given the same {argument}"
            )
    refuse([message[0] == _ELSEWHERE for message in messages], "disagrees with its process_group")
    # Ranks of process_group have the same labels. Wrong labels of this rank get a more detailed error elsewhere.
    wrong = [not (valid and 0 <= lowest and highest < vocab_size) for _, _, valid, lowest, highest, *_ in messages]
    if name == "sequence_group" and not wrong[own]:
        refuse(wrong, "refused its labels")


def _named(wrong: list[bool]) -> str:
    ranks = [str(rank) for rank, is_wrong in enumerate(wrong) if is_wrong]
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(ranks)}"


def _size(name: str, group: Any) -> int:
    if not isinstance(group, dist.ProcessGroup):
        hint = ": pass mesh.get_group()" if type(group).__name__ == "DeviceMesh" else ""
        raise TypeError(f"{name} must be a torch.distributed ProcessGroup or None, got {type(group).__name__}{hint}")
    return dist.get_world_size(group)


def _word(value: Any) -> Tensor:
    """Return (1,) int64 that almost surely differs for different values."""
    if isinstance(value, Tensor):
        return fingerprint(value)
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # addresses differ between ranks
    return torch.tensor([int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")], device="cpu")


def fingerprint(values: Tensor) -> Tensor:
    """Return a (1,) int64 hash of the int64 or float64 ``values``, on their device."""
    bits = values.detach().flatten().view(torch.int64)
    place = torch.arange(1, len(bits) + 1, device=bits.device)
    mixed = (bits + place * -7046029254386353131) * -4658895280553007687
    return ((mixed ^ (mixed >> 32)) * (2 * place + 1)).sum().view(1) + len(bits)
