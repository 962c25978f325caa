"""The item encoder that all heads share (or one for each, to see what sharing does), and its heads.

    trunk(i)   = [id_i, content_i] + MLP([id_i, content_i]),   the MLP's last layer starts at zero
    trigger(i) = head's trigger projection of trunk(i)
    target(j)  = [head's target projection of trunk(j), bias_j]

An id row starts as the factorization's [A, B], so that at step 0 the engagement head's scores are the calibrated factorization's and the
relevance head's are (1 - l) * content cosine + l * cosine of the spectral rows. Each signal (co-engagement by some actions) adds the
[A, B] of its own factorization to the id row, and a head that trains on signals alone starts there. Popularity lives in the last
dimension alone: a trigger multiplies it by 1; in a head without a softmax task it is 0 for every item, whatever is learned.

The table of id rows is bounded, and with it the optimizer's state: of more known items than it may hold, the least popular
have none, and live on content as new items do. Content and popularity are of all items.

Shapes: `B` items of a batch, `N` items, `R` id rows, `K` dimensions of a factorization, `F` factorizations (of all actions, and of each
signal), `C` content dimensions, `D` = 2KF + C, `V` vector length.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

COSINE_TASKS = frozenset({"relevance", "affinity"})
"""Every other task is a softmax over the catalog to co-engagement: `engagement`, and signals by name."""
_SHARED = "shared"


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where the parameters begin.

    Attributes:
        trigger: (N, K) rows A.
        target: (N, K) rows B.
        content: (N, C).
        content_to_trigger: (C, K).
        content_to_target: (C, K).
        log_popularity: (N,), says which items get an id row.
        log_prior: (N,) what a bias starts from: log popularity under the calibrated half-life.
        known: (N,) boolean, the item has an engagement history; others have no id row.
        signals: by name of a signal, where its part of the id rows begins.
    """

    trigger: Tensor
    target: Tensor
    content: Tensor
    content_to_trigger: Tensor
    content_to_target: Tensor
    log_popularity: Tensor
    log_prior: Tensor
    known: Tensor
    signals: Mapping[str, "SignalStart"] = field(default_factory=dict)

    def owners(self, most: int) -> Tensor:
        """(R,) ascending indices of the items that get an id row: those known, of more than `most` the most popular; ties by index."""
        known = torch.nonzero(self.known).flatten()
        by_popularity = torch.argsort(self.log_popularity[known], descending=True, stable=True)
        return known[by_popularity[:most]].sort().values

    def id_rows(self, owners: Tensor) -> Tensor:
        """(R, 2KF) of some items."""
        return torch.cat([rows[owners] for part in self._parts for rows in (part.trigger, part.target)], dim=1)

    @property
    def content_to_id(self) -> Tensor:
        """(C, 2KF)."""
        return torch.cat([rows for part in self._parts for rows in (part.content_to_trigger, part.content_to_target)], dim=1)

    @property
    def _parts(self) -> "list[Start | SignalStart]":
        return [self, *self.signals.values()]


@dataclass(frozen=True, kw_only=True)
class SignalStart:
    """The factorization of a signal; attributes as in `Start`."""

    trigger: Tensor
    target: Tensor
    content_to_trigger: Tensor
    content_to_target: Tensor


