"""Simple mixes of an engagement list with content: what a trained merge must beat.

    late blend               p(j given i) + lambda * max(cosine, 0), over the full catalog
    reciprocal rank fusion   (1 - w) / (60 + rank by p) + w / (60 + rank by cosine), ranks from 1 (Cormack, Clarke, Buettcher 2009)
    quota                    a share of the positions goes to the content order, the rest to the engagement order

Each family is swept over many mixes at once: the scores and ranks of a block of triggers are made once for all of them.
The contract of a list is that of models.baselines.

Shapes: `T` triggers, `B` triggers of one block, `N` items, `C` content dimensions, `W` candidates of a trigger.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from models.baselines import EngagementScores, hide, top_columns
from models.data import Bools, Floats, Ints
from models.merge import slots_of_share
from models.ranking import Longs, best_per_row, blocks

_RANK_OFFSET = np.float32(60)  # of the paper: how much the first ranks stand out


@dataclass(frozen=True, kw_only=True)
class Mixes:
    """What each family is swept over; an empty sweep leaves the family out.

    Attributes:
        late_blend: lambdas >= 0, probability that a cosine of 1 is worth.
        reciprocal_rank_fusion: weights of content in [0, 1].
        quota: shares of the positions in [0, 1].
    """

    late_blend: Sequence[float] = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    reciprocal_rank_fusion: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
    quota: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)


def blend_lists(
    triggers: Ints, *, engagement: EngagementScores, content: Floats, eligible: Bools, k: int, mixes: Mixes, depth: int = 1000
) -> dict[str, dict[float, Ints]]:
    """Lists of every family and mix.

    Args:
        triggers: (T,) item indices.
        engagement: gives p(j given i).
        content: (N, C) unit rows or zeros.
        eligible: (N,) may be listed.
        k: list length.
        mixes: what to sweep over.
        depth: ranks that count in a fusion.

    Returns:
        {family: {mix: (T, k)}}, families named as in Mixes.
    """
    lists = {name: {mix: np.full((len(triggers), k), -1, dtype=np.int32) for mix in sweep} for name, sweep in vars(mixes).items()}
    for rows in blocks(len(triggers), len(eligible)):
        part = triggers[rows]
        p = hide(engagement.scores(part), part, eligible)
        cosine = hide(content_cosine(part, content), part, eligible)
        for name, found in _of_block(p, cosine, k=k, mixes=mixes, depth=depth).items():
            for mix, columns in found.items():
                lists[name][mix][rows] = columns
    return lists


def _of_block(p: Floats, cosine: Floats, *, k: int, mixes: Mixes, depth: int) -> dict[str, dict[float, Ints]]:
    """Lists of one block by family and mix."""
    found = {"late_blend": late_blend(p, cosine, mixes=mixes.late_blend, k=k)}
    if mixes.reciprocal_rank_fusion or mixes.quota:
        deepest = max(depth, k)
        ranks = Ranks.of(top_columns(p, deepest), top_columns(cosine, deepest))
        found["reciprocal_rank_fusion"] = reciprocal_rank_fusion(ranks, mixes=mixes.reciprocal_rank_fusion, k=k, depth=depth)
        found["quota"] = quota_interleave(ranks, mixes=mixes.quota, k=k)
    return found


def content_cosine(triggers: Ints, content: Floats) -> Floats:
    """(B, N) cosines; -inf where the trigger or the item has no content."""
    known = np.minimum(triggers, len(content) - 1)
    cosine: Floats = content[known] @ content.T
    described = np.any(content, axis=1)
    cosine[:, np.flatnonzero(~described)] = -np.inf
    cosine[(triggers >= len(content)) | ~described[known]] = -np.inf
    return cosine


def late_blend(p: Floats, cosine: Floats, *, mixes: Sequence[float], k: int) -> dict[float, Ints]:
    """Lists by p + lambda * max(cosine, 0), every item scored: no candidate set to lose one from.

    Args:
        p: (B, N), -inf marks what must not be listed.
        cosine: (B, N), anything at or below 0 is no likeness.
        mixes: lambdas.
        k: list length.
    """
    likeness = np.maximum(cosine, 0)
    scores = np.empty_like(p)
    lists = {}
    for mix in mixes:
        np.multiply(likeness, np.float32(mix), out=scores)
        scores += p
        lists[mix] = _padded(top_columns(scores, k), k)
    return lists


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Both orders of the candidates of B triggers, side by side.

    Attributes:
        item: (B, W) item indices, ascending in each row.
        by_p: (B, W) rank from 1 in the engagement order, inf where an item is not in it.
        by_content: (B, W) likewise in the content order; both inf where the cell holds no candidate.
    """

    item: Longs
    by_p: Floats
    by_content: Floats

    @classmethod
    def of(cls, by_p: Longs, by_content: Longs) -> Self:
        """From (B, P) and (B, Q) items, best first, -1 behind the end; an item of both sides becomes one candidate."""
        items = np.concatenate([by_p, by_content], axis=1)
        order = np.argsort(items, axis=1, kind="stable")  # of equal items that of the engagement order comes first
        items = np.take_along_axis(items, order, axis=1)
        position, width = order.astype(np.float32), by_p.shape[1]
        left = np.where(order < width, position + 1, np.float32(np.inf))
        right = np.where(order >= width, position - (width - 1), np.float32(np.inf))
        repeats = items[:, 1:] == items[:, :-1]
        right[:, :-1] = np.where(repeats, right[:, 1:], right[:, :-1])
        absent = items < 0
        absent[:, 1:] |= repeats
        left[absent], right[absent] = np.inf, np.inf
        return cls(item=items, by_p=left, by_content=right)

    def best(self, scores: Floats, k: int) -> Ints:
        """(B, k) items by (B, W) scores, ties by item, -inf not listed."""
        columns = best_per_row(scores, k)
        listed = np.take_along_axis(self.item, np.maximum(columns, 0), axis=1)
        return _padded(np.where(columns >= 0, listed, -1), k)


