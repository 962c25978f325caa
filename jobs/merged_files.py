"""One file of lists, merged again: what a worker process of `jobs.remerge` does. Imports no Spark, so that a process starts in a second."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from conf.errors import PublishError
from conf.settings import RetrievalSettings
from jobs.list_files import ListFile, write_lists
from models.kept import KeptCandidates
from models.merge import Policy
from models.neighbors import MERGED, Neighbors, Retriever
from models.ranking import segments

_FIRST = 10
"""Positions of a list that churn looks at."""


@dataclass(frozen=True, kw_only=True)
class MergeTask:
    """What is the same for all files.

    Attributes:
        index: folder of the night's index.
        candidates: folder of its kept candidates.
        policies: rows of merge_policy by scope.
        settings: list length, filters and limits.
        run_id: of the new lists.
        target: folder or URI of the history, where new files go.
    """

    index: Path
    candidates: Path
    policies: Mapping[str, Policy]
    settings: RetrievalSettings
    run_id: str
    target: str


@dataclass(frozen=True, kw_only=True)
class MergedFile:
    """A file that was written (None: it would have held no list), and sums over its merged lists."""

    file: ListFile | None
    sums: dict[str, float]


def merge_file(source: str, *, task: MergeTask) -> MergedFile:
    """Write a file of item_neighbors anew under another run id, its merged lists by the task's policies.

    Raises:
        PublishError: candidates of some of its items were not kept.
    """
    retriever = Retriever.open(task.index)
    rows = pq.read_table(source, partitioning=None)
    is_merged = pc.equal(rows["head"], MERGED)
    before = rows.filter(is_merged).combine_chunks()
    merged, sums = _merged_again(retriever, before["item_id"], task)
    at = pc.index_in(before["item_id"].combine_chunks(), merged["item_id"].combine_chunks())
    if at.null_count:
        raise PublishError(f"candidates of {at.null_count:,} items of {source} were not kept; run the night again to merge its lists anew")
    merged = merged.take(at)
    sums["churn"] = _churn(before["neighbors"].combine_chunks(), merged["neighbors"].combine_chunks())
    new = _with_columns(before, neighbors=merged["neighbors"], list_hash=merged["list_hash"])
    whole = pa.concat_tables([rows.filter(pc.invert(is_merged)), new])
    whole = _with_columns(whole, run_id=pa.chunked_array([pa.repeat(task.run_id, len(whole))]))
    return MergedFile(file=write_lists([whole], task.target), sums=sums)


def _with_columns(table: pa.Table, **columns: pa.ChunkedArray) -> pa.Table:
    """The table with other values in some columns, its schema unchanged."""
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), values.cast(table.schema.field(at).type))
    return table


def _merged_again(retriever: Retriever, items: pa.ChunkedArray, task: MergeTask) -> tuple[pa.Table, dict[str, float]]:
    """Rows of models.list_rows for (at least) some items, and sums over their lists."""
    triggers = pc.index_in(items.combine_chunks().cast(pa.string()), retriever.item_ids)
    low, high = (int(end) for end in pc.min_max(triggers).as_py().values())
    batches, sums = list[pa.RecordBatch](), dict[str, float]()
    for file in _overlapping(task.candidates, low, high):
        kept = KeptCandidates.open(file)
        lists = retriever.remerge(kept, retriever.policies_for(task.policies, kept.trigger), settings=task.settings)
        batches.append(retriever.to_arrow(lists))
        for name, value in _sums(retriever, kept, lists.heads[MERGED], task.settings).items():
            sums[name] = sums.get(name, 0.0) + value
    if not batches:
        raise PublishError(f"no candidates of items {low} to {high} were kept; run the night again to merge its lists anew")
    return pa.Table.from_batches(batches), sums


def _overlapping(folder: Path, low: int, high: int) -> list[Path]:
    """Files, named after their first trigger, that may hold triggers from low to high."""
    files = sorted(folder.glob("*.arrow"))
    starts = np.array([int(file.stem) for file in files])
    first = max(0, int(np.searchsorted(starts, low, side="right")) - 1)
    return files[first : int(np.searchsorted(starts, high, side="right"))]


def _sums(retriever: Retriever, kept: KeptCandidates, lists: Neighbors, settings: RetrievalSettings) -> dict[str, float]:
    """What the gate looks at, over some merged lists."""
    row = segments(lists.offsets)
    trigger = kept.trigger[row]
    refused = ~retriever.rules(settings).offered(MERGED, trigger, row, lists.neighbor)
    pairs = row * len(retriever.eligible) + lists.neighbor
    return {
        "num_lists": float(len(kept.trigger)),
        "num_items": float((np.diff(lists.offsets) > 0).sum()),
        "num_self_neighbors": float((trigger == lists.neighbor).sum()),
        "num_duplicate_neighbors": float(len(pairs) - len(np.unique(pairs))),
        "num_ineligible_neighbors": float((~retriever.eligible[lists.neighbor]).sum()),
        "num_refused_neighbors": float(refused.sum()),
    }


def _churn(before: pa.ListArray, now: pa.ListArray) -> float:
    """Sum over lists of 1 - Jaccard of the first ten."""
    changed = 0.0
    for old, new in zip(_first_ids(before), _first_ids(now), strict=True):
        both = old | new
        changed += 1 - len(old & new) / len(both) if both else 0.0
    return changed


def _first_ids(lists: pa.ListArray) -> Sequence[set[str]]:
    ids, offsets = lists.values.field("neighbor_id").to_pylist(), lists.offsets.to_pylist()
    return [set(ids[start : min(stop, start + _FIRST)]) for start, stop in pairwise(offsets)]
