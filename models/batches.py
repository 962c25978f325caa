"""What one optimizer step reads: triggers, candidates, their co-engagement mass, sampled partners and relevance examples.

Every draw belongs to an item (models.draws), a seed and a step, and is made for the global batch; a worker then takes its rows. So the
workers' batches are exactly the rows of the batch that one worker would have, and all know which items the whole batch is about.

Shapes: `B` triggers of this worker, `M` candidates, `P` sampled partners per trigger, `L` own and `R` shared examples per trigger, `I`
distinct items of the global batch.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from models.data import Bools, Examples, Floats, Ints, Sparse
from models.draws import Keys, choose, uniform
from models.factorization import CoEngagement

_ENGAGEMENT = "engagement"  # the task whose partners are candidates, too
_NUM_PARTNERS = 4  # drawn per trigger when the softmax is sampled
_NUM_EXAMPLES = 8  # graded items per trigger and step
_NUM_USERS = 16  # of a trigger whose row is taught, when the softmax is sampled; exact rows change no recall by more than .0002
_NUM_RANDOM = 64  # mostly unrelated items, shared by all triggers: one product instead of a gather per trigger
_TRIGGERS, _CANDIDATES, _RANDOM, _DROPPED, _EXAMPLES, _BY_PAIR, _POINT, _PLACE, _USERS = range(9)  # what a random number is for
_TASK_SEED = 1_000_003  # between the seeds of tasks
_POPULAR_SHARE = 0.25  # of the sampled candidates, the most popular items, with certainty: most of the softmax mass is there


@dataclass(frozen=True, kw_only=True)
class Positives:
    """What a softmax task is taught of a batch's triggers.

    Attributes:
        mass: (B, M) co-engagement at the candidates times their prior shift, 0 at the trigger itself; estimated where the candidates are a
            sample, too.
        partners: (B, P) drawn in proportion to the trigger's row without it; no columns when the catalog is complete.
        weight: (B, P) prior shift of each partner over the row's mean.
        position: (B, P) of the partner among the candidates, or -1.
        valid: (B,) the trigger has partners.
    """

    mass: Floats
    partners: Ints
    weight: Floats
    position: Ints
    valid: Bools


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One worker's rows.

    Attributes:
        items: (I,) ascending, every item that any worker's rows name.
        triggers: (B,) item indices.
        candidates: (M,) item indices shared by all triggers.
        log_inclusion: (M,) log probability of being a candidate.
        positives: by task: `engagement`, and signals by name.
        examples: (B, L) item indices.
        random: (R,) item indices of the shared examples.
        targets: (B, L + R) graded relevance; of a shared example its content cosine, 0 when negative.
        present: (B, L + R) there is an example here.
        dropped: (I,) which of `items` have their id hidden in this step.
        log_copies: (B, M) log of how often each candidate counts in a normalizer: 1 + w * ignored exposures; None: once.
        own: rows and columns of any `mass` where the candidate is the trigger itself.
        num_triggers: size of the global batch.
    """

    items: Ints
    triggers: Ints
    candidates: Ints
    log_inclusion: Floats
    positives: Mapping[str, Positives]
    examples: Ints
    random: Ints
    targets: Floats
    present: Bools
    dropped: Bools
    log_copies: Floats | None
    own: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
    num_triggers: int


