"""What training reads: pinned Delta tables turned into arrays over the dense item index. No Spark here.

Time: `full` is what was known up to and including the run date; `fit` is what was known before `holdout_from`, the first day of the
last slice of engagements; `holdout` counts the co-engagements of that last slice. Scores are calibrated on `fit` against `holdout`,
then rebuilt on `full`. Weights are decayed user-days as of the last day each side knows (half-life in days).

Shapes: `N` items (row = `item_index`, ascending by item_id), `U` users, `C` content dimensions, `E` relevance examples.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from scipy.sparse import coo_array, csr_array

from conf.errors import TableError
from conf.tables import CO_ENGAGEMENT_PAIRS
from models.draws import Keys, item_keys

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]
Sparse = csr_array[np.float32, tuple[int, int]]

TREND_HALF_LIVES = (7.0, 30.0, 120.0, 480.0)
"""Days; popularity at several of them side by side says whether an item is coming or going."""

TRENDS = (*(f"log_popularity_{days:g}d" for days in TREND_HALF_LIVES), "log_age")
"""Columns of `History.trends`."""
LOG_AGE = TRENDS.index("log_age")

_TREND_FLOOR = 0.05  # user-days that even an item of long ago counts for, so that no logarithm falls without end


@dataclass(frozen=True, kw_only=True)
class TableRef:
    """A Delta table at one version."""

    uri: str
    version: int


@dataclass(frozen=True, kw_only=True)
class History:
    """Engagement known up to some day.

    Attributes:
        pairs: (N, N) decayed co-engagement weight, row = trigger, no diagonal.
        user_items: (U, N) 1 where the user ever engaged the item.
        popularity: (N,) decayed user-days.
        trends: (N, S) of `item_trends`.
        keys: (N,) of models.draws, by which what is drawn for an item stays its own.
    """

    pairs: Sparse
    user_items: Sparse
    popularity: Floats
    trends: Floats
    keys: Keys

    @property
    def num_items(self) -> int:
        """`N`."""
        return int(self.popularity.shape[0])

    @property
    def num_users(self) -> Floats:
        """(N,) distinct users of each item."""
        return np.asarray(self.user_items.sum(axis=0), dtype=np.float32).ravel()


@dataclass(frozen=True, kw_only=True)
class Examples:
    """(E,) trigger index, other index and graded relevance in [0,1]."""

    trigger: Ints
    other: Ints
    target: Floats


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Everything a training run reads.

    Attributes:
        item_ids: (N,) ids by item index.
        content: (N, C) unit rows, zero rows for items without content.
        full: history up to the run date.
        fit: history before the holdout.
        holdout: (N, N) user-days of co-engagement in the last slice.
        eligible: (N,) may be offered as a neighbor.
        examples: graded relevance.
        signals: by name of pairs.signals, (N, N) decayed co-engagement weight of its actions within its window.
        exposures: (N, N) decayed user-days on which the column was shown beside the row and ignored; None: nobody knows.
    """

    item_ids: npt.NDArray[np.object_]
    content: Floats
    full: History
    fit: History
    holdout: Sparse
    eligible: Bools
    examples: Examples
    signals: Mapping[str, Sparse] = field(default_factory=dict)
    exposures: Sparse | None = None

    @property
    def num_items(self) -> int:
        """`N`."""
        return int(self.item_ids.shape[0])

    def history_of(self, signal: str) -> History:
        """The counted pairs of a signal. Nobody stands behind more than one item, so that no user-level co-engagement is added."""
        pairs = self.signals[signal]
        paired = np.unique(np.concatenate([pairs.indices, np.flatnonzero(np.diff(pairs.indptr))])).astype(np.int32)
        one_each = sparse_rows(np.arange(len(paired)), paired, np.ones(len(paired)), (len(paired), self.num_items))
        return dataclasses.replace(self.full, pairs=pairs, user_items=one_each)

    @property
    def vocabulary(self) -> str:
        """Fingerprint of the item ids in index order."""
        return vocabulary_fingerprint(self.item_ids)


def vocabulary_fingerprint(item_ids: npt.NDArray[np.object_]) -> str:
    """SHA-256 over the ordered ids, each ended by a byte that no UTF-8 text holds."""
    digest = hashlib.sha256()
    for item_id in item_ids.tolist():
        digest.update(item_id.encode() + b"\xff")
    return digest.hexdigest()


