"""The merged list of one item under other values of its policy, by the very code and the very index that made the night's lists."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conf.errors import TableError
from conf.tables import MERGE_POLICY
from jobs.explorer.night import Neighbor, PublishedNight
from jobs.reader import open_table

if TYPE_CHECKING:
    from models import neighbors as made
    from models.data import Ints

_PAIRS = ("target_item_id", "weight", "landmark_date", "num_user_days")


@dataclass(frozen=True, kw_only=True)
class Mixes:
    """Merged lists by value of the policy, ascending: of a blend lambda, of a quota the share of relevance; `own` is the policy's value."""

    kind: str
    own: float
    lists: Mapping[float, list[Neighbor]]


@dataclass(frozen=True, kw_only=True)
class Remixer:
    """Opens the night's index at the first question: importing FAISS must not delay the page."""

    night: PublishedNight
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def mixes(self, item_id: str) -> Mixes:
        """Merged lists under the policy's own value and the values that backtests are swept over.

        Raises:
            TableError: the night's index is gone or of other code, or it does not know the item.
        """
        from models.merge import read_policies

        with self._lock:  # the first two questions may come at once
            retriever = self._retriever
        trigger = _positions(retriever, [item_id])
        if trigger[0] < 0:
            raise TableError(f"item {item_id!r} is not in the index of night {self.night.run_id}")
        policies = read_policies(open_table(self.night.root, MERGE_POLICY).to_pyarrow_table().to_pylist())
        chosen = retriever.policies_for(policies, trigger).of(0)
        kind, own = chosen.kind, chosen.value
        swept = self.night.settings.backtest.blend_values if kind == "blend" else self.night.settings.backtest.content_shares
        values = sorted({own, *swept})
        lists = retriever.merge_under(
            trigger,
            self._counted(retriever, item_id),
            [replace(chosen, value=value) for value in values],
            settings=self.night.settings.retrieval,
        )
        return Mixes(kind=kind, own=own, lists=self._described(retriever, trigger, dict(zip(values, lists, strict=True))))

    def content(self, item_id: str, *, k: int) -> list[Neighbor]:
        """The items nearest in content, by the night's index.

        Raises:
            TableError: the night's index is gone, or it does not know the item.
        """
        with self._lock:
            retriever = self._retriever
        trigger = _positions(retriever, [item_id])
        if trigger[0] < 0:
            raise TableError(f"item {item_id!r} is not in the index of night {self.night.run_id}")
        query = retriever.content[trigger]
        near = retriever.content_flat.search(query, k + 1)[0]
        near = near[(near >= 0) & (near != trigger[0])][:k]
        ids = retriever.item_ids.take(pa.array(near)).to_pylist()
        items, cosines = self.night.catalog.known(ids), (retriever.content[near] @ query[0]).tolist()
        return [Neighbor(rank=rank, item=items[other], score=cosines[rank - 1]) for rank, other in enumerate(ids, start=1)]

    @cached_property
    def _retriever(self) -> "made.Retriever":
        from models.neighbors import Retriever

        folder = self.night.artifacts / "index"
        if not folder.is_dir():
            raise TableError(
                f"the index of night {self.night.run_id} is gone from {folder}: lists cannot be mixed anew; run the night again"
            )
        return Retriever.open(folder)

    def _counted(self, retriever: "made.Retriever", item_id: str) -> "made.Counted":
        """The trigger's counted pairs with their weight decayed to the night, ascending by target as in the night."""
        from models.neighbors import Counted

        pairs = self.night.pairs_of(item_id, _PAIRS)
        target = _positions(retriever, pairs["target_item_id"].to_pylist())
        order = np.argsort(target)
        age = np.array([(self.night.run_date - day).days for day in pairs["landmark_date"].to_pylist()], np.float64)
        weight = pairs["weight"].to_numpy() * 2.0 ** (-age / self.night.settings.pairs.half_life_days)
        return Counted(
            indptr=np.array([0, len(target)], np.int64),
            target=target[order],
            weight=weight.astype(np.float32)[order],
            num_user_days=pairs["num_user_days"].to_numpy().astype(np.int64)[order],
        )

    def _described(
        self, retriever: "made.Retriever", trigger: "Ints", lists: Mapping[float, "made.Neighbors"]
    ) -> dict[float, list[Neighbor]]:
        """Lists by value, as the rows that a night would publish: with the same reasons."""
        from models.neighbors import NeighborLists

        heads = {str(value): found for value, found in lists.items()}
        rows = retriever.to_arrow(NeighborLists(trigger=trigger, source_names=retriever.source_names, heads=heads))
        return {value: self.night.described(neighbors) for value, neighbors in zip(lists, rows["neighbors"].to_pylist(), strict=True)}


def _positions(retriever: "made.Retriever", item_ids: Sequence[str]) -> "Ints":
    """Item indices, -1 for unknown ones."""
    found = pc.index_in(pa.array(item_ids, pa.string()), retriever.item_ids)
    return np.asarray(pc.fill_null(found, -1).to_numpy(zero_copy_only=False), np.int32)
