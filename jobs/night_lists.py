"""What has become of a night's lists: what changed against the night published before, and how they fare where little is known. No Spark.

Both are read from `item_neighbors_history` for a part of the triggers, so that a report costs little however large the catalog is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from conf.tables import ITEM_NEIGHBORS_HISTORY
from jobs.explorer.catalog import Catalog, Item
from jobs.reader import open_table

NUM_LOOKED_AT = 2_000
_NUM_SHOWN = 8
_DEPTH = 10
_LOOKED_AT = ("run_id", "head", "item_id", ".neighbor_id", ".num_user_days", ".relevance", ".filled")
_NEVER = "never engaged with"
_SLICES = ((_NEVER, 0.0, 0.0), ("less popular half", 0.5, 1.0), ("next 40 %", 0.1, 0.5), ("next 9 %", 0.01, 0.1), ("top 1 %", 0.0, 0.01))
"""Name, and which part of the engaged catalog by popularity rank: from, to."""

Value = TypeVar("Value")
Lists = Mapping[str, list[dict[str, Any]]]
"""Neighbors of the merged list by item."""


@dataclass(frozen=True, kw_only=True)
class Changed:
    """A trigger whose first ten places have changed: what came and what went."""

    item: Item
    similarity: float
    came: Sequence[Item]
    went: Sequence[Item]


@dataclass(frozen=True, kw_only=True)
class Changes:
    """The night's merged lists against those of another run."""

    run_id: str
    num_both: int
    num_changed: int
    num_new: int
    num_gone: int
    num_looked_at: int
    most: Sequence[Changed]


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Lists of the triggers of one slice of popularity; shares in [0,1], NaN where nothing was looked at. See SLICE_COLUMNS."""

    name: str
    num_triggers: int
    num_looked_at: int
    counted: float = float("nan")
    relevance: float = float("nan")
    to_the_hottest: float = float("nan")
    filled: float = float("nan")


@dataclass(frozen=True, kw_only=True)
class NightLists:
    """The merged lists of one run in history."""

    root: str
    run_id: str
    catalog: Catalog
    _hashes: dict[str, dict[str, str]] = field(default_factory=dict)
    _read: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)

    def changes(self, before: str) -> Changes | None:
        """Against another run; None if its lists are no longer kept."""
        now, then = (self._hashes_of(run_id) for run_id in (self.run_id, before))
        if not then:
            return None
        both = sorted(now.keys() & then.keys())
        changed = [item_id for item_id in both if now[item_id] != then[item_id]]
        looked_at = _spread(changed, NUM_LOOKED_AT)
        lists, earlier = (self._lists(run_id, looked_at) for run_id in (self.run_id, before))
        pairs = {item_id: (_first(lists[item_id]), _first(earlier[item_id])) for item_id in looked_at}
        order = sorted(looked_at, key=lambda item_id: (_jaccard(*pairs[item_id]), item_id))
        return Changes(
            run_id=before,
            num_both=len(both),
            num_changed=len(changed),
            num_new=len(now.keys() - then.keys()),
            num_gone=len(then.keys() - now.keys()),
            num_looked_at=len(looked_at),
            most=[self._changed(item_id, *pairs[item_id]) for item_id in order[:_NUM_SHOWN] if _jaccard(*pairs[item_id]) < 1],
        )

    def _changed(self, item_id: str, now: Sequence[str], then: Sequence[str]) -> Changed:
        came, went = [other for other in now if other not in then], [other for other in then if other not in now]
        items = self.catalog.known([item_id, *came, *went])
        named = [[items[other] for other in side] for side in (came, went)]
        return Changed(item=items[item_id], similarity=_jaccard(now, then), came=named[0], went=named[1])

    def slices(self) -> list[Slice]:
        """From the triggers about which nothing is known to the best known ones."""
        ids, hottest = self._slice_ids, set(self.catalog.ids_of_ranks(range(1, max(1, self.catalog.num_items // 100) + 1)).values())
        lists = self._lists(self.run_id, list(ids.values()))
        return [
            _slice(name, len(ranks), [lists[ids[rank]] for rank in _sample(ranks) if lists.get(ids.get(rank, ""))], hottest)
            for name, ranks in self._ranks().items()
        ]

    @cached_property
    def _slice_ids(self) -> dict[int, str]:
        """The triggers that the slices look at, by popularity rank."""
        return self.catalog.ids_of_ranks([rank for ranks in self._ranks().values() for rank in _sample(ranks)])

    def _ranks(self) -> dict[str, range]:
        """Popularity ranks of each slice; those never engaged with come behind all others."""
        engaged, whole = self.catalog.num_engaged, self.catalog.num_items
        found = {name: range(1 + int(low * engaged), 1 + int(high * engaged)) for name, low, high in _SLICES}
        found[_NEVER] = range(1 + engaged, 1 + whole)
        return {name: ranks for name, ranks in found.items() if len(ranks)}

    def _hashes_of(self, run_id: str) -> dict[str, str]:
        if run_id not in self._hashes:
            rows = self._dataset().to_table(columns=["item_id", "list_hash"], filter=_merged(run_id))
            self._hashes[run_id] = dict(zip(rows["item_id"].to_pylist(), rows["list_hash"].to_pylist(), strict=True))
        return self._hashes[run_id]

    def _lists(self, run_id: str, item_ids: Sequence[str]) -> Lists:
        """The lists of some triggers; those of this run together with the ones that the slices look at, as a pass over a night costs."""
        known = self._read.setdefault(run_id, {})
        missing = {*item_ids, *(self._slice_ids.values() if run_id == self.run_id else ())} - known.keys()
        if missing:
            wanted = pa.array(sorted(missing), pa.string())
            for batch in self._batches(run_id):
                mine = pc.and_(pc.equal(batch["run_id"], run_id), pc.equal(batch["head"], "merged"))
                rows = batch.filter(pc.and_(mine, pc.is_in(batch["item_id"], wanted)))
                known |= dict(zip(rows["item_id"].to_pylist(), rows["neighbors"].to_pylist(), strict=True))
        return known

    def _batches(self, run_id: str) -> Iterator[pa.RecordBatch]:
        """Batch by batch, as a night's lists need not fit memory, and of each neighbor only what is looked at: reasons are most of it."""
        for fragment in self._dataset().get_fragments(_merged(run_id)):
            with fragment.open() as source:
                file = pq.ParquetFile(source)
                paths = (file.schema.column(place).path for place in range(len(file.schema)))
                yield from file.iter_batches(columns=[path for path in paths if path.endswith(_LOOKED_AT)], batch_size=4_096)

    def _dataset(self) -> ds.Dataset:
        return open_table(self.root, ITEM_NEIGHBORS_HISTORY).to_pyarrow_dataset()


