"""Lists as rows of a table: ids, a hash that unchanged lists keep, and for every neighbor the reason in words.

    9 users engaged with both, together on 12 user-days; same CONDENSED SOUP; both vegan, organic; found by counts, content

Users are distinct people who engaged with both items at any time, user-days those on which they did so inside the window that pairs are
counted in. Pairs of fewer users than the privacy minimum are counted in neither, and leave no trace here.
Shapes: `B` triggers, `R` neighbors of a head's lists, `N` items, `L` category levels.
"""

import hashlib
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models.data import Ints
from models.eligibility import FilterColumn
from models.ranking import segments

if TYPE_CHECKING:
    from models.neighbors import NeighborLists, Neighbors

_TAGS_NAMED = 2
_NEIGHBOR_TYPE = pa.struct(
    [
        ("neighbor_id", pa.string()),
        ("score", pa.float64()),
        ("reason", pa.string()),
        ("sources", pa.list_(pa.string())),
        ("num_user_days", pa.int64()),
        ("relevance", pa.float64()),
        ("filled", pa.bool_()),
    ]
)
ARROW_SCHEMA = pa.schema(
    [("item_id", pa.string()), ("head", pa.string()), ("neighbors", pa.list_(_NEIGHBOR_TYPE)), ("list_hash", pa.string())]
)


def list_rows(
    lists: "NeighborLists", *, item_ids: pa.Array, category_names: pa.Array, categories: Ints, tags: FilterColumn
) -> pa.RecordBatch:
    """One row per head and trigger, in ARROW_SCHEMA; a trigger without neighbors has an empty list.

    Args:
        lists: of B triggers.
        item_ids: (N,) strings in index order.
        category_names: a name per category code.
        categories: (N, L) codes per level, -1 behind the end.
        tags: of the N items, the rarest first; reasons name the first two in common.
    """
    items = item_ids.take(pa.array(np.tile(lists.trigger, len(lists.heads))))
    names = pa.array([name for name in lists.heads for _ in lists.trigger], pa.string())
    columns = []
    for neighbors in lists.heads.values():
        trigger = lists.trigger[segments(neighbors.offsets)]
        coarse_to_fine = categories[trigger]
        shared = np.full(len(neighbors.neighbor), -1, np.int32)
        some = neighbors.shared_depth > 0
        shared[some] = np.take_along_axis(coarse_to_fine[some], neighbors.shared_depth[some, None].astype(np.int64) - 1, axis=1)[:, 0]
        same = category_names.take(pa.array(shared, mask=shared < 0))
        columns.append(_list_array(neighbors, item_ids, (same, _shared_tags(tags, trigger, neighbors.neighbor)), lists.source_names))
    hashes = pa.array([hashed for column in columns for hashed in list_hashes(column)], pa.string())
    return pa.RecordBatch.from_arrays([items, names, pa.concat_arrays(columns), hashes], schema=ARROW_SCHEMA)


def list_hashes(neighbors: pa.ListArray) -> list[str]:
    """SHA-1 of each list's neighbor ids in order: consumers take only what changed."""
    ids, offsets = neighbors.values.field("neighbor_id").to_pylist(), neighbors.offsets.to_pylist()
    return [hashlib.sha1("\x1f".join(ids[a:b]).encode(), usedforsecurity=False).hexdigest() for a, b in pairwise(offsets)]


def _shared_tags(tags: FilterColumn, trigger: Ints, neighbor: Ints) -> pa.Array:
    """(R,) names of the two rarest tags that trigger and neighbor share, null where there is none."""
    both = tags.shared_values(trigger, neighbor)
    names, codes = pa.array(tags.values, pa.string()), tags.codes[trigger]
    named = None
    for _ in range(_TAGS_NAMED):
        rows = np.flatnonzero(both.any(axis=1))
        column = both[rows].argmax(axis=1) if len(rows) else rows
        code = np.full(len(trigger), -1, np.int32)
        code[rows] = codes[rows, column]
        both[rows, column] = False
        name = names.take(pa.array(code, mask=code < 0))
        rest = name if named is None else pc.fill_null(pc.binary_join_element_wise(", ", name, ""), "")
        named = rest if named is None else pc.binary_join_element_wise(named, rest, "")
    return named


def _list_array(lists: "Neighbors", item_ids: pa.Array, alike: tuple[pa.Array, pa.Array], source_names: tuple[str, ...]) -> pa.ListArray:
    masks, which = np.unique(lists.sources, return_inverse=True)
    words = [[name for bit, name in enumerate(source_names) if mask >> bit & 1] for mask in masks.tolist()]
    found = pa.array(["found by " + ", ".join(some) for some in words], pa.string()).take(pa.array(which))
    found = pc.if_else(pa.array(lists.filled), "fills up the list", found)
    columns = [
        item_ids.take(pa.array(lists.neighbor)),
        pa.array(lists.score),
        _reasons(lists, *alike, found),
        pa.array(words, pa.list_(pa.string())).take(pa.array(which)),
        *(pa.array(getattr(lists, name)) for name in ("num_user_days", "relevance", "filled")),
    ]
    structs = pa.StructArray.from_arrays(columns, fields=list(_NEIGHBOR_TYPE))
    return pa.ListArray.from_arrays(pa.array(lists.offsets.astype(np.int32)), structs)


def _reasons(lists: "Neighbors", same: pa.Array, tags: pa.Array, found: pa.Array) -> pa.Array:
    """(R,) by how many and how often engaged with, the finest category in common, tags in common, which source found it."""
    days, users = pa.array(lists.num_user_days), pa.array(lists.num_users)
    counted, known = pc.greater(days, 0), pc.greater(users, 0)
    who = pc.if_else(known, pc.binary_join_element_wise(users.cast(pa.string()), " users engaged with both", ""), "engaged with both")
    often = pc.if_else(counted, pc.binary_join_element_wise(", together on ", days.cast(pa.string()), " user-days", ""), "")
    together = pc.if_else(pc.or_(counted, known), pc.binary_join_element_wise(who, often, ""), pa.scalar(None, pa.string()))
    alike = (pc.binary_join_element_wise("same ", same, ""), pc.binary_join_element_wise("both ", tags, ""))
    return pc.binary_join_element_wise(together, *alike, found, "; ", null_handling="skip")