def read_table(ref: TableRef, columns: Sequence[str], filter: pc.Expression | None = None) -> pa.Table:
    """Columns of a table at its pinned version; `filter` skips files and row groups by their statistics.

    Raises:
        TableError: no such table, version or column.
    """
    try:
        dataset = DeltaTable(ref.uri, version=ref.version).to_pyarrow_dataset()
    except (DeltaError, OSError) as error:
        raise TableError(
            f"no Delta table at version {ref.version} in {ref.uri}; run the stage that writes it, or correct lake.root"
        ) from error
    if missing := [name for name in columns if name not in dataset.schema.names]:
        raise TableError(f"missing columns {missing} in {ref.uri} at version {ref.version}; have {dataset.schema.names}")
    return dataset.to_table(columns=list(columns), filter=filter)


def sparse_rows(row: npt.ArrayLike, column: npt.ArrayLike, value: npt.ArrayLike, shape: tuple[int, int]) -> Sparse:
    """A CSR matrix with sorted rows; values of repeated cells are added up."""
    cells = (np.asarray(value, dtype=np.float32), (np.asarray(row, dtype=np.int32), np.asarray(column, dtype=np.int32)))
    matrix = coo_array(cells, shape=shape, dtype=np.float32).tocsr()
    matrix.sort_indices()
    return matrix


class _Index:
    """Turns ids into item indices; ids outside the vocabulary become -1."""

    def __init__(self, item_ids: pa.Array) -> None:
        self._ids = item_ids

    def __len__(self) -> int:
        return len(self._ids)

    def __call__(self, column: pa.ChunkedArray) -> Ints:
        found = pc.index_in(column.cast(self._ids.type), value_set=self._ids)
        return np.asarray(pc.fill_null(found, -1).to_numpy(), dtype=np.int32)


def load_training_data(
    refs: Mapping[str, TableRef], *, run_date: date, half_life_days: float, symmetric: bool, signals: Mapping[str, float] | None = None
) -> TrainingData:
    """Read the tables of one night.

    Args:
        refs: pinned versions of engagements, co_engagement_daily, co_engagement_pairs, item_popularity, item_features,
            relevance_examples, and optionally exposure_pairs.
        run_date: last day that counts.
        half_life_days: half-life of the landmark weights.
        symmetric: the window of the pairs is, so that co_engagement_daily has each pair once.
        signals: half-life by name of the signals to read; `refs` then has co_engagement_pairs of each, too.

    Raises:
        TableError: a table or column is missing, or item_features is not dense.
    """
    features = read_table(refs["item_features"], ["item_id", "item_index", "content_vector", "eligible"]).sort_by("item_index")
    if features["item_index"].to_pylist()[-1:] not in ([], [features.num_rows - 1]):
        raise TableError(
            f"item_features holds {features.num_rows} rows with item_index up to {features['item_index'][-1]}; wanted 0..rows-1"
        )
    ids = features["item_id"].combine_chunks()
    index = _Index(ids)
    pairs, landmark, holdout_from = _read_pairs(refs, index)
    fit_date = holdout_from - timedelta(days=1)
    full_pairs, fit_pairs = (_pair_matrix(pairs, name, _factor(landmark, day, half_life_days), len(ids)) for name, day in
                             (("weight", run_date), ("fit_weight", fit_date)))  # fmt: skip
    popularity = _read_popularity(refs["item_popularity"], index, len(ids))
    engaged = _Engaged.read(refs["engagements"], index, run_date)
    earlier, keys = engaged.before(holdout_from), item_keys(ids.to_pylist())
    return TrainingData(
        item_ids=np.asarray(ids.to_pylist(), dtype=np.object_),  # as text of one width all take as much memory as the longest
        content=_content(features),
        full=History(
            pairs=full_pairs,
            user_items=engaged.user_items(len(ids)),
            popularity=popularity[0] * _factor(landmark, run_date, half_life_days),
            trends=engaged.trends(len(ids), run_date),
            keys=keys,
        ),
        fit=History(
            pairs=fit_pairs,
            user_items=earlier.user_items(len(ids)),
            popularity=popularity[1] * _factor(landmark, fit_date, half_life_days),
            trends=earlier.trends(len(ids), fit_date),
            keys=keys,
        ),
        holdout=_read_holdout(refs["co_engagement_daily"], index, len(ids), (holdout_from, run_date), symmetric=symmetric),
        eligible=features["eligible"].to_numpy(),
        examples=_read_examples(refs["relevance_examples"], index),
        signals={
            name: _read_signal(refs[CO_ENGAGEMENT_PAIRS.of_signal(name).name], index, run_date, days)
            for name, days in (signals or {}).items()
        },
        exposures=_read_exposures(refs["exposure_pairs"], index) if "exposure_pairs" in refs else None,
    )


