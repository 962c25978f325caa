"""What happened after a night, as arrays that lists are judged on: shared by the nightly evaluation and the backtest.

A test pair is a co-engagement whose target falls on a day after the night. Items that the night did not know get indices behind those it
knew, so that they stay in the denominator of every recall.

Shapes: `T` triggers, `N` items that the night knew, `M` >= `N` with those that it did not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from scipy import sparse

from conf.settings import Settings
from features import pairs
from jobs.lake import in_memory

Indices = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Future:
    """(M,) item ids, known ones first by their index; (T,) ascending triggers; (T, M) user-days of co-engagement."""

    item_ids: list[str]
    num_known: int
    triggers: Indices
    partners: sparse.csr_array

    def positions(self, item_ids: pa.ChunkedArray | pa.Array) -> npt.NDArray[np.int64]:
        """Index of each id, -1 for one that is not here."""
        found = pc.index_in(item_ids.cast(pa.string()), value_set=pa.array(self.item_ids, pa.string()))
        return np.asarray(pc.fill_null(found, -1).to_numpy(zero_copy_only=False), np.int64)


def future_pairs(engagements: DataFrame, *, settings: Settings, first_day: date, last_day: date) -> pa.Table:
    """trigger_item_id, target_item_id, num_user_days of the days first_day to last_day, of at most `max_triggers` triggers.

    Triggers are sampled by hash. Users with many items take part with `max_items_per_session` of them a session (or day), drawn by hash.
    """
    range_of_days = [first_day + timedelta(days=n) for n in range((last_day - first_day).days + 1)]
    known = pairs.engagements_per_day(engagements)
    counting = pairs.Counting(
        window=settings.evaluation.window or settings.pairs.window,
        max_items_per_user_day=settings.evaluation.max_items_per_session,
        min_users=1,
        hash_key=b"evaluate",  # nothing of it is stored: a fixed key gives the same sample every time
    )
    daily = pairs.count_daily_pairs(counting, days={day: known.get(day, 0) for day in range_of_days})
    counted = engagements.where(F.col("event_date") <= F.lit(last_day)).transform(daily)
    counted = pairs.future_pairs(counted, symmetric=counting.window.symmetric)
    with in_memory(counted) as future:
        triggers = future.select("trigger_item_id").distinct().orderBy(F.xxhash64("trigger_item_id"), "trigger_item_id")
        sampled = triggers.limit(settings.evaluation.max_triggers)
        return future.join(sampled, "trigger_item_id", how="inner").toArrow()


def index_future(table: pa.Table, known: Sequence[str]) -> Future:
    """Ids to indices.

    Args:
        table: of `future_pairs`.
        known: (N,) ids of the night's items by item_index.
    """
    triggers, targets = table["trigger_item_id"].to_pylist(), table["target_item_id"].to_pylist()
    index = {item_id: position for position, item_id in enumerate(known)}
    for item_id in sorted({*triggers, *targets} - index.keys()):
        index[item_id] = len(index)
    rows = np.array(sorted({index[item_id] for item_id in triggers}), np.int32)
    row_of = {item: row for row, item in enumerate(rows.tolist())}
    cells = ([row_of[index[item_id]] for item_id in triggers], [index[item_id] for item_id in targets])
    weight = table["num_user_days"].to_numpy().astype(np.float64)
    partners = sparse.csr_array((weight, cells), shape=(len(rows), len(index)))
    return Future(item_ids=list(index), num_known=len(known), triggers=rows, partners=partners)
