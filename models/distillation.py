"""What the scorer expects, as vectors: lists nearly as good as the night's from one product, wherever vectors are all that is served.

Counts know what was engaged together, and are noise where they are few. The scorer (models.scorer) reads counts, user-level co-engagement,
trends and the trained head together; its expectation of every trigger i, of what stood beside i and of what is only like it, is a row of

    P = p(j given i) over the candidates of i,   D_row^-1/2 P D_column^-1/2 = U S V'

and P is factorized in the place of the counts (models.factorization, which has the formula of the score): a closed form of knowledge
distillation (Hinton, Vinyals, Dean 2015). The lists of the night do not read it: docs/decisions/0018-distilled-vectors.md.

Shapes: `N` items, `C` content dimensions, `V` vector length.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_array, vstack

from models.data import Sparse, sparse_rows
from models.factorization import ScoreWeights, Spectral
from models.ranking import blocks
from models.scorer import CandidateSource, HeadVectors, Scorer, Widths

DISTILLED = "distilled"
"""Name of these vectors among those of the heads."""
_POPULARITY_WEIGHT = 0.05  # P knows most of it; 0.1 has 2 % more recall on one development set, and 8 % less on the other


def distil(
    source: CandidateSource,
    scorer: Scorer,
    *,
    weights: ScoreWeights,
    dimension: int,
    widths: Widths,
    seed: int,
    watch: Callable[[int], None] | None = None,
) -> HeadVectors:
    """(N, V) vectors of both sides, V - 1 of which are `dimension` cut at N - 1; the last one is the bias.

    An item that is nobody's candidate takes the target that its content predicts.

    Args:
        source: what is known, with the trained head that the scorer reads.
        scorer: fitted.
        weights: of the counts' factorization: temperature, and half-life of popularity.
        dimension: of the factorization.
        widths: candidates per source.
        seed: of the factorization.
        watch: told the number of triggers that are done.
    """
    weights = dataclasses.replace(  # P knows already what users share, and what content says of rare items
        weights,
        dimension=dimension,
        target_norm_exponent=0.75,
        popularity_weight=_POPULARITY_WEIGHT,
        user_level_weight=0.0,
        prior_users=0.0,
    )
    history = dataclasses.replace(source.history, pairs=expected(source, scorer, widths=widths, watch=watch))
    spectral = Spectral(history, source.content, user_level_weight=0.0, dimension=dimension, seed=seed)
    fit = spectral.factorization(weights)
    nobodys = np.asarray(history.pairs.sum(axis=0)).reshape(-1, 1) == 0
    target = np.where(nobodys, source.content @ fit.content_to_target, fit.target)
    both = dataclasses.replace(fit, target=target).vectors()
    return HeadVectors(trigger=both[0], target=both[1])


def expected(source: CandidateSource, scorer: Scorer, *, widths: Widths, watch: Callable[[int], None] | None = None) -> Sparse:
    """(N, N) p(j given i) of the scorer over each item's candidates; rows sum to 1, or to 0 where there is no candidate.

    Args:
        source: what is known, with the trained head that the scorer reads.
        scorer: fitted.
        widths: candidates per source.
        watch: told the number of triggers that are done.
    """
    num_items, rows = len(source.eligible), list[Sparse]()
    for block in blocks(num_items, num_items):
        triggers = np.arange(block.start, block.stop, dtype=np.int32)
        found = source.propose(triggers, sparse_rows([], [], [], (len(triggers), num_items)), widths=widths)
        indptr = np.searchsorted(found.segment, np.arange(len(triggers) + 1))
        p = np.exp(scorer.log_probability(found.features, found.segment)) if len(found.target) else found.gain
        rows.append(csr_array((p, found.target, indptr), shape=(len(triggers), num_items)))
        if watch:
            watch(block.stop)
    return vstack(rows, format="csr")
