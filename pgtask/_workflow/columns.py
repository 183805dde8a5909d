"""The columns that the statements of a journal take: rows turned into arrays, as few as will do.

Invariant: an empty column says the same as one of nulls, and costs nothing to send.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pgtask._workflow.values import Checkpoint

__all__ = ["checkpoint_columns", "sparse", "transpose"]


def checkpoint_columns(checkpoints: Sequence[Checkpoint]) -> Sequence[list[Any]]:
    """Return the columns of checkpoints. Those are empty of which all have the usual value, that of a first try."""
    if not checkpoints:
        return [[]] * len(Checkpoint._fields)
    columns = transpose(checkpoints)
    if columns.kind.count("step") == len(checkpoints):
        columns = columns._replace(kind=[])
    if columns.tried.count(0) == len(checkpoints):
        columns = columns._replace(tried=[])
    return list(columns)


def transpose(rows: Sequence[Any]) -> Any:
    """Turn rows of a NamedTuple into the NamedTuple of its columns."""
    return type(rows[0])(*(sparse(list(column)) for column in zip(*rows, strict=True)))


def sparse(column: list[Any]) -> list[Any]:
    """Empty a column of nulls."""
    return [] if column and column[0] is None and column.count(None) == len(column) else column