class Head(nn.Module):
    """Two projections of the trunk.

    Args:
        name: of the head.
        task_weights: weight per task, tasks of weight 0 left out.
        trigger: (V - 1, D) start of the trigger projection.
        target: (V - 1, D) start of the target projection.
        popularity_scale: start of the factor of the log prior in the bias; read only with a softmax task.
        blind: sides, `trigger` or `target`, that read the second half of a trunk, which has seen no content; only with a softmax task.
    """

    def __init__(
        self,
        *,
        name: str,
        task_weights: Mapping[str, float],
        trigger: Tensor,
        target: Tensor,
        popularity_scale: float,
        blind: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.name = name
        self.task_weights = dict(task_weights)
        self.has_bias = _is_softmax(self.task_weights)
        self.blind = frozenset(blind) if self.has_bias else frozenset[str]()
        self.trigger = nn.Linear(trigger.shape[1], trigger.shape[0], bias=False)
        self.target = nn.Linear(target.shape[1], target.shape[0], bias=False)
        with torch.no_grad():
            self.trigger.weight.copy_(trigger)
            self.target.weight.copy_(target)
        if self.has_bias:
            self.popularity_scale = nn.Parameter(torch.tensor(float(popularity_scale)))

    def trigger_vectors(self, trunk: Tensor) -> Tensor:
        """(B, D) -> (B, V); the last dimension is 1."""
        vectors = self._finish(self.trigger(self._seen(trunk, "trigger")))  # (B, V - 1)
        return torch.cat([vectors, vectors.new_ones(len(vectors), 1)], dim=1)

    def target_vectors(self, trunk: Tensor, log_prior: Tensor) -> Tensor:
        """(B, D), (B,) -> (B, V); the last dimension is the bias."""
        vectors = self._finish(self.target(self._seen(trunk, "target")))  # (B, V - 1)
        bias = self.popularity_scale * log_prior if self.has_bias else torch.zeros_like(log_prior)
        return torch.cat([vectors, bias[:, None]], dim=1)

    def _seen(self, trunk: Tensor, side: str) -> Tensor:
        width = self.trigger.in_features
        return trunk[:, width:] if side in self.blind else trunk[:, :width]

    def _finish(self, vectors: Tensor) -> Tensor:
        """Without a softmax task a score is a cosine; with it, lengths carry how sure the item is."""
        return vectors if self.has_bias else functional.normalize(vectors, dim=1, eps=1e-6)


class Encoder(nn.Module):
    """Id rows and content of items to the representation that heads project."""

    def __init__(self, start: Start, owners: Tensor, hidden_dimension: int) -> None:
        super().__init__()
        rows = start.id_rows(owners)
        rows = rows if len(rows) else rows.new_zeros(1, rows.shape[1])  # an index needs a row to point at
        width = rows.shape[1] + start.content.shape[1]
        self.ids = nn.Embedding(rows.shape[0], rows.shape[1], _weight=rows, sparse=True)  # a step's gradient is of the rows it names
        self.content_to_id = nn.Linear(start.content.shape[1], rows.shape[1], bias=False)
        with torch.no_grad():
            self.content_to_id.weight.copy_(start.content_to_id.T)
        self.inner, self.outer = nn.Linear(width, hidden_dimension), nn.Linear(hidden_dimension, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, rows: Tensor, content: Tensor, by_content: Tensor, *, blind: bool = False) -> Tensor:
        """(B,) id rows of items, (B, C) their content, (B,) whose id row is replaced by its content prediction -> (B, D).

        `blind`: content is seen in that prediction alone.
        """
        ids = torch.where(by_content[:, None], self.content_to_id(content), self.ids(rows))  # (B, 2KF)
        features = torch.cat([ids, torch.zeros_like(content) if blind else content], dim=1)  # (B, D)
        residual: Tensor = self.outer(functional.gelu(self.inner(features)))
        return features + residual


class Mtmh(nn.Module):
    """Encoder plus heads.

    Args:
        start: factorization and content.
        hidden_dimension: width of the residual MLP.
        heads: task weights per head name.
        temperature: T of the calibrated factorization.
        popularity_weight: rho of the calibrated factorization.
        content_share: 1 - l, share of content cosine in the start of a head without a softmax task.
        max_id_rows: most items with an id row of their own; all others live on content.
        shared: one encoder for all heads; False: each head has its own, which starts alike.
        blind: sides, `trigger` or `target`, on which heads with a softmax task see no content.
    """

    def __init__(
        self,
        *,
        start: Start,
        hidden_dimension: int,
        heads: Mapping[str, Mapping[str, float]],
        temperature: float,
        popularity_weight: float,
        content_share: float,
        max_id_rows: int,
        shared: bool = True,
        blind: Collection[str] = (),
    ) -> None:
        super().__init__()
        num_items, dimension = start.trigger.shape
        self.num_items, self.dimension, self.signals = num_items, dimension, tuple(start.signals)
        self.hidden_dimension, self.shared, self.blind = hidden_dimension, shared, tuple(sorted(blind))
        names = [_SHARED] if shared else list(heads)
        owners = start.owners(max_id_rows)
        self.num_id_rows = len(owners)
        self.encoders = nn.ModuleDict({name: Encoder(start, owners, hidden_dimension) for name in names})
        id_row = torch.full((num_items,), -1)
        id_row[owners] = torch.arange(len(owners))
        for name, buffer in (("content", start.content), ("log_prior", start.log_prior), ("id_row", id_row)):
            self.register_buffer(name, buffer)  # kept in the checkpoint, which so needs no table to be used
        self.content: Tensor
        self.log_prior: Tensor
        self.id_row: Tensor
        selectors = _Selectors(dimension, start.content.shape[1], self.signals)
        begin = _Beginning(temperature=temperature, popularity_weight=popularity_weight, content_share=content_share, blind=self.blind)
        built = (_build_head(name, tasks, selectors, begin) for name, tasks in heads.items())
        self.heads = nn.ModuleDict({head.name: head for head in built})

    @property
    def groups(self) -> dict[str, list[str]]:
        """Names of the encoders, and of the heads that read each."""
        return {_SHARED: list(self.heads)} if self.shared else {name: [name] for name in self.heads}

    def trunk(self, encoder: str, items: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Representation by an encoder.

        Args:
            encoder: one of `groups`.
            items: (B,) item indices.
            dropped: (B,) boolean, the id row is replaced by its content prediction (always so for items without one).

        Returns:
            (B, D); where a side is blind (B, 2D), without content in the second half.
        """
        rows, content = self.id_row[items], self.content[items]
        by_content = rows < 0 if dropped is None else (rows < 0) | dropped
        views = (False, True) if self.blind else (False,)
        return torch.cat([self.encoders[encoder](rows.clamp(min=0), content, by_content, blind=blind) for blind in views], dim=1)

    def head(self, name: str) -> Head:
        """A head by name."""
        head = self.heads[name]
        assert isinstance(head, Head)
        return head

    def forward(self, items: Tensor, dropped: Tensor | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """(B,) items -> per head their (B, V) trigger and (B, V) target vectors."""
        log_prior, found = self.log_prior[items], dict[str, tuple[Tensor, Tensor]]()
        for encoder, names in self.groups.items():
            trunk = self.trunk(encoder, items, dropped)
            found |= {name: (self.head(name).trigger_vectors(trunk), self.head(name).target_vectors(trunk, log_prior)) for name in names}
        return found

    @torch.no_grad()
    def vectors(self, block: int = 8192) -> dict[str, tuple[Tensor, Tensor]]:
        """Per head the (N, V) trigger and target vectors of the whole catalog."""
        parts = [self(items) for items in torch.split(torch.arange(self.num_items, device=self.content.device), block)]
        return {name: (torch.cat([p[name][0] for p in parts]), torch.cat([p[name][1] for p in parts])) for name in self.heads}


class _Selectors:
    """Rows of the identity that pick A, B or the content out of the trunk [A, B, A and B of each signal, content]."""

    def __init__(self, dimension: int, content: int, signals: Sequence[str]) -> None:
        sizes = [dimension, dimension] * (1 + len(signals)) + [content]
        *rows, self.content = torch.split(torch.eye(sum(sizes)), sizes)
        self.trigger, self.target = rows[:2]
        self._of_signal = dict(zip(signals, zip(rows[2::2], rows[3::2], strict=True), strict=True))

    def start_of(self, weights: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """Those of the factorization that a head with these softmax tasks starts as: all actions, or its heaviest signal."""
        if "engagement" in weights:
            return self.trigger, self.target
        return self._of_signal[max(set(weights) - COSINE_TASKS, key=lambda task: (weights[task], task))]


def _is_softmax(tasks: Iterable[str]) -> bool:
    return bool(set(tasks) - COSINE_TASKS)


@dataclass(frozen=True, kw_only=True)
class _Beginning:
    """How heads start; see `Mtmh`."""

    temperature: float
    popularity_weight: float
    content_share: float
    blind: Collection[str]


def _build_head(name: str, tasks: Mapping[str, float], selectors: _Selectors, begin: _Beginning) -> Head:
    weights = {task: weight for task, weight in tasks.items() if weight > 0}
    if _is_softmax(weights):
        trigger, target = selectors.start_of(weights)
        trigger = begin.temperature * trigger
    else:
        # a head that never learns from engagement does not start from it either
        share = begin.content_share if "affinity" in weights else 1.0
        trigger = target = torch.cat([share**0.5 * selectors.content, (1 - share) ** 0.5 * selectors.trigger])
    popularity_scale = begin.temperature * begin.popularity_weight
    return Head(name=name, task_weights=weights, trigger=trigger, target=target, popularity_scale=popularity_scale, blind=begin.blind)
