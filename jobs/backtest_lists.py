"""Baseline lists that a backtest keeps, so that the explorer can set them beside published ones. No Spark.

Trained baselines (smoothed counts, their factorization, EASE, ALS, item2vec) cannot be made while a page is waited for. A backtest has made
them for its judged triggers, as of its cut; the first KEPT of each list stay in one file among the night's artifacts, sorted by trigger.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from conf.settings import LakeSettings
from conf.tables import RUNS
from jobs.backtest_results import FINAL, VALIDATION
from jobs.reader import artifacts_of, lake_root, rows_where, table_exists

FILE = "baselines.parquet"
KEPT = 50
_ROWS_PER_GROUP = 1_000


def backtest_lake(settings: LakeSettings) -> LakeSettings:
    """The lake variant of the backtests of a lake."""
    return settings.model_copy(update={"variant": "-".join(filter(None, (settings.variant, "backtest")))})


def keep_lists(folder: Path, item_ids: Sequence[str], triggers: npt.NDArray[np.int32], lists: Mapping[str, npt.NDArray[np.int32]]) -> None:
    """Write the first places of (T, K) item indices by method, -1 behind the end, of (T,) triggers."""
    names = pa.array(item_ids, pa.string())
    of = names.take(pa.array(triggers))
    parts = []
    for method, found in lists.items():
        first = found[:, :KEPT]
        offsets = np.concatenate([[0], np.cumsum((first >= 0).sum(axis=1))]).astype(np.int32)
        neighbors = pa.ListArray.from_arrays(pa.array(offsets), names.take(pa.array(first[first >= 0])))
        parts.append(pa.table({"item_id": of, "method": pa.array([method] * len(of)), "neighbor_ids": neighbors}))
    partial = folder / f"{FILE}.partial"
    pq.write_table(pa.concat_tables(parts).sort_by([("item_id", "ascending")]), partial, row_group_size=_ROWS_PER_GROUP)
    partial.replace(folder / FILE)


@dataclass(frozen=True, kw_only=True)
class KeptLists:
    """What the latest backtest of a lake has kept: methods by name, as of its cut."""

    path: Path
    cut: date
    methods: tuple[str, ...]

    @classmethod
    def latest(cls, settings: LakeSettings) -> Self | None:
        """Of the lake's latest backtest; None if there was none, or its files are gone."""
        lake = backtest_lake(settings)
        root = lake_root(lake)
        if not table_exists(root, RUNS):
            return None
        rows = rows_where(root, RUNS, "stage", [VALIDATION, FINAL], ["run_id", "run_date", "status", "ended_at"])
        for row in rows.sort_by([("ended_at", "descending")]).to_pylist():
            path = artifacts_of(lake, row["run_id"]) / "backtest" / FILE
            if row["status"] == "succeeded" and path.is_file():
                methods = pq.read_table(path, columns=["method"])["method"].unique().to_pylist()
                return cls(path=path, cut=row["run_date"], methods=tuple(methods))
        return None

    def ids_of(self, item_id: str, method: str) -> list[str]:
        """Neighbors of a trigger, best first; none if the backtest did not judge it."""
        wanted = (ds.field("item_id") == item_id) & (ds.field("method") == method)
        found = pq.read_table(self.path, columns=["neighbor_ids"], filters=wanted)["neighbor_ids"].to_pylist()
        return list(found[0]) if found else []