def reciprocal_rank_fusion(ranks: Ranks, *, mixes: Sequence[float], k: int, depth: int = 1000) -> dict[float, Ints]:
    """Lists by (1 - w) / (60 + rank by p) + w / (60 + rank by content); no rank, no contribution; nothing at all, not listed.

    Cormack, Clarke, Buettcher 2009, "Reciprocal rank fusion outperforms Condorcet and individual rank learning methods", weighted.

    Args:
        ranks: both orders.
        mixes: w.
        k: list length.
        depth: ranks that count.
    """
    by_p, by_content = (np.where(rank <= depth, 1 / (_RANK_OFFSET + rank), np.float32(0)) for rank in (ranks.by_p, ranks.by_content))
    lists = {}
    for mix in mixes:
        scores = np.float32(1 - mix) * by_p + np.float32(mix) * by_content
        lists[mix] = ranks.best(np.where(scores > 0, scores, np.float32(-np.inf)), k)
    return lists


def quota_interleave(ranks: Ranks, *, mixes: Sequence[float], k: int) -> dict[float, Ints]:
    """Of the first t positions, floor(t * share) come from the content order: the slots of the quota policy in models.merge.

    An item takes the earlier of its two slots; what follows the other one moves up. Where one order has run out the other fills up.

    Args:
        ranks: both orders, at least k deep.
        mixes: shares.
        k: list length.
    """
    sides = [np.where(rank <= k, rank, 0).astype(np.int64) for rank in (ranks.by_p, ranks.by_content)]
    lists = {}
    for mix in mixes:
        slots = [np.concatenate([[np.float32(np.inf)], own]) for own in slots_of_share(mix, k)]  # rank 0, no rank: no slot
        lists[mix] = ranks.best(-np.minimum(slots[0][sides[0]], slots[1][sides[1]]), k)
    return lists


def _padded(columns: Longs, k: int) -> Ints:
    """(B, at most k) -> (B, k) int32, -1 behind the end."""
    return np.pad(columns, ((0, 0), (0, k - columns.shape[1])), constant_values=-1).astype(np.int32)