def _factor(landmark: date, day: date, half_life_days: float) -> np.float32:
    """Landmark weights times this are decayed weights as of `day`."""
    return np.float32(2.0 ** ((landmark - day).days / half_life_days))


def _content(features: pa.Table) -> Floats:
    """(N, C); a row is already unit length or zero."""
    column = features["content_vector"].combine_chunks()
    values = np.asarray(column.flatten().to_numpy(zero_copy_only=False), dtype=np.float32)
    if features.num_rows == 0 or values.size % features.num_rows:
        raise TableError(
            f"content_vector holds {values.size} numbers in {features.num_rows} rows; wanted one length for all rows and a row"
        )
    return values.reshape(features.num_rows, -1)


def _read_pairs(refs: Mapping[str, TableRef], index: _Index) -> tuple[pa.Table, date, date]:
    """Pairs with their item indices, the landmark day and the first day of the holdout."""
    columns = ["trigger_item_id", "target_item_id", "weight", "fit_weight"]
    table = read_table(refs["co_engagement_pairs"], columns)
    days = read_table(refs["item_popularity"], ["landmark_date", "holdout_from"]).slice(0, 1).to_pylist()
    if not days:
        raise TableError(f"item_popularity at {refs['item_popularity'].uri} is empty; ingest engagements up to the run date first")
    trigger, target = index(table["trigger_item_id"]), index(table["target_item_id"])
    known = (trigger >= 0) & (target >= 0)
    out = pa.table({"trigger": trigger[known], "target": target[known], **{name: table[name].to_numpy()[known] for name in columns[2:]}})
    return out, days[0]["landmark_date"], days[0]["holdout_from"]


def _read_exposures(ref: TableRef, index: _Index) -> Sparse | None:
    """(N, N) ignored exposures; None where none were counted."""
    table = read_table(ref, ["trigger_item_id", "target_item_id", "weight"])
    trigger, target = index(table["trigger_item_id"]), index(table["target_item_id"])
    known = (trigger >= 0) & (target >= 0)
    if not known.any():
        return None
    return sparse_rows(trigger[known], target[known], table["weight"].to_numpy()[known], (len(index), len(index)))


def _read_signal(ref: TableRef, index: _Index, run_date: date, half_life_days: float) -> Sparse:
    """(N, N) weights as of the run date."""
    table = read_table(ref, ["trigger_item_id", "target_item_id", "weight", "landmark_date"])
    trigger, target = index(table["trigger_item_id"]), index(table["target_item_id"])
    known = (trigger >= 0) & (target >= 0)
    landmark = table["landmark_date"][0].as_py() if table.num_rows else run_date
    pairs = pa.table({"trigger": trigger[known], "target": target[known], "weight": table["weight"].to_numpy()[known]})
    return _pair_matrix(pairs, "weight", _factor(landmark, run_date, half_life_days), len(index))


def _pair_matrix(pairs: pa.Table, name: str, factor: np.float32, num_items: int) -> Sparse:
    weight = pairs[name].to_numpy()
    some = weight > 0
    trigger, target = (pairs[side].to_numpy()[some] for side in ("trigger", "target"))
    return sparse_rows(trigger, target, weight[some] * factor, (num_items, num_items))


def _read_popularity(ref: TableRef, index: _Index, num_items: int) -> Floats:
    """(2, N) landmark weights: all, and before the holdout."""
    table = read_table(ref, ["item_id", "weight", "fit_weight"])
    item = index(table["item_id"])
    out = np.zeros((2, num_items + 1), dtype=np.float32)  # the last column takes unknown items
    out[0, item], out[1, item] = table["weight"].to_numpy(), table["fit_weight"].to_numpy()
    return out[:, :num_items]


