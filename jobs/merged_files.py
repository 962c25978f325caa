"""One file of lists, merged again: what a worker process of `jobs.remerge` does. Imports no Spark, so that a process starts in a second."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from conf.errors import PublishError
from conf.settings import RetrievalSettings
from features.pair_files import open_uri
from features.pair_kernels import Ints, ranges
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
    files, path = open_uri(source)
    rows = pq.read_table(path, filesystem=files, partitioning=None)
    is_merged = pc.equal(rows["head"], MERGED).combine_chunks()
    items = rows["item_id"].filter(is_merged).combine_chunks()
    merged, sums = _merged_again(retriever, items, task)
    at = pc.index_in(items, merged["item_id"].combine_chunks())
    if at.null_count:
        raise PublishError(f"candidates of {at.null_count:,} items of {source} were not kept; run the night again to merge its lists anew")
    old = np.flatnonzero(is_merged.to_numpy(zero_copy_only=False))
    new = len(rows) + at.to_numpy()  # of the merged rows, behind the old ones
    place = np.arange(len(rows))
    place[old] = new
    both = {
        name: pa.concat_arrays([*rows[name].chunks, *merged[name].cast(rows.schema.field(name).type).chunks])
        for name in ("neighbors", "list_hash")
    }
    sums["churn"] = _churn(both["neighbors"], old, new)
    columns = {name: rows[name] for name in rows.column_names} | {name: values.take(pa.array(place)) for name, values in both.items()}
    columns["run_id"] = pa.chunked_array([pa.repeat(task.run_id, len(rows))])
    return MergedFile(file=write_lists([pa.table(columns, schema=rows.schema)], task.target), sums=sums)


def _merged_again(retriever: Retriever, items: pa.Array, task: MergeTask) -> tuple[pa.Table, dict[str, float]]:
    """Rows of models.list_rows for (at least) some items, and sums over their lists."""
    triggers = pc.index_in(items.cast(pa.string()), retriever.item_ids)
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


def _churn(lists: pa.ListArray, before: Ints, now: Ints) -> float:
    """Sum of 1 - Jaccard of the first ten, over the lists that each list before has become."""
    firsts = [_first_ids(lists, rows) for rows in (before, now)]
    codes = pa.concat_arrays([ids for _, ids in firsts]).dictionary_encode()
    number, code = np.concatenate([number for number, _ in firsts]), codes.indices.to_numpy()
    old, new = np.split(number * len(codes.dictionary) + code, [len(firsts[0][0])])  # an id is in a list once
    kept = np.bincount(np.intersect1d(old, new, assume_unique=True) // max(1, len(codes.dictionary)), minlength=len(before))
    either = np.bincount(number, minlength=len(before)) - kept
    return float((1 - kept[either > 0] / either[either > 0]).sum())


def _first_ids(lists: pa.ListArray, rows: Ints) -> tuple[Ints, pa.Array]:
    """The first ten ids of some lists, and the number, from 0, of the list that each is of."""
    starts = lists.offsets.to_numpy().astype(np.int64)
    lengths = np.minimum(np.diff(starts)[rows], _FIRST)
    ids = lists.values.field("neighbor_id").take(pa.array(ranges(starts[rows], lengths)))
    return np.repeat(np.arange(len(rows)), lengths), ids
