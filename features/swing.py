"""Swing, user-level evidence that two items go together: Yang et al., "Large Scale Product Graph Construction for Recommendation in
E-commerce" (arXiv 2010.05525).

Two users who share little besides i and j say more about the pair than two who share a thousand items:

    swing(i, j) = sum over unordered pairs {u, v} of users of both items of  1/sqrt|I_u| * 1/sqrt|I_v| * 1/(alpha + |I_u ∩ I_v|)

I_u are the distinct items that user u ever engaged with up to the run date: no days, no windows, no decay. Of a trigger with many users
only those with the smallest keyed hashes count, as the work grows with their square; that choice depends on no order of rows.

Shapes: U users, N items, E distinct user-item pairs; of a batch of triggers p pairs and R users, each counted once per trigger.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import sparse

from features.pair_kernels import Floats, Ints, encode, equal_runs, keyed_hashes, positions, ranges

ALPHA = 1.0
"""Smoothing of the overlap: small against the two items that any two users of i and j share."""

_BATCH_ITEMS = 100_000  # items of users in one sparse product, which then stays in cache; one trigger may have more
_BATCH_COLUMNS = 500_000  # likewise


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


def index_user_items(engaged: pa.Table, *, hash_key: bytes, max_users: int) -> UserItems:
    """Sort distinct (user_id, item_id) into what `swing_scores` reads.

    Args:
        engaged: the distinct pairs, in any order.
        hash_key: secret key of the user hashes.
        max_users: users that count per item.
    """
    user, users = encode(engaged["user_id"])
    item, item_ids = encode(engaged["item_id"])
    hashes = keyed_hashes(users.to_pylist(), key=hash_key)
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
    )


def swing_scores(user_items: UserItems, triggers: pa.ChunkedArray, targets: pa.ChunkedArray) -> Floats:
    """Swing (P,) of P pairs of item ids, of which those of a trigger follow each other; 0 where no two users share a pair."""
    trigger, target = (positions(ids, user_items.item_ids) for ids in (triggers, targets))
    known = np.flatnonzero((trigger >= 0) & (target >= 0))
    scores = np.zeros(len(trigger))
    for start, stop in _batches(user_items, trigger[known]):
        rows = known[start:stop]
        scores[rows] = _batch_scores(user_items, trigger[rows], target[rows])
    return scores


def _batches(of: UserItems, trigger: Ints) -> Iterator[tuple[int, int]]:
    """Runs of whole triggers whose users' items fit into one batch; at least one trigger each."""
    runs = equal_runs(trigger)
    first = np.array([start for start, _ in runs], dtype=np.int64)
    lengths = np.append(0, np.cumsum(of.start[of.kept + 1] - of.start[of.kept]))  # items of the users of items, added up
    engaged = np.cumsum([lengths[of.kept_start[trigger[start] + 1]] - lengths[of.kept_start[trigger[start]]] for start in first.tolist()])
    most = max(1, _BATCH_COLUMNS // max(1, len(of.item_ids)))
    begin = 0
    while begin < len(first):
        before = engaged[begin - 1] if begin else 0
        end = int(np.searchsorted(engaged, before + _BATCH_ITEMS, side="right"))
        end = min(max(end, begin + 1), begin + most)
        yield int(first[begin]), int(first[end]) if end < len(first) else len(trigger)
        begin = end


def _batch_scores(of: UserItems, trigger: Ints, target: Ints) -> Floats:
    """Swing (p,) of all pairs of some triggers.

    One sparse product for all triggers of the batch: a row is a user of a trigger, a column an item of that trigger, so that users of
    different triggers share nothing and the product is made of one block per trigger.
    """
    num_items, runs = len(of.item_ids), equal_runs(trigger)
    distinct = np.array([trigger[start] for start, _ in runs], dtype=np.int64)
    num_users = of.kept_start[distinct + 1] - of.kept_start[distinct]
    user = of.kept[ranges(of.kept_start[distinct], num_users)]  # (R,)
    block = np.repeat(np.arange(len(runs), dtype=np.int64), num_users)  # (R,)
    num_engaged = of.start[user + 1] - of.start[user]
    pointers = np.append(0, np.cumsum(num_engaged))
    column = np.repeat(block * num_items, num_engaged) + of.items[ranges(of.start[user], num_engaged)]
    ones = np.ones(len(column))
    engaged = sparse.csr_matrix((ones, column, pointers), shape=(len(user), len(runs) * num_items))
    by_item = engaged.T.tocsr()
    weight = engaged @ by_item  # (R, R) shared items of each two users of a trigger, at least the trigger
    row = np.repeat(np.arange(len(user)), np.diff(weight.indptr))
    root = 1.0 / np.sqrt(num_engaged)
    weight.data = np.where(row == weight.indices, 0.0, root[row] * root[weight.indices] / (ALPHA + weight.data))  # a user is no pair
    pair = np.repeat(np.arange(len(runs), dtype=np.int64) * num_items, [length for _, length in runs]) + target
    both = by_item[pair]  # (p, R) 1 where a user of the trigger engaged the target
    scores: Floats = np.asarray(both.multiply(both @ weight).sum(axis=1), dtype=np.float64).ravel()
    return scores / 2  # every two users came in both orders
