"""What the gate of lists looks at, list by list: nothing of the code that made the lists is used here."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

LIST_SCHEMA = (
    "item_id string, head string, num_neighbors int, holds_itself boolean, repeats boolean, rises boolean, num_nonfinite int, "
    "num_ineligible int, first array<string>, ids array<string>"
)
"""A list: how long it is and what is wrong with it; the ids of its first ten, and of its whole where it is in the sample."""

_ARROW = pa.schema(
    [
        ("item_id", pa.string()),
        ("head", pa.string()),
        ("num_neighbors", pa.int32()),
        ("holds_itself", pa.bool_()),
        ("repeats", pa.bool_()),
        ("rises", pa.bool_()),
        ("num_nonfinite", pa.int32()),
        ("num_ineligible", pa.int32()),
        ("first", pa.list_(pa.string())),
        ("ids", pa.list_(pa.string())),
    ]
)
_FIRST = 10

Longs = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ListRule:
    """What lists are held against: ids of the items that may be offered, and of the triggers whose lists are returned whole."""

    eligible: pa.Array
    sample: pa.Array


def inspect_lists(rows: pa.RecordBatch, *, rule: ListRule) -> pa.RecordBatch:
    """Rows of LIST_SCHEMA for lists with item_id, head and neighbors of at least neighbor_id and score.

    A neighbor without an id may not be offered; a score that is not a number neither rises nor falls.
    """
    lists = rows["neighbors"]
    flat, length = lists.flatten(), pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)
    ids, scores = flat.field("neighbor_id"), flat.field("score").to_numpy(zero_copy_only=False)
    ends = np.concatenate([[0], np.cumsum(length)])
    row = np.repeat(np.arange(len(length)), length)
    coded = ids.dictionary_encode()
    code = pc.fill_null(coded.indices, -1).to_numpy().astype(np.int64)
    offered = np.append(pc.is_in(coded.dictionary, value_set=rule.eligible).to_numpy(zero_copy_only=False), False)  # -1: no id
    own = pc.fill_null(pc.index_in(rows["item_id"], value_set=coded.dictionary), -2).to_numpy().astype(np.int64)
    finite, follows = np.isfinite(scores), row[1:] == row[:-1]

    def lists_with(faulty: NDArray[np.bool_], of: Longs) -> Longs:
        return np.bincount(of[faulty], minlength=len(length))

    key = np.sort(row * (len(coded.dictionary) + 1) + code + 1)
    repeated = np.flatnonzero(key[1:] == key[:-1]) if len(key) else np.zeros(0, np.int64)
    columns = [
        rows["item_id"],
        rows["head"],
        pa.array(length, pa.int32()),
        pa.array(lists_with(code == own[row], row) > 0),
        pa.array(np.bincount(key[repeated] // (len(coded.dictionary) + 1), minlength=len(length)) > 0),
        pa.array(lists_with(follows & (scores[1:] > scores[:-1]), row[1:]) > 0),
        pa.array(lists_with(~finite, row), pa.int32()),
        pa.array(lists_with(~offered[code], row), pa.int32()),
        _parts(ids, ends[:-1], np.minimum(length, _FIRST)),
        _parts(ids, ends[:-1], length, wanted=pc.is_in(rows["item_id"], value_set=rule.sample).to_numpy(zero_copy_only=False)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_ARROW)


def _parts(ids: pa.Array, starts: Longs, lengths: Longs, *, wanted: NDArray[np.bool_] | None = None) -> pa.ListArray:
    """The first so many ids of each list; null for a list that is not wanted."""
    lengths = lengths if wanted is None else np.where(wanted, lengths, 0)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    place = np.arange(ends[-1]) + np.repeat(starts - ends[:-1], lengths)
    mask = None if wanted is None else pa.array(~wanted)
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), ids.take(pa.array(place)), mask=mask)