def _merged(run_id: str) -> ds.Expression:
    return (ds.field("run_id") == run_id) & (ds.field("head") == "merged")


def _sample(ranks: range) -> list[int]:
    return _spread(ranks, NUM_LOOKED_AT // len(_SLICES))


def _spread(values: Sequence[Value], most: int) -> list[Value]:
    """At most so many of the values, evenly."""
    return [values[place] for place in np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).astype(int)).tolist()]


def _first(neighbors: Sequence[Mapping[str, Any]]) -> list[str]:
    return [neighbor["neighbor_id"] for neighbor in neighbors[:_DEPTH]]


def _jaccard(left: Sequence[str], right: Sequence[str]) -> float:
    whole = {*left, *right}
    return len({*left} & {*right}) / len(whole) if whole else 1.0


def _slice(name: str, num_triggers: int, lists: Sequence[list[dict[str, Any]]], hottest: set[str]) -> Slice:
    if not lists:
        return Slice(name=name, num_triggers=num_triggers, num_looked_at=0)
    first = [neighbor for neighbors in lists for neighbor in neighbors[:_DEPTH]]
    return Slice(
        name=name,
        num_triggers=num_triggers,
        num_looked_at=len(lists),
        counted=float(np.mean([neighbor["num_user_days"] > 0 for neighbor in first])),
        relevance=float(np.mean([neighbor["relevance"] for neighbor in first])),
        to_the_hottest=float(np.mean([neighbor["neighbor_id"] in hottest for neighbor in first])),
        filled=float(np.mean([neighbor["filled"] for neighbors in lists for neighbor in neighbors])),
    )