def item_trends(item: Ints, age_days: npt.NDArray[np.float64], num_items: int) -> Floats:
    """(N, S) what an item's user-days say of its popularity now: TRENDS.

    Args:
        item: (D,) item index of each user-day.
        age_days: (D,) days since then.
        num_items: N.

    Returns:
        Per half-life the log share of all decayed user-days, then log(1 + days since the first one), 0 where there is none.
    """
    columns = []
    for half_life in TREND_HALF_LIVES:
        weight = np.bincount(item, weights=np.exp2(-age_days / half_life), minlength=num_items) + _TREND_FLOOR
        columns.append(np.log(weight / weight.sum()))
    age = np.zeros(num_items)
    np.maximum.at(age, item, age_days)
    return np.stack([*columns, np.log1p(age)], axis=1).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class _Engaged:
    """User-days: (D,) user row (ascending by id, whatever the file order), item index and day since 1970-01-01; `num_users` in all."""

    user: Ints
    item: Ints
    day: npt.NDArray[np.int64]
    num_users: int

    @classmethod
    def read(cls, ref: TableRef, index: _Index, run_date: date) -> Self:
        """Up to the run date, known items only."""
        table = read_table(ref, ["user_id", "item_id", "event_date"], pc.field("event_date") <= run_date)
        item = index(table["item_id"])
        coded = table["user_id"].dictionary_encode().combine_chunks()
        coded = coded.chunk(0) if isinstance(coded, pa.ChunkedArray) and coded.num_chunks else coded
        rank = np.empty(len(coded.dictionary), dtype=np.int32)
        rank[pc.sort_indices(coded.dictionary).to_numpy()] = np.arange(len(rank), dtype=np.int32)
        day = table["event_date"].cast(pa.date32()).cast(pa.int32()).to_numpy().astype(np.int64)
        user, item, day = (column[item >= 0] for column in (rank[coded.indices.to_numpy()], item, day))
        order = np.lexsort((day, item, user))
        user, item, day = user[order], item[order], day[order]
        first = (np.diff(user, prepend=-1) != 0) | (np.diff(item, prepend=-1) != 0) | (np.diff(day, prepend=day[:1] - 1) != 0)
        return cls(user=user[first], item=item[first], day=day[first], num_users=len(rank))

    def before(self, first: date) -> Self:
        """Those before a day."""
        keep = self.day < _day_number(first)
        return type(self)(user=self.user[keep], item=self.item[keep], day=self.day[keep], num_users=self.num_users)

    def user_items(self, num_items: int) -> Sparse:
        """(U, N) ones."""
        matrix = sparse_rows(self.user, self.item, np.ones(len(self.item)), (self.num_users, num_items))
        matrix.data[:] = 1.0
        return matrix

    def trends(self, num_items: int, as_of: date) -> Floats:
        """(N, S) as of the end of a day."""
        return item_trends(self.item, (_day_number(as_of) - self.day).astype(np.float64), num_items)


def _day_number(day: date) -> int:
    return day.toordinal() - date(1970, 1, 1).toordinal()


def _read_holdout(ref: TableRef, index: _Index, num_items: int, days: tuple[date, date], *, symmetric: bool) -> Sparse:
    """(N, N) user-days from the first to the last day; all pairs count, as this matrix never leaves training."""
    last_slice = (pc.field("event_date") >= days[0]) & (pc.field("event_date") < days[1] + timedelta(days=1))
    table = read_table(ref, ["trigger_item_id", "target_item_id", "num_users"], last_slice)
    trigger, target = index(table["trigger_item_id"]), index(table["target_item_id"])
    known = (trigger >= 0) & (target >= 0)
    trigger, target, users = trigger[known], target[known], table["num_users"].to_numpy()[known]
    if symmetric:
        trigger, target, users = np.concatenate([trigger, target]), np.concatenate([target, trigger]), np.tile(users, 2)
    return sparse_rows(trigger, target, users, (num_items, num_items))


def _read_examples(ref: TableRef, index: _Index) -> Examples:
    table = read_table(ref, ["item_id", "other_item_id", "target"])
    trigger, other = index(table["item_id"]), index(table["other_item_id"])
    known = (trigger >= 0) & (other >= 0)
    return Examples(trigger=trigger[known], other=other[known], target=table["target"].to_numpy()[known].astype(np.float32))