class Batches:
    """Draws batches.

    Args:
        matrices: co-engagement of all pairs of items, by task.
        content: (N, C), grades random examples.
        examples: graded pairs.
        popularity: (N,) decayed user-days.
        keys: (N,) of the items.
        prior_shift: (N,) popularity that a score starts from over that of the time when pairs were counted.
        exposures: (N, N) how many copies more an item counts in a trigger's normalizer; None: none.
        batch_size: triggers of the global batch.
        full_softmax_max_items: catalogs up to this size use all items as candidates.
        num_sampled_items: candidates above it.
        in_batch_negatives: the partners that a batch's triggers draw are candidates, too.
        id_dropout: share of items whose id is hidden.
        seed: of every draw.
        rank: this worker, from 0.
        world_size: number of workers.
    """

    def __init__(
        self,
        *,
        matrices: Mapping[str, CoEngagement],
        content: Floats,
        examples: Examples,
        popularity: Floats,
        keys: Keys,
        prior_shift: Floats,
        batch_size: int,
        full_softmax_max_items: int,
        num_sampled_items: int,
        id_dropout: float,
        seed: int,
        in_batch_negatives: bool = False,
        exposures: Sparse | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.matrices, self.content, self.keys, self.id_dropout = matrices, content, keys, id_dropout
        self.num_items, self.prior_shift, self.exposures = int(popularity.shape[0]), prior_shift, exposures
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.examples = _Lists(examples, self.num_items)
        self.partners = {task: _Partners(matrix) for task, matrix in matrices.items()}
        self.mean_shift = {task: _mean_over_rows(matrix, prior_shift) for task, matrix in matrices.items()}
        learns = np.logical_or.reduce([self.examples.length > 1, *(partners.some for partners in self.partners.values())])
        self.triggers = np.flatnonzero(learns).astype(np.int32)
        self.batch_size = min(batch_size, len(self.triggers))
        self.is_sampled = self.num_items > full_softmax_max_items and self.num_items > num_sampled_items
        self.num_popular = int(_POPULAR_SHARE * num_sampled_items)
        self.num_uniform = num_sampled_items - self.num_popular
        self.by_popularity = np.argsort(-popularity, kind="stable").astype(np.int32)
        self.drawn_as_partner = self._drawn_as_partner() if in_batch_negatives and self.is_sampled else None

    def batch(self, step: int) -> Batch:
        """The rows of a step that are this worker's."""
        draw = _Draw(self.keys, self.seed, step)
        triggers = self.triggers[draw.choose(_TRIGGERS, self.triggers, self.batch_size)]
        partners = self._partners(draw, triggers)
        candidates, log_inclusion = self._candidates(draw, partners[_ENGAGEMENT])
        examples, targets, present = self.examples.draw(draw, triggers, _NUM_EXAMPLES)
        everything = np.arange(self.num_items, dtype=np.int32)
        random = everything[draw.choose(_RANDOM, everything, _NUM_RANDOM)]
        mine = slice(self.rank, None, self.world_size)
        where = np.full(self.num_items, -1, dtype=np.int32)
        where[candidates] = np.arange(len(candidates), dtype=np.int32)
        items = np.unique(np.concatenate([triggers, candidates, examples.ravel(), random, *(of.ravel() for of in partners.values())]))
        return Batch(
            items=items,
            triggers=triggers[mine],
            candidates=candidates,
            log_inclusion=log_inclusion,
            positives={task: self._positives(task, draw, partners[task][mine], triggers[mine], candidates, where) for task in partners},
            examples=examples[mine],
            random=random,
            targets=np.concatenate([targets[mine], np.maximum(self.content[triggers[mine]] @ self.content[random].T, 0)], axis=1),
            present=np.concatenate([present[mine], self._graded(triggers[mine], random)], axis=1),
            dropped=draw.uniform(_DROPPED, items) < self.id_dropout,
            log_copies=self._log_copies(triggers[mine], candidates),
            own=_cells(where[triggers[mine]]),
            num_triggers=len(triggers),
        )

    def _partners(self, draw: "_Draw", triggers: Ints) -> dict[str, Ints]:
        """By task, of the whole batch. The numbers of a task are its own, so that another task changes no draw."""
        width = _NUM_PARTNERS if self.is_sampled else 0
        return {task: of.draw(draw.of_task(number), triggers, width) for number, (task, of) in enumerate(self.partners.items())}

    def _positives(self, task: str, draw: "_Draw", partners: Ints, triggers: Ints, candidates: Ints, where: Ints) -> Positives:
        """Of this worker's rows."""
        matrix = self.matrices[task]
        if self.is_sampled:
            mass = matrix.estimated_rows(triggers, candidates, most_users=_NUM_USERS, offset=draw.uniform(_USERS, triggers))
        else:
            mass = matrix.rows(triggers)
        return Positives(
            mass=mass * self.prior_shift[candidates],
            partners=partners,
            weight=self.prior_shift[partners] / self.mean_shift[task][triggers][:, None],
            position=where[partners],
            valid=self.partners[task].some[triggers],
        )

    def _log_copies(self, triggers: Ints, candidates: Ints) -> Floats | None:
        if self.exposures is None:
            return None
        rows = self.exposures[triggers]
        return np.log1p((rows[:, candidates] if self.is_sampled else rows).toarray())

    def _candidates(self, draw: "_Draw", partners: Ints) -> tuple[Ints, Floats]:
        """Of the whole batch: all items; or the most popular ones, some of the others and, if wanted, the partners that its triggers
        draw: what one trigger goes with is the likeliest mistake for another one.
        """
        if not self.is_sampled:
            return np.arange(self.num_items, dtype=np.int32), np.zeros(self.num_items, dtype=np.float32)
        popular, rest = np.split(self.by_popularity, [self.num_popular])
        others = rest[draw.choose(_CANDIDATES, rest, self.num_uniform)]
        absent: float | Floats = 1 - self.num_uniform / len(rest)
        if self.drawn_as_partner is not None:
            others = np.setdiff1d(np.concatenate([others, partners.ravel()]), popular)
            absent = absent * (1 - self.drawn_as_partner[others])
        log_inclusion = np.zeros(len(popular) + len(others), dtype=np.float32)
        log_inclusion[len(popular) :] = np.log(1 - absent)
        return np.concatenate([popular, others]), log_inclusion

    def _drawn_as_partner(self) -> Floats:
        """(N,) how likely an item is to be drawn as a partner by some trigger of a batch, as if all draws were rare and independent: too
        likely, by up to a fifth, where a trigger has a dozen partners only.
        """
        total = self.partners[_ENGAGEMENT].counted + self.partners[_ENGAGEMENT].walked
        share = np.zeros((self.num_items, 1), dtype=np.float32)
        share[self.triggers, 0] = np.divide(1, total[self.triggers], out=np.zeros(len(self.triggers)), where=total[self.triggers] > 0)
        draws = self.matrices[_ENGAGEMENT].dot_transposed(share)[:, 0] * (_NUM_PARTNERS * self.batch_size / max(1, len(self.triggers)))
        probability: Floats = -np.expm1(-np.maximum(draws, 0))
        return probability

    def _graded(self, triggers: Ints, random: Ints) -> Bools:
        """(B, R) which shared examples count: not the trigger itself, and none for a trigger without examples of its own."""
        graded: Bools = (random != triggers[:, None]) & (self.examples.length[triggers] > 0)[:, None]
        return graded


@dataclass(frozen=True)
class _Draw:
    """All random numbers of a step; of an item, they are its own."""

    keys: Keys
    seed: int
    step: int

    def of_task(self, number: int) -> Self:
        """Numbers of a further task's own; those of the first task are these."""
        return self if number == 0 else dataclasses.replace(self, seed=self.seed + number * _TASK_SEED)

    def uniform(self, purpose: int, items: Ints, number: int = 0) -> npt.NDArray[np.float64]:
        """(...) in [0, 1) of each of (...) items."""
        return uniform(self.keys[items], self.seed, self.step, purpose, number)

    def choose(self, purpose: int, items: Ints, count: int) -> npt.NDArray[np.int64]:
        """Ascending places of `count` of the items."""
        return choose(self.keys[items], count, self.seed, self.step, purpose)

    def several(self, purpose: int, items: Ints, width: int) -> npt.NDArray[np.float64]:
        """(B * width,) in [0, 1): `width` of each of (B,) items, one item's next to each other."""
        columns = [self.uniform(purpose, items, number) for number in range(width)]
        return np.stack(columns, axis=1).ravel() if columns else np.zeros(0)


class _Lists:
    """Examples grouped by trigger."""

    def __init__(self, examples: Examples, num_items: int) -> None:
        order = np.lexsort((examples.other, examples.trigger))
        self.other, self.target = examples.other[order], examples.target[order]
        self.length = np.bincount(examples.trigger, minlength=num_items)
        self.start = np.concatenate([[0], np.cumsum(self.length)])[:-1]

    def draw(self, draw: _Draw, triggers: Ints, width: int) -> tuple[Ints, Floats, Bools]:
        """(B, width) items, targets and presence: the whole list where it is short, else a window that starts anywhere (cyclic)."""
        length = self.length[triggers][:, None]
        step = np.arange(width)[None, :]
        present = step < length
        offset = (draw.uniform(_EXAMPLES, triggers)[:, None] * length).astype(np.int64)
        cell = self.start[triggers][:, None] + np.where(length > 0, (offset + step) % np.maximum(length, 1), 0)
        if len(self.other) == 0:
            return np.zeros(present.shape, np.int32), np.zeros(present.shape, np.float32), present
        cell = np.minimum(cell, len(self.other) - 1)
        return np.where(present, self.other[cell], 0).astype(np.int32), np.where(present, self.target[cell], 0).astype(np.float32), present


class _Partners:
    """Draws a partner j of trigger i with probability M_ij / sum of row i, without forming the row.

    The row is a mixture: counted pairs, or a user of i (weight 1 - 1 / items of the user) and another of that user's items.
    """

    def __init__(self, matrix: CoEngagement) -> None:
        self.pairs, self.items_users, self.users = matrix.pairs, matrix.items_users, matrix.weighted_users
        self.pair_sums = np.concatenate([[0.0], np.cumsum(self.pairs.data, dtype=np.float64)])
        self.num_items_of_user = np.diff(self.users.indptr)
        per_user = 1 - 1 / np.maximum(self.num_items_of_user, 1)
        self.user_sums = np.concatenate([[0.0], np.cumsum(per_user[self.items_users.indices], dtype=np.float64)])
        self.counted = self._row_mass(self.pair_sums, self.pairs.indptr)
        self.walked = float(matrix.factor) * self._row_mass(self.user_sums, self.items_users.indptr)
        self.some: Bools = (self.counted + self.walked) > 0

    @staticmethod
    def _row_mass(sums: npt.NDArray[np.float64], indptr: Ints) -> npt.NDArray[np.float64]:
        return sums[indptr[1:]] - sums[indptr[:-1]]

    def draw(self, draw: _Draw, triggers: Ints, width: int) -> Ints:
        """(B, width) partners; a trigger without any gets item 0, which `some` masks."""
        flat = np.repeat(triggers, width)
        total = np.maximum(self.counted[flat] + self.walked[flat], 1e-300)
        by_pair = draw.several(_BY_PAIR, triggers, width) < self.counted[flat] / total
        point = draw.several(_POINT, triggers, width)
        out = np.zeros(len(flat), dtype=np.int32)
        pair = by_pair & (self.counted[flat] > 0)
        walk = ~pair & (self.walked[flat] > 0)
        out[pair] = self.pairs.indices[_pick(self.pair_sums, self.pairs.indptr, flat[pair], point[pair])]
        out[walk] = self._walk(flat[walk], point[walk], draw.several(_PLACE, triggers, width)[walk])
        return out.reshape(len(triggers), width)

    def _walk(self, triggers: Ints, point: npt.NDArray[np.float64], share: npt.NDArray[np.float64]) -> Ints:
        user = self.items_users.indices[_pick(self.user_sums, self.items_users.indptr, triggers, point)]
        start, count = self.users.indptr[user], self.num_items_of_user[user]
        place = (share * np.maximum(count - 1, 1)).astype(np.int64)
        item = self.users.indices[start + place]
        last = self.users.indices[start + count - 1]
        return np.where(item == triggers, last, item).astype(np.int32)  # the user's last item stands in for the trigger itself


def _mean_over_rows(matrix: CoEngagement, values: Floats) -> Floats:
    """(N,) mean of (N,) values over each row's mass; any number between the extremes of an empty row."""
    total, wanted = (matrix.dot(column[:, None])[:, 0] for column in (np.ones_like(values), values))
    mean = np.divide(wanted, total, out=np.ones_like(values), where=total > 0)
    return np.clip(mean, values.min(), values.max())  # of a row whose users know nothing else, rounding alone is left


def _cells(column: Ints) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row and column numbers where `column` names one."""
    row = np.flatnonzero(column >= 0)
    return row, column[row].astype(np.int64)


def _pick(sums: npt.NDArray[np.float64], indptr: Ints, rows: Ints, point: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Cell of a CSR row at the share `point` of the row's mass."""
    low, high = sums[indptr[rows]], sums[indptr[rows + 1]]
    cell = np.searchsorted(sums, low + point * (high - low), side="right") - 1
    return np.clip(cell, indptr[rows], indptr[rows + 1] - 1)
