"""One function per task; each returns a scalar to minimize and its named parts.

A loss is a mean over the triggers of the *global* batch: every worker divides its sum by `num_triggers`, so that adding up the workers'
gradients gives exactly those of one worker with the whole batch. A row without anything to learn adds 0.

Shapes: `B` triggers here, `M` candidate targets, `P` sampled partners per trigger, `L` examples per trigger, `V` vector length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

AFFINITY_TEMPERATURE = 0.1  # of a cosine; fixed, as a learned one lets a head win by sharpness alone
RELEVANCE_TEMPERATURE = 0.1
MASKED = -1e9  # finite: softmax over a fully masked row stays a number


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A task's scalar, and numbers worth a line in the history; these stay where they were computed, without a gradient."""

    value: Tensor
    parts: dict[str, Tensor]


def full_engagement(scores: Tensor, mass: Tensor, *, num_triggers: int, log_copies: Tensor | None = None, task: str = "engagement") -> Loss:
    """Cross entropy of the softmax over the whole catalog to the co-engagement rows.

    Args:
        scores: (B, N) head scores, the trigger itself masked.
        mass: (B, N) rows of C + b * C_user, or of a signal's C, times what popularity has gained since; not normalized.
        num_triggers: size of the global batch.
        log_copies: (B, N) log of how often an item counts in the normalizer: one that was shown and ignored counts more than once.
        task: engagement, or the signal's name.
    """
    rows = _cross_entropy(scores, mass) if log_copies is None else _cross_entropy(scores + log_copies, mass, scores)
    return _engagement(rows, mass.sum(dim=1) > 0, num_triggers, task)


def sampled_engagement(
    positive_scores: Tensor,
    scores: Tensor,
    *,
    log_inclusion: Tensor,
    position: Tensor,
    valid: Tensor,
    weight: Tensor,
    num_triggers: int,
    log_copies: Tensor | None = None,
    task: str = "engagement",
) -> Loss:
    """The same on a sample: sum over candidates of exp(score) / inclusion probability is unbiased for the full sum (log-Q correction).

    A partner enters its own normalizer exactly once: one found among the candidates is taken out of their weighted sum first.

    Args:
        positive_scores: (B, P) scores of partners drawn in proportion to the co-engagement row.
        scores: (B, M) scores of the shared candidates, the trigger itself masked.
        log_inclusion: (M,) log probability with which each candidate is in the sample.
        position: (B, P) where the partner stands among the candidates, -1 for nowhere.
        valid: (B,) boolean, the trigger has partners.
        weight: (B, P) of each draw: what the row wants of this partner over how often it is drawn; its mean is 1.
        num_triggers: size of the global batch.
        log_copies: (B, M) log of how often a candidate counts in the normalizer, as in `full_engagement`.
        task: engagement, or the signal's name.
    """
    copies = scores if log_copies is None else scores + log_copies
    drawn = sampled_log_normalizer(positive_scores, copies, log_inclusion, position) - positive_scores  # (B, P)
    rows = (weight * drawn).mean(dim=1) * valid
    return _engagement(rows, valid, num_triggers, task)


def sampled_log_normalizer(positive_scores: Tensor, scores: Tensor, log_inclusion: Tensor, position: Tensor) -> Tensor:
    """(B, P) logarithm of an unbiased estimate of the sum of exponentials over the catalog; arguments as in `sampled_engagement`."""
    top = torch.maximum(scores.max(dim=1).values, positive_scores.max(dim=1).values).detach()[:, None]  # (B, 1)
    sampled = ((scores - log_inclusion) - top).exp().sum(dim=1, keepdim=True)  # (B, 1)
    counted = torch.where(position >= 0, (-log_inclusion)[position.clamp(min=0)].exp(), 0.0)  # (B, P) weight the partner already has
    own = (positive_scores - top).exp()  # (B, P)
    return (sampled + own * (1 - counted)).clamp(min=1e-30).log() + top


def affinity(scores: Tensor, mass: Tensor, *, log_popularity: Tensor, log_inclusion: Tensor, num_triggers: int) -> Loss:
    """Cross entropy to co-engagement divided by popularity: interest that popularity does not explain.

    Args:
        scores: (B, M) cosines of trigger and candidates over AFFINITY_TEMPERATURE, the trigger itself masked.
        mass: (B, M) rows of C + b * C_user at the candidates, times what popularity has gained since.
        log_popularity: (M,) log p_j, floored, of the time that `mass` has been shifted to.
        log_inclusion: (M,) log probability with which each candidate is in the sample; 0 for a whole catalog.
        num_triggers: size of the global batch.
    """
    wanted = mass * (log_popularity.min() - log_popularity - log_inclusion).exp()
    rows = _cross_entropy(scores - log_inclusion, wanted, scores)
    return Loss(value=rows.sum() / num_triggers, parts={"affinity": rows.detach().sum() / num_triggers})


def relevance(cosines: Tensor, targets: Tensor, present: Tensor, *, num_triggers: int) -> Loss:
    """Listwise Kullback-Leibler divergence from the softmax of graded targets to the softmax of cosines.

    Args:
        cosines: (B, L) of trigger and examples.
        targets: (B, L) graded relevance in [0,1].
        present: (B, L) boolean, the list has an example here; lists shorter than two teach nothing.
        num_triggers: size of the global batch.
    """
    teacher = (targets / RELEVANCE_TEMPERATURE).masked_fill(~present, MASKED).log_softmax(dim=1)
    student = (cosines / RELEVANCE_TEMPERATURE).masked_fill(~present, MASKED).log_softmax(dim=1)
    rows = (teacher.exp() * (teacher - student)).masked_fill(~present, 0).sum(dim=1) * (present.sum(dim=1) > 1)
    return Loss(value=rows.sum() / num_triggers, parts={"relevance": rows.detach().sum() / num_triggers})


def _cross_entropy(logits: Tensor, mass: Tensor, scores: Tensor | None = None) -> Tensor:
    """(B,) cross entropy of softmax(logits) to the normalized rows of `mass`; 0 for an empty row.

    The normalization is applied to the row sums: (B, M) arrays are passed over as rarely as possible. `scores` (default: the logits)
    are the uncorrected ones, which the expected score is taken of.
    """
    total = mass.sum(dim=1)
    expected = (mass * (logits if scores is None else scores)).sum(dim=1) / total.clamp(min=1e-12)
    return (logits.logsumexp(dim=1) - expected) * (total > 0)


def _engagement(rows: Tensor, taught: Tensor, num_triggers: int, task: str) -> Loss:
    share = "taught_share" if task == "engagement" else f"{task}_taught_share"
    parts = {task: rows.detach().sum() / num_triggers, share: taught.sum() / num_triggers}
    return Loss(value=rows.sum() / num_triggers, parts=parts)
