"""How far the trained relevance head is held back to content: chosen when it has been rehearsed, by what followed.

    vector = root(unit) * unit vector of ((1 - share) * head's vector + share * content)

A head that starts as content and learns affinity leaves content behind. That pays where engagement says what goes with what, and costs
where content says it better: somewhere between the two is often better than either, as it is between the weights of a model and of what it
was tuned from (Wortsman et al. 2022). Content tells near items from others more sharply than the trained head does. So that a merge
policy's λ is worth the same whatever the share, `unit` makes the spread of the scores what it was without it.

Shapes: `N` items, `C` content dimensions, `V` vector length, `T` triggers, `E` graded examples, `G` triggers that have some.
"""

from dataclasses import dataclass

import numpy as np
import torch

from models.data import Examples, Floats, Ints, Sparse
from models.factorization import Values, is_better, recalls
from models.mtmh import Anchor
from models.scorer import HeadVectors

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
"""A head keeps at least half of what it has learned."""
_CUTOFF = 100
_BLOCK = 250  # triggers scored at once: 68 MB of scores at 68 k items
_SURE = 2.0  # standard errors


@dataclass(frozen=True, kw_only=True)
class AnchorTrial:
    """What is asked of a share of content.

    Attributes:
        recall: (T,) of holdout partners, at 100.
        agreement: (G,) with the teacher's grades.
        spread: of the scores, see `_spread`.
    """

    recall: Values
    agreement: Values
    spread: float


def choose_anchor(
    head: HeadVectors,
    content: Floats,
    holdout: Sparse,
    triggers: Ints,
    examples: Examples,
    *,
    most: float = SHARES[-1],
    default: float = 0.0,
    stay: float = 0.0,
) -> tuple[Anchor, dict[float, AnchorTrial]]:
    """The share of content with the best recall of all holdout partners, among those that the teacher does not object to.

    The teacher objects to a share whose scores order the graded examples of triggers surely less as it grades them than the head does as
    it was trained: by two standard errors, paired over triggers. No judge is asked.

    Args:
        head: (N, V) vectors of a head without a softmax task, trained on what was known before the holdout.
        content: (N, C) unit rows, zeros for an item without content, which so keeps its direction.
        holdout: (N, N) what followed.
        triggers: (T,) the rows of it to look at.
        examples: graded pairs.
        most: no share is larger.
        default: the share of the night before.
        stay: standard errors that a gain must exceed to move from it.

    Returns:
        The anchor, and what was found of each share.
    """
    graded, default = _Graded.of(examples, triggers), min(default, most)
    trials: dict[float, AnchorTrial] = {}
    for share in sorted({default, *(share for share in SHARES if share <= most)}):
        moved = _anchored(head, content, Anchor(share=share))
        recall, spread = _measured(moved, holdout, triggers)
        trials[share] = AnchorTrial(recall=recall, agreement=graded.agreement(moved), spread=spread)
    free = trials[0.0]
    fine = [s for s, trial in trials.items() if not (graded.some and is_better(free.agreement, trial.agreement, stay=_SURE))]
    best = max(fine, key=lambda share: float(trials[share].recall.mean()))
    if stay and default in fine and not is_better(trials[best].recall, trials[default].recall, stay=stay):
        best = default
    unit = free.spread / trials[best].spread if trials[best].spread > free.spread > 0 else 1.0
    return Anchor(share=best, unit=unit), trials


def _anchored(head: HeadVectors, content: Floats, anchor: Anchor) -> HeadVectors:
    rows = torch.from_numpy(content)
    trigger, target = (anchor.applied(torch.from_numpy(side), rows).numpy() for side in (head.trigger, head.target))
    return HeadVectors(trigger=trigger, target=target)


def _measured(head: HeadVectors, holdout: Sparse, triggers: Ints) -> tuple[Values, float]:
    """(T,) recall, and the mean spread of the scores over the first block of triggers."""
    parts, spread = [], 0.0
    for start in range(0, len(triggers), _BLOCK):
        part = triggers[start : start + _BLOCK]
        scores: Floats = head.trigger[part] @ head.target.T
        spread = spread if start else _spread(scores)
        parts.append(recalls(scores, part, holdout[part], _CUTOFF))
    return np.concatenate(parts), spread


def _spread(scores: Floats) -> float:
    """How much higher the scores of the nearest 100 of each row are, a tenth of a small catalog, than that of its median item."""
    near = max(1, min(_CUTOFF, scores.shape[1] // 10))
    ordered = np.partition(scores, (scores.shape[1] // 2, scores.shape[1] - near), axis=1)
    return float((ordered[:, -near:].mean(axis=1) - ordered[:, scores.shape[1] // 2]).mean())


@dataclass(frozen=True, kw_only=True)
class _Graded:
    """(E,) examples of some triggers that have grades to tell apart, by trigger, and (E,) rows of these triggers."""

    row: Ints
    trigger: Ints
    other: Ints
    target: Floats

    @classmethod
    def of(cls, examples: Examples, triggers: Ints) -> "_Graded":
        order = np.lexsort((examples.other, examples.trigger))
        order = order[np.isin(examples.trigger[order], triggers)]
        trigger, target = examples.trigger[order], examples.target[order]
        if len(order):
            starts = np.flatnonzero(np.diff(trigger, prepend=-1))
            apart = np.maximum.reduceat(target, starts) > np.minimum.reduceat(target, starts)
            order = order[np.repeat(apart, np.diff(starts, append=len(trigger)))]
        _, row = np.unique(examples.trigger[order], return_inverse=True)
        return cls(row=row.astype(np.int32), trigger=examples.trigger[order], other=examples.other[order], target=examples.target[order])

    @property
    def some(self) -> bool:
        """Whether there is anything to agree with."""
        return len(self.row) > 0

    def agreement(self, head: HeadVectors) -> Values:
        """(G,) NDCG of each trigger's examples in the order of their scores, the teacher's grades as gains."""
        score = np.einsum("ev,ev->e", head.trigger[self.trigger], head.target[self.other])
        return self._gain(score) / self._gain(self.target)

    def _gain(self, key: Floats) -> Values:
        order = np.lexsort((self.other, -key, self.row))
        row = self.row[order]
        starts = np.flatnonzero(np.diff(row, prepend=-1))
        rank = np.arange(len(row)) - np.repeat(starts, np.diff(starts, append=len(row)))
        return np.asarray(np.bincount(row, weights=self.target[order] / np.log2(rank + 2.0)), dtype=np.float64)
