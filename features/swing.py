"""Swing, user-level evidence that two items go together: Yang et al., "Large Scale Product Graph Construction for Recommendation in
E-commerce" (arXiv 2010.05525).

Two users who share little besides i and j say more about the pair than two who share a thousand items:

    swing(i, j) = sum over unordered pairs {u, v} of users of both items of  1/sqrt|I_u| * 1/sqrt|I_v| * 1/(alpha + |I_u ∩ I_v|)

I_u are the distinct items that user u ever engaged with up to the run date: no days, no windows, no decay. Of a trigger with many users
only those with the smallest keyed hashes count, as the work grows with their square; that choice depends on no order of rows.

Shapes: U users, N items, E distinct user-item pairs; of one trigger C users, T targets and e items of its users, repeats included.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import sparse
from threadpoolctl import threadpool_limits

from features.pair_kernels import OUTPUT_ROWS, TOTAL_SCHEMA, Floats, Ints, encode, equal_runs, keyed_hash, ranges, unpack

ALPHA = 1.0
"""Smoothing of the overlap: small against the two items that any two users of i and j share."""

SCORED_SCHEMA = f"{TOTAL_SCHEMA}, swing double"
_DENSE_USERS = 5_000  # up to here the overlap of all pairs of users, 100 MB, is counted once; above, per trigger


@dataclass(frozen=True, kw_only=True)
class UserItems:
    """Who ever engaged what. Users are numbered by ascending keyed hash, items by id.

    User u engaged items[start[u] : start[u + 1]]; the users that count for item i are kept[kept_start[i] : kept_start[i + 1]].
    """

    item_ids: pa.Array  # (N,)
    start: Ints  # (U + 1,)
    items: NDArray[np.int32]  # (E,)
    kept_start: Ints  # (N + 1,)
    kept: NDArray[np.int32]
    overlap: NDArray[np.int32] | None  # (U, U) numbers of shared items; None where there are too many users


def index_user_items(engaged: pa.Table, *, hash_key: bytes, max_users: int) -> UserItems:
    """Sort distinct (user_id, item_id) into what `add_swing` reads.

    Args:
        engaged: the distinct pairs, in any order.
        hash_key: secret key of the user hashes.
        max_users: users that count per item.
    """
    user, users = encode(engaged["user_id"])
    item, item_ids = encode(engaged["item_id"])
    hashes = np.array([keyed_hash(name, key=hash_key) for name in users.to_pylist()], dtype=np.int64)
    rank = np.empty(len(hashes), dtype=np.int64)
    rank[np.argsort(hashes, kind="stable")] = np.arange(len(hashes))
    ones = np.ones(len(user), dtype=np.int32)
    by_user = sparse.csr_matrix((ones, (rank[user], item)), shape=(len(users), len(item_ids)))
    by_item = sparse.csr_matrix((ones, (item, rank[user])), shape=(len(item_ids), len(users)))
    by_user.sort_indices()
    by_item.sort_indices()
    num_kept = np.minimum(np.diff(by_item.indptr), max_users).astype(np.int64)
    return UserItems(
        item_ids=item_ids,
        start=by_user.indptr.astype(np.int64),
        items=by_user.indices.astype(np.int32),
        kept_start=np.concatenate([[0], np.cumsum(num_kept)]).astype(np.int64),
        kept=by_item.indices[ranges(by_item.indptr[:-1].astype(np.int64), num_kept)].astype(np.int32),
        overlap=_overlaps(by_user) if len(users) <= _DENSE_USERS else None,
    )


def _overlaps(rows: Any) -> NDArray[np.int32]:
    """Number of shared columns of each two of R sparse rows of ones: (R, R)."""
    counts: NDArray[np.int32] = (rows @ rows.T).toarray()
    return counts


def add_swing(batches: Iterable[pa.RecordBatch], *, shared: Any) -> Iterator[pa.RecordBatch]:
    """Packed pairs to rows of SCORED_SCHEMA.

    Args:
        batches: blocks of `total_pairs`.
        shared: broadcast UserItems.
    """
    for batch in batches:
        for block in batch["block"]:
            pairs = unpack(block)
            with threadpool_limits(1):  # one per Spark task; the matrices of a trigger are too small for more
                scores = swing_scores(shared.value, pairs["trigger_item_id"], pairs["target_item_id"])
            yield from pairs.append_column("swing", pa.array(scores)).to_batches(max_chunksize=OUTPUT_ROWS)


def swing_scores(user_items: UserItems, triggers: pa.ChunkedArray, targets: pa.ChunkedArray) -> Floats:
    """Swing (P,) of P pairs of item ids, of which those of a trigger follow each other; 0 where no two users share a pair."""
    trigger, target = (_positions(ids, user_items.item_ids) for ids in (triggers, targets))
    known = np.flatnonzero((trigger >= 0) & (target >= 0))
    kernel = _Kernel(user_items)
    scores = np.zeros(len(trigger))
    for start, length in equal_runs(trigger[known]):
        rows = known[start : start + length]
        scores[rows] = kernel.scores(int(trigger[rows[0]]), target[rows])
    return scores


def _positions(ids: pa.ChunkedArray, known: pa.Array) -> Ints:
    """Index of each id among the known ones, -1 where it is not."""
    found: Ints = pc.fill_null(pc.index_in(ids, value_set=known), -1).to_numpy().astype(np.int64)
    return found


class _Kernel:
    """Scores one trigger after the other; holds a scratch array, as a new one per trigger would cost its N items."""

    def __init__(self, user_items: UserItems) -> None:
        self._of = user_items
        self._root = 1.0 / np.sqrt(np.maximum(np.diff(user_items.start), 1))  # (U,)
        self._place = np.full(len(user_items.item_ids), -1, dtype=np.int64)  # (N,), -1 between two uses

    def scores(self, trigger: int, targets: Ints) -> Floats:
        """Swing (T,) of distinct targets of one trigger."""
        of = self._of
        users = of.kept[of.kept_start[trigger] : of.kept_start[trigger + 1]]  # (C,)
        lengths = of.start[users + 1] - of.start[users]
        items = of.items[ranges(of.start[users], lengths)]  # (e,)
        engaged = self._engaged(items, lengths, targets)
        weight = self._root[users, None] * self._root[users] / (ALPHA + self._overlap(users, items, lengths))  # (C, C)
        np.fill_diagonal(weight, 0.0)  # a user is no pair
        scores: Floats = 0.5 * np.einsum("ct,ct->t", engaged, weight @ engaged)  # every pair came in both orders
        return scores

    def _engaged(self, items: NDArray[np.int32], lengths: Ints, targets: Ints) -> Floats:
        """1 where a user engaged a target, else 0: (C, T)."""
        self._place[targets] = np.arange(len(targets))
        column = self._place[items]
        self._place[targets] = -1
        found = np.flatnonzero(column >= 0)
        row = np.repeat(np.arange(len(lengths)), lengths)
        engaged = np.zeros((len(lengths), len(targets)))
        engaged[row[found], column[found]] = 1.0
        return engaged

    def _overlap(self, users: NDArray[np.int32], items: NDArray[np.int32], lengths: Ints) -> NDArray[np.int32]:
        """Number of shared items of each two users: (C, C)."""
        if self._of.overlap is not None:
            return self._of.overlap[users[:, None], users]
        self._place[items] = np.arange(len(items))  # whichever place of an item wins becomes its column: e columns instead of N
        column = self._place[items]
        self._place[items] = -1
        pointers = np.concatenate([[0], np.cumsum(lengths)])
        rows = sparse.csr_matrix((np.ones(len(items), dtype=np.int32), column, pointers), shape=(len(users), len(items)))
        return _overlaps(rows)
