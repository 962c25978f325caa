"""Settings of a night: frozen, closed (an unknown key is an error), each field described with its unit.

A configuration is `base.yaml`, then one overlay (`--config demo` is `conf/demo.yaml`, `--config my/own.yaml` a file of yours),
then `--set section.key=value`. Files inside the package are read through `importlib.resources`, as they may lie in a zip.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from conf.errors import SettingsError

Json = dict[str, Any]


def _regular(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


def _decaying(days: float) -> float:
    if days <= 0:
        raise ValueError("weights would grow with age or be undefined; wanted a half life > 0 days, very long for no decay")
    return days


HalfLife = Annotated[float, AfterValidator(_decaying)]
"""Days, > 0."""
Share = Annotated[float, Field(ge=0, le=1)]
"""A number in [0,1]."""
MOST_BONUS = 10
"""Of a log probability: 22,000 times as likely, so that all that has it comes first."""
MOST_HEADS = 11
"""Each is a bit of what has found a neighbor, beside five other sources."""
Bonus = Annotated[float, Field(ge=0, le=MOST_BONUS)]
"""What is added to a log probability."""
Pattern = Annotated[str, AfterValidator(_regular)]
"""A regular expression."""


class Section(BaseModel):
    """A group of settings: immutable, and any key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class LakeSettings(Section):
    """Where tables and artefacts live."""

    root: str = Field(description="Folder or URI of the lake; {config} stands for the overlay's name.")
    artifacts: str | None = Field(
        None,
        description="Folder that all workers share, for checkpoints, indexes and the Feast registry; null: below root, if that is a path.",
    )
    variant: str = Field("", pattern=r"^[A-Za-z0-9_-]*$", description="Namespace below root, for A/B lakes; empty for none.")
    keep_nights: int = Field(60, ge=1, description="Nights kept in item_neighbors_history.")

    @model_validator(mode="after")
    def _shared_folder(self) -> Self:
        if "://" in (self.artifacts or self.root):
            raise ValueError(
                f"root {self.root} is a URI, but checkpoints, indexes and the Feast registry need a folder that all workers share: "
                "set lake.artifacts to a mounted path"
            )
        return self


class EventColumns(Section):
    """Your column names in the events table."""

    user_id: str = Field("user_id", description="Who engaged.")
    item_id: str = Field("item_id", description="What was engaged with.")
    engaged_at: str = Field("engaged_at", description="When.")
    action: str | None = Field(None, description="Kind of engagement; null: all rows are `default_action`.")
    weight: str | None = Field(None, description="Strength of the engagement, > 0; null: 1.")
    session_id: str | None = Field(None, description="Basket, visit or invoice; null: the source has none.")


TimeFormat = Literal["timestamp", "date", "epoch_seconds", "epoch_milliseconds"]


class SourceTable(Section):
    """A table of yours: where it lies and how to read it."""

    path: str = Field(description="Folder, file or URI.")
    format: Literal["parquet", "csv", "delta"] = Field("parquet", description="How it is stored.")
    time_format: TimeFormat = Field(
        "timestamp",
        description="What its columns of times hold; text is read as ISO 8601, a time without zone as UTC, a date as its midnight.",
    )
    options: dict[str, str] = Field(default_factory=dict, description="Further Spark reader options, e.g. a CSV separator.")


class EventSource(SourceTable):
    """Your events."""

    columns: EventColumns = Field(default_factory=EventColumns, description="Your column names.")
    default_action: str = Field("engage", min_length=1, description="Action of rows where the source has none.")
    action_weights: dict[str, float] = Field(
        default_factory=dict, description="Weight per action, > 0; when given, other actions are skipped and counted. Empty: all weigh 1."
    )

    @field_validator("action_weights")
    @classmethod
    def _positive(cls, weights: dict[str, float]) -> dict[str, float]:
        if bad := {action: weight for action, weight in weights.items() if weight <= 0}:
            raise ValueError(f"weights must be > 0, found {bad}")
        return weights


class ItemColumns(Section):
    """Your column names in the items table; all but the id are optional."""

    item_id: str = Field("item_id", description="The item.")
    title: str | None = Field(None, description="Display title.")
    text: str | None = Field(None, description="Describing text.")
    categories: str | list[str] | None = Field(None, description="One array column with the path, or text columns from coarse to fine.")
    tags: str | None = Field(None, description="Array of labels, or of struct<tag, weight>; in CSV a text split at `list_separator`.")
    attributes: list[str] = Field(default_factory=list, description="Text columns kept as named attributes.")
    embedding: str | None = Field(None, description="Array of numbers: your own content vector.")
    eligible: str | None = Field(None, description="Boolean: may be offered as a neighbor; null counts as true.")
    filters: list[str] = Field(
        default_factory=list,
        description="Columns that retrieval.filters, retrieval.limits and scopes read, e.g. stock, market, release day, brand, parent id; "
        "text is split at `list_separator`, an array holds several values.",
    )
    event_timestamp: str | None = Field(None, description="From when the row holds; null: the catalog is not point-in-time.")
    created_timestamp: str | None = Field(None, description="When the row became known; null: equal to event_timestamp.")


class ItemSource(SourceTable):
    """Your catalog."""

    columns: ItemColumns = Field(default_factory=ItemColumns, description="Your column names.")
    mode: Literal["snapshot", "changes"] = Field(
        "snapshot", description="snapshot: an item absent from the table has left the catalog; changes: the table holds only changed rows."
    )
    list_separator: str = Field("|", min_length=1, description="Splits list columns that arrive as text.")
    text_pattern: Pattern | None = Field(
        None,
        description="Regular expression whose first group is the part of `text` that is kept, e.g. to leave out tags that stand in it; "
        "a text that does not match is kept whole.",
    )

    @field_validator("text_pattern")
    @classmethod
    def _one_group(cls, pattern: str | None) -> str | None:
        groups = 1 if pattern is None else re.compile(pattern).groups
        if groups != 1:
            raise ValueError(f"wanted one group in parentheses, found {groups}")
        return pattern


class RelevanceColumns(Section):
    """Your column names in the relevance labels."""

    item_id: str = Field("item_id", description="First item.")
    other_item_id: str = Field("other_item_id", description="Second item.")
    grade: str = Field("grade", description="Relevance in [0,1].")
    source: str = Field("source", description="human, llm, ….")
    rated_at: str = Field("rated_at", description="When.")
    source_version: str | None = Field(None, description="Version of the guideline or model.")


class RelevanceSource(SourceTable):
    """Your graded pairs."""

    columns: RelevanceColumns = Field(default_factory=RelevanceColumns, description="Your column names.")


class ImpressionColumns(Section):
    """Your column names in the impressions."""

    user_id: str = Field("user_id", description="Who saw it.")
    trigger_item_id: str = Field("trigger_item_id", description="The item beside which it was shown.")
    item_id: str = Field("item_id", description="What was shown.")
    shown_at: str = Field("shown_at", description="When.")


class ImpressionSource(SourceTable):
    """What was offered beside an item: one row per user, trigger and offered item."""

    columns: ImpressionColumns = Field(default_factory=ImpressionColumns, description="Your column names.")
    engaged_within_seconds: int = Field(
        86_400, ge=1, description="An impression is taken if its user engages the item within so many seconds after it, else ignored."
    )
    days: int = Field(30, ge=1, description="Days up to the run date whose impressions count.")


class SourceSettings(Section):
    """The tables a night reads."""

    events: EventSource = Field(description="Your events.")
    items: ItemSource = Field(description="Your catalog.")
    pair_relevance: RelevanceSource | None = Field(None, description="Graded pairs, if you have some.")
    impressions: ImpressionSource | None = Field(
        None, description="What was shown beside an item, if you know: what was seen and not taken becomes a negative."
    )
    user_share: float = Field(1.0, gt=0, le=1, description="Share of users read, chosen by hash; below 1 for a quick trial on a slice.")
    max_rejected_share: float = Field(
        0.05, ge=0, le=1, description="Refused share of a source's rows above which the ingest gate stops the night."
    )

    @property
    def tables(self) -> dict[str, SourceTable]:
        """The tables that are named, by the name of their section."""
        named = {name: getattr(self, name) for name in ("events", "items", "pair_relevance", "impressions")}
        return {name: table for name, table in named.items() if table is not None}


class WindowSettings(Section):
    """Which later engagements of the same user count as co-engagement."""

    kind: Literal["session", "time", "position"] = Field(
        description="session: same session_id; time: within window_seconds; position: within max_distance distinct items."
    )
    window_seconds: int | None = Field(None, description="Longest gap in seconds, > 0; required for time, optional for position.")
    max_distance: int | None = Field(None, description="Longest distance in distinct items, > 0; required for position.")
    symmetric: bool = Field(False, description="Count the mirror image of each pair too.")

    @field_validator("window_seconds", "max_distance")
    @classmethod
    def _forward(cls, length: int | None) -> int | None:
        if length is not None and length <= 0:
            raise ValueError("a window runs from the trigger forward, this one would have the target at or before it; wanted a number > 0")
        return length

    @model_validator(mode="after")
    def _needs(self) -> Self:
        if self.kind == "time" and self.window_seconds is None:
            raise ValueError("a window of kind time needs window_seconds")
        if self.kind == "position" and self.max_distance is None:
            raise ValueError("a window of kind position needs max_distance")
        return self


class SignalSettings(Section):
    """Co-engagement of some actions alone, counted in tables of its own (`co_engagement_pairs__<name>`), so that heads can train on it."""

    actions: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1, description="Actions that count, of triggers and of targets.")
    window: WindowSettings = Field(description="Its window.")
    half_life_days: HalfLife | None = Field(
        None, description="Days after which a co-engagement of it counts half, > 0; null: as pairs.half_life_days."
    )


SignalName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*(_[a-z0-9]+)*$")]
"""Part of the names of tables and metrics; two underscores in a row begin it in these."""


class PairSettings(Section):
    """How co-engagement is counted."""

    window: WindowSettings = Field(description="The window.")
    half_life_days: HalfLife = Field(description="Days after which a co-engagement counts half, > 0.")
    max_triggers_per_target: int = Field(
        500,
        ge=1,
        description="Engagements of a user right before a target that may be its triggers, in windows of kind time and position: what a "
        "robot costs there does not grow with the window.",
    )
    max_items_per_user_day: int = Field(
        200,
        ge=2,
        description="Distinct items of one user and day (session windows: of one session) that take part; the rest is cut by hash.",
    )
    min_users_per_pair: int = Field(2, ge=1, le=64, description="Distinct users below which a pair never surfaces.")
    max_session_days: int = Field(
        31, ge=0, description="Days from the first to the last engagement of a session, above which ids are taken to be reused: an error."
    )
    max_pairs_per_trigger: int = Field(2000, ge=1, description="Strongest pairs kept per trigger.")
    rebuild_below: int = Field(
        10_000_000,
        ge=0,
        description="Engagements below which a night counts all days anew, which then takes less time than looking for what changed. "
        "The tables are the same either way.",
    )
    max_stale_share: float = Field(
        0.05,
        gt=0,
        le=1,
        description="Share of days that changes can reach above which a night counts all days anew, for the same reason, and says so.",
    )
    max_compared_rows: int = Field(
        30_000_000,
        ge=1,
        description="Rows of pairs on changed days, as they were and as they are, above which a night counts all days anew: they are "
        "compared on the driver, at 30 bytes each.",
    )
    swing_max_users: int = Field(60, ge=2, description="Users per trigger that count for the score swing; the rest is cut by hash.")
    holdout_share: float = Field(0.1, gt=0, lt=0.5, description="Last share of engagements on which scores are calibrated.")
    user_hash_key_env: str = Field("MTMH_USER_HASH_KEY", description="Environment variable with the key of the user hashes.")
    signals: dict[SignalName, SignalSettings] = Field(
        default_factory=dict, description="Further counts by name, e.g. purchase: tasks that model.heads.<name>.signals can train on."
    )

    def of_signal(self, name: str) -> Self:
        """How a signal is counted: these settings with its window and half-life."""
        signal = self.signals[name]
        return self.model_copy(update={"window": signal.window, "half_life_days": self.half_life_of(name), "signals": {}})

    def half_life_of(self, name: str) -> float:
        """Half-life in days of a signal."""
        own = self.signals[name].half_life_days
        return self.half_life_days if own is None else own

    @field_validator("signals")
    @classmethod
    def _not_tasks(cls, signals: dict[str, SignalSettings]) -> dict[str, SignalSettings]:
        if taken := sorted(set(signals) & set(HeadSettings.model_fields)):
            raise ValueError(f"{taken} are tasks of heads already; call these signals something else")
        return signals


JudgeField = Annotated[str, Field(pattern=r"^(title|text|categories|categories\[[1-9]\d*:\]|tags|attributes|embedding|pair_relevance)$")]
"""Something about items that can be withheld from training."""


class FeatureSettings(Section):
    """Content vector and relevance examples."""

    content_dimensions: int = Field(128, ge=2, le=2048, description="Length of the fitted content vector.")
    sentence_model: str | None = Field(
        None,
        description="Folder of a sentence-transformers model that encodes title, text and labels instead; needs requirements-sentences.in. "
        "Its vectors have the model's length. null: the fitted vector.",
    )
    max_terms: int = Field(50_000, ge=10, description="Most frequent terms and labels kept in the vocabulary.")
    fit_max_items: int = Field(200_000, ge=10, description="Items the content vector is fitted on, sampled by hash above.")
    title_weight: float = Field(1.0, ge=0, description="Weight of title and text terms against labels.")
    label_weight: float = Field(0.5, ge=0, description="Weight of category, tag and attribute terms.")
    judge_fields: list[JudgeField] = Field(
        default_factory=list,
        description="What is withheld from vocabulary, vector, labels and training, because a judge reads it: annotation columns, "
        "`categories[2:]` for the category levels behind the second, or `pair_relevance`.",
    )
    num_content_examples: int = Field(20, ge=1, description="Nearest items in content per item that become relevance examples.")
    num_co_engaged_examples: int = Field(10, ge=0, description="Strongest co-engaged items per item that become relevance examples.")


class HeadSettings(Section):
    """A head: the weight of each task in its loss, all >= 0. A weight of 0 leaves the task out."""

    engagement: float = Field(0.0, ge=0, description="Softmax over the catalog to the co-engagement rows, popularity included.")
    relevance: float = Field(0.0, ge=0, description="Listwise distillation of graded relevance.")
    affinity: float = Field(0.0, ge=0, description="Softmax to co-engagement divided by popularity: interest that is not popularity.")
    signals: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="By name of pairs.signals: softmax over the catalog to the rows of that signal."
    )

    @property
    def tasks(self) -> dict[str, float]:
        """Weight of each task; a signal is a task by its own name."""
        return {name: float(getattr(self, name)) for name in type(self).model_fields if name != "signals"} | self.signals

    @model_validator(mode="after")
    def _some(self) -> Self:
        if sum(self.tasks.values()) == 0:
            raise ValueError("a head needs at least one task with a weight above 0")
        return self


class ModelSettings(Section):
    """The encoder and its heads."""

    heads: dict[str, HeadSettings] = Field(
        min_length=1, max_length=MOST_HEADS, description="Heads by name, at most 11; engagement and relevance feed the merged list."
    )
    encoder: Literal["shared", "separate"] = Field(
        "shared", description="shared: one encoder for all heads; separate: one for each, at their added cost, to see what sharing does."
    )
    dimension: int = Field(128, ge=2, le=1024, description="Length of the factorization each side of the encoder starts from.")
    hidden_dimension: int = Field(256, ge=1, description="Width of the residual layer that reads id and content.")
    max_id_rows: int = Field(
        500_000,
        ge=0,
        description="Most items with an id row of their own, the most popular; all others live on content, as new items do. A row takes, "
        "with the optimizer's state, 24 bytes a dimension, and as much for each signal and each separate encoder.",
    )
    content_sides: list[Literal["trigger", "target"]] = Field(
        ["trigger", "target"],
        description="Sides on which heads with a softmax task see content; fewer, to see what it does there. Items without history have "
        "nothing but content, and are predicted from it on both.",
    )
    id_dropout: float = Field(0.1, ge=0, lt=1, description="Share of training items whose id is replaced by its content prediction.")
    exposure_weight: float = Field(
        1.0,
        ge=0,
        description="Copies more that an item counts as a negative of a trigger per day on which a user saw it there and ignored it; "
        "read with source.impressions.",
    )
    user_level_weight: float = Field(0.3, ge=0, description="Weight of user-level co-engagement beside the counted pairs.")
    popularity_weight: float = Field(0.5, ge=0, description="Starting weight of log popularity in the engagement score.")
    target_norm_exponent: float = Field(0.5, ge=0, le=2, description="How much of the factorization's target norms is kept.")
    content_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of content cosine where a head without the engagement task starts; 1 if it has no affinity task either.",
    )

    @model_validator(mode="after")
    def _required_heads(self) -> Self:
        if missing := {"engagement", "relevance"} - set(self.heads):
            raise ValueError(f"heads {sorted(missing)} are missing: merge, gates and online view read them; add them under model.heads")
        for name, of in {"merged": "the merged list", "distilled": "the distilled vectors"}.items():
            if name in self.heads:
                raise ValueError(f"`{name}` is the name of {of}; call the head something else")
        return self

    @property
    def signals(self) -> list[str]:
        """Names of the signals that some head trains on."""
        return sorted({name for head in self.heads.values() for name, weight in head.signals.items() if weight > 0})


class TrainingSettings(Section):
    """The optimization."""

    num_processes: int = Field(1, ge=1, description="Torch workers.")
    num_threads: int = Field(0, ge=0, description="Threads of each torch worker; 0: its share of the cores that its machine has.")
    local_mode: bool = Field(True, description="True: workers on the driver's machine; false: in Spark tasks.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="Where the encoder is trained. auto: on a GPU where every worker has one of its own, else on the processor. Workers in "
        "Spark tasks have those that spark.task.resource.gpu.amount gives them.",
    )
    mixed_precision: bool = Field(
        True, description="On a GPU, factors of matrix products are rounded to TF32 and sums stay float32; false: all float32."
    )
    num_steps: int = Field(
        80,
        ge=0,
        description="Optimizer steps, taken twice: for the scorer before the holdout, then of everything; 0 keeps the factorization.",
    )
    batch_size: int = Field(512, ge=1, description="Triggers per step over all workers.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak of the one-cycle schedule.")
    full_softmax_max_items: int = Field(20_000, ge=1, description="Catalogs up to this size use every item as a candidate.")
    num_sampled_items: int = Field(4096, ge=2, description="Candidates per step above that, weighted by inverse sampling probability.")
    in_batch_negatives: bool = Field(
        False, description="Above that, partners that the triggers of a step draw are candidates of all its triggers, too."
    )
    distil_max_items: int = Field(
        20_000,
        ge=0,
        description="Up to this size of the catalog what the scorer expects is distilled into vectors, `distilled` in item_embeddings; 0: "
        "never. The time that it takes grows with the square of the catalog; on a grocery's 67,735 items they were behind the head's.",
    )
    affinity_weight: float = Field(1.0, ge=0, description="Multiplier of every head's affinity task.")
    timeout_seconds: int = Field(300, ge=10, description="A worker that waits longer for the others within a step fails.")
    checkpoint_seconds: float = Field(
        60, ge=0, description="Seconds after which the state of the training is saved again, so that a killed one goes on; 0: every step."
    )
    max_restarts: int = Field(1, ge=0, description="Times that a training of which a worker was killed goes on by itself; then it fails.")
    warm_start_days: int = Field(
        7,
        ge=0,
        description="Oldest model, in days before the run date, whose weights and scorer a night starts from, so that lists change little; "
        "0: always cold. A forced night, other settings, and deleted engagements start cold, too.",
    )
    seed: int = Field(17, ge=0, description="Seed of sampling and initialization.")
    num_validation_triggers: int = Field(
        1000, ge=10, description="Triggers of the holdout, sampled to calibrate the start and to fit the scorer on."
    )


class FilterSettings(Section):
    """What a list may offer. A neighbor must pass every filter that rules its list."""

    column: str = Field(min_length=1, description="One of source.items.columns.filters.")
    rule: Literal["any_of", "none_of", "released", "shared", "different"] = Field(
        description="any_of, none_of: some, none of the neighbor's values is among `values`; released: its value is a day (YYYY-MM-DD…) "
        "not after the run date; shared, different: it has some, no value in common with the trigger, e.g. the market, the parent id."
    )
    values: list[str] = Field(default_factory=list, description="Values of any_of and none_of.")
    missing: bool = Field(True, description="Whether an item without a value passes; of `shared`, whether either side may lack one.")
    heads: list[str] = Field(default_factory=list, description="Lists it rules, by head name or `merged`; empty: all.")
    scopes: list[str] = Field(
        default_factory=list, description="Triggers whose lists it rules: coarsest categories, or column=value; empty: all."
    )

    @model_validator(mode="after")
    def _values(self) -> Self:
        if (self.rule in ("any_of", "none_of")) != bool(self.values):
            raise ValueError(f"values belong to the rules any_of and none_of, which need some; found {self.values} with {self.rule}")
        return self


class LimitSettings(Section):
    """How many neighbors of a list may be alike; lists take the next best instead."""

    by: str = Field(min_length=1, description="`category` (the finest one), or one of source.items.columns.filters (its first value).")
    at_most: int = Field(ge=1, description="Neighbors of one value in a list; an item without a value is not limited.")
    heads: list[str] = Field(default_factory=list, description="Lists it rules, by head name or `merged`; empty: all.")


class RetrievalSettings(Section):
    """Candidates and lists."""

    list_length: int = Field(100, ge=1, le=1000, description="Neighbors per list.")
    num_candidates_counts: int = Field(400, ge=1, description="Counted pairs per trigger.")
    num_candidates_users: int = Field(200, ge=0, description="Items per trigger that its users engaged with too, at any time.")
    num_candidates_head: int = Field(300, ge=1, description="Nearest items per trigger and head.")
    num_candidates_content: int = Field(600, ge=0, description="Nearest items per trigger in content.")
    num_candidates_popular: int = Field(100, ge=0, description="Most popular items offered to every trigger.")
    new_below_user_days: int = Field(
        5, ge=1, description="An item with fewer user-days up to the run date is new (a backtest's cold targets: below 5)."
    )
    block_size: int = Field(1024, ge=1, description="Triggers scored together in a task.")
    search: Literal["auto", "exact", "ivf"] = Field(
        "auto", description="How nearest items are found; auto: IVF where an estimate of its cost says that it is worth it."
    )
    min_search_recall: float = Field(
        0.98,
        gt=0,
        le=1,
        description="Least recall@list_length of an IVF search against the exact one; below, its effort rises, then exact.",
    )
    keep_candidates: bool = Field(
        True, description="Keep the scored candidates of the published night, some 19 kB an item, so that a changed merge policy is quick."
    )
    filters: list[FilterSettings] = Field(default_factory=list, description="What lists may offer, beyond source.items.columns.eligible.")
    limits: list[LimitSettings] = Field(default_factory=list, description="How many neighbors may be alike; at most one limit a list.")

    @property
    def num_candidates_near(self) -> int:
        """Nearest items that are looked for per head: enough for a whole list, too."""
        return max(self.num_candidates_head, self.list_length)


class PolicySettings(Section):
    """Starting rows of merge_policy, written by the first night of a lake: from then on the table rules, and no change here."""

    scope: str = Field("default", min_length=1, description="default, a coarsest category, or column=value of a mapped filter column.")
    kind: Literal["blend", "quota", "rrf"] = Field(
        "blend", description="blend: p + value * relevance; quota: interleave; rrf: reciprocal rank fusion."
    )
    value: float = Field(ge=0, description="blend: lambda; quota, rrf: share or weight of the relevance order in [0,1].")
    popularity_exponent: float = Field(0.0, ge=0, le=1, description="Discount of popularity.")
    relevance_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the positions that goes to the most relevant, by relevance + log p / 80: of 0.1 every tenth. Not of a quota.",
    )
    new_pair_bonus: Bonus = Field(
        0.0, description="Added to log p of items that were never counted with the trigger: 0.3 makes them 1.35 times as likely."
    )
    new_item_bonus: Bonus = Field(
        0.0, description="Added to log p of new items (retrieval.new_below_user_days); 1.5 where they must be found."
    )

    @model_validator(mode="after")
    def _share(self) -> Self:
        if self.kind != "blend" and self.value > 1:
            raise ValueError(f"a {self.kind} is a share in [0,1], found {self.value}")
        if self.kind == "quota" and self.relevance_share:
            raise ValueError(f"the value of a quota, {self.value}, is its relevance_share; found {self.relevance_share} too: leave it out")
        return self


class OnlineSettings(Section):
    """The Feast online store."""

    enabled: bool = Field(True, description="Publish online after the Delta commit.")
    store: Literal["sqlite", "redis"] = Field("sqlite", description="Where lists are served from.")
    redis_connection_env: str = Field("MTMH_REDIS", description="Environment variable with host:port[,password=...] of Redis.")
    shard_items: int = Field(
        5_000,
        ge=1,
        description="Items that one of a few processes reads at a time: bounds memory; a killed publication goes on at a shard.",
    )


class ExplorerSettings(Section):
    """The page that shows lists."""

    port: int = Field(8765, ge=1, le=65535, description="Port on loopback.")
    image_attribute: str = Field("image_url", description="Attribute of an item (source.items.columns.attributes) with its image's URL.")
    num_shown: int = Field(20, ge=1, description="Neighbors of a list that are shown before more are asked for.")


class EvaluationSettings(Section):
    """How past lists are judged."""

    horizon_days: int = Field(14, ge=1, description="Days after the run date that count as the future.")
    max_triggers: int = Field(4_000, ge=1, description="Triggers judged, sampled by hash.")
    max_items_per_session: int = Field(60, ge=2, description="Items of one future session that are paired, sampled by hash.")
    window: WindowSettings | None = Field(None, description="Which future co-engagements count as hits; null: as in `pairs.window`.")
    cutoffs: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=lambda: [10, 100], min_length=1, description="The K of recall@K, each >= 1."
    )
    num_bootstrap: int = Field(500, ge=10, description="Bootstrap resamples behind an interval.")


class JudgeSettings(Section):
    """Who says how relevant a neighbor is. A judge that withholds nothing from training is same-source and never mixed with others."""

    kind: Literal["taxonomy", "labels", "words", "graded"] = Field(
        description="taxonomy: depth of the shared category path; labels: IDF cosine of tags; words: IDF cosine of title words; "
        "graded: rows of pair_relevance."
    )
    withhold: list[JudgeField] = Field(
        default_factory=list, description="What the model is not shown in a backtest, so that this judge is independent of it."
    )
    level_grades: list[Share] = Field(
        default_factory=lambda: [0.2, 0.6, 1.0], min_length=1, description="taxonomy: grade in [0,1] by shared levels, from one level on."
    )
    ignored_labels: list[Pattern] = Field(
        default_factory=list, description="labels: regular expressions of tags that say nothing of content."
    )
    sources: list[str] = Field(default_factory=list, description="graded: sources of pair_relevance that count; empty: all.")

    @property
    def independent(self) -> bool:
        """Whether it knows something that the model is not shown."""
        return bool(self.withhold)

    @model_validator(mode="after")
    def _reads_what_is_withheld(self) -> Self:
        read = {"taxonomy": "categories", "labels": "tags", "words": "title", "graded": "pair_relevance"}[self.kind]
        if self.withhold and not any(field.partition("[")[0] == read for field in self.withhold):
            raise ValueError(f"a judge of kind {self.kind} reads {read}: withhold it too, or nothing, which makes it a same-source judge")
        return self


class BacktestSettings(Section):
    """How a backtest splits time and who judges. Cuts are days: what is engaged after a cut is the future of that cut."""

    slice_share: float = Field(0.1, gt=0, lt=0.4, description="Share of engagements in the last slice, and again in each one before it.")
    num_validation_cuts: int = Field(1, ge=1, le=5, description="Slices before the last one, on which settings are chosen.")
    judges: dict[str, JudgeSettings] = Field(
        default_factory=lambda: {"title": JudgeSettings(kind="words")},
        min_length=1,
        description="Judges of relevance by name; what any of them withholds is hidden from training.",
    )
    blend_values: list[Annotated[float, Field(ge=0)]] = Field(
        default_factory=lambda: [0.0, 0.001, 0.002, 0.003, 0.005, 0.007, 0.01, 0.014, 0.02, 0.03, 0.05, 0.1, 0.3, 1.0],
        min_length=2,
        description="Values of lambda, each >= 0, that the merged list and the late blend are swept over.",
    )
    content_shares: list[Share] = Field(
        default_factory=lambda: [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0],
        min_length=2,
        description="Shares of content that rank fusion and quota are swept over, in [0,1].",
    )
    popularity_exponents: list[Share] = Field(
        default_factory=lambda: [0.0, 0.04, 0.1, 0.2, 0.3, 0.5],
        description="Popularity discounts that the merged list is swept over, in [0,1].",
    )
    new_pair_bonuses: list[Bonus] = Field(
        default_factory=lambda: [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5],
        description="Bonuses of new pairs that the merged list is swept over, each from 0 to 10, without relevance in it.",
    )
    new_item_bonuses: list[Bonus] = Field(
        default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 4.0],
        description="Bonuses of new items that the merged list is swept over, each from 0 to 10, without relevance in it.",
    )
    churn: bool = Field(False, description="Train the day before each cut too, to see how much the lists change from night to night.")
    ease_max_items: int = Field(12_000, ge=1, description="Largest catalog that EASE, which inverts an items x items matrix, is run on.")
    external_baselines: bool = Field(True, description="Run ALS (implicit) and item2vec (gensim) where these libraries are installed.")

    @property
    def judge_fields(self) -> list[str]:
        """What training is not shown, over all judges."""
        return sorted({field for judge in self.judges.values() for field in judge.withhold})


class GateSettings(Section):
    """Thresholds of the gates; a critical failure stops the night before anything is published."""

    min_events: int = Field(100, ge=1, description="Engagements up to the run date.")
    min_items: int = Field(2, ge=1, description="Items in the catalog at the run date.")
    min_pairs: int = Field(1, ge=1, description="Counted pairs above the privacy minimum.")
    max_event_age_days: int = Field(
        14, ge=0, description="Days from the newest engagement to the run date: above, the source has stopped, or its times are misread."
    )
    min_content_share: float = Field(0.5, ge=0, le=1, description="Share of items with text or labels (warning below).")
    max_mean_cosine: float = Field(0.9, gt=0, le=1, description="Mean pairwise cosine of a head's vectors: above, the head has collapsed.")
    max_zero_share: float = Field(0.99, ge=0, le=1, description="Share of items about which a head knows nothing: zero vectors.")
    min_used_dimensions: float = Field(
        1.5, ge=0, description="Dimensions over which a head's vectors spread, as a participation ratio (warning below)."
    )
    min_list_coverage: float = Field(0.95, ge=0, le=1, description="Share of catalog items with a merged list.")
    min_fullness: float = Field(0.9, ge=0, le=1, description="Mean length of merged lists against list_length (or the eligible catalog).")
    min_counted_share: float = Field(
        0.1, ge=0, le=1, description="Share of a trigger's 10 strongest counted partners that its lists hold, of those that may be offered."
    )
    max_churn: float = Field(0.8, ge=0, le=1, description="1 - mean Jaccard@10 against the published night (warning above).")
    max_volume_drop: float = Field(0.5, ge=0, le=1, description="Drop of a table's rows against the last good night that stops the night.")


class AlertSettings(Section):
    """Who hears of a night that failed."""

    command: list[str] = Field(
        default_factory=list,
        description="Program and arguments, started after a failure; MTMH_RUN_ID, MTMH_STAGE and MTMH_ERROR say which.",
    )
    webhook_env: str = Field(
        "MTMH_WEBHOOK", description="Environment variable with the URL that a failure is posted to as JSON; unset: none."
    )


class LogSettings(Section):
    """What a job says while it runs, on standard error."""

    format: Literal["text", "json"] = Field(
        "text", description="For people, or one JSON object a line with time, level, run_id, stage and message for a log collector."
    )


class SparkSettings(Section):
    """The session that `python -m` starts; of spark-submit's, shuffle_partitions and settings alone."""

    master: str = Field("local[2]", description="Spark master when the job starts its own session.")
    driver_memory: str = Field("5g", pattern=r"^\d+[mg]$", description="Heap of the driver JVM.")
    shuffle_partitions: int = Field(8, ge=1, description="Partitions of a shuffle before adaptive execution merges them.")
    settings: dict[str, str] = Field(default_factory=dict, description="Further Spark settings.")


class Settings(Section):
    """Everything a night needs to know."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="Name of the configuration; names its local lake.")
    lake: LakeSettings = Field(description="Where tables live.")
    source: SourceSettings = Field(description="Your tables.")
    pairs: PairSettings = Field(description="Counting.")
    features: FeatureSettings = Field(description="Content and labels.")
    model: ModelSettings = Field(description="Encoder and heads.")
    training: TrainingSettings = Field(description="Optimization.")
    retrieval: RetrievalSettings = Field(description="Candidates and lists.")
    merge: list[PolicySettings] = Field(min_length=1, description="First content of merge_policy.")
    online: OnlineSettings = Field(description="Online store.")
    explorer: ExplorerSettings = Field(description="Looking at lists.")
    evaluation: EvaluationSettings = Field(description="Judging.")
    backtest: BacktestSettings = Field(description="Judging on the past.")
    gates: GateSettings = Field(description="Thresholds.")
    alerts: AlertSettings = Field(default_factory=AlertSettings, description="Failures.")
    log: LogSettings = Field(default_factory=LogSettings, description="What is said.")
    spark: SparkSettings = Field(description="Session.")

    @model_validator(mode="after")
    def _default_policy(self) -> Self:
        scopes = [policy.scope for policy in self.merge]
        if "default" not in scopes or len(scopes) != len(set(scopes)):
            raise ValueError(f"merge needs one policy per scope and one of scope default, found scopes {scopes}")
        return self

    @model_validator(mode="after")
    def _known_signals(self) -> Self:
        """Heads name signals that are counted, and signals name actions that ingest takes."""
        events, signals = self.source.events, self.pairs.signals
        faults = [
            f"model.heads.{head}.signals names {name!r}, which is not among pairs.signals {sorted(signals)}: define it there"
            for head, settings in self.model.heads.items()
            for name in settings.signals
            if name not in signals
        ]
        taken = set(events.action_weights) or ({events.default_action} if events.columns.action is None else None)
        for name, signal in signals.items():
            if taken is not None and (unknown := sorted(set(signal.actions) - taken)):
                faults.append(
                    f"pairs.signals.{name} counts {unknown}, but ingest takes {sorted(taken)} only: "
                    "see source.events.columns.action, default_action and action_weights"
                )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @model_validator(mode="after")
    def _known_filters(self) -> Self:
        """Filters, limits and policies name columns that are mapped and lists that exist."""
        mapped, names, faults = self.source.items.columns.filters, self.list_names, list[str]()
        for number, rule in enumerate(self.retrieval.filters):
            asked = {rule.column, *(scope.partition("=")[0] for scope in rule.scopes if "=" in scope)}
            faults += [f"retrieval.filters[{number}] reads column {name!r}" for name in sorted(asked - set(mapped))]
            faults += [f"retrieval.filters[{number}] rules list {name!r}" for name in rule.heads if name not in names]
        for number, limit in enumerate(self.retrieval.limits):
            faults += [f"retrieval.limits[{number}] reads column {limit.by!r}"] if limit.by not in ("category", *mapped) else []
            faults += [f"retrieval.limits[{number}] rules list {name!r}" for name in limit.heads if name not in names]
        scopes = [policy.scope for policy in self.merge if "=" in policy.scope and policy.scope.partition("=")[0] not in mapped]
        faults += [f"merge has a row of scope {scope!r}" for scope in scopes]
        ruled = [name for limit in self.retrieval.limits for name in limit.heads or names]
        faults += [f"{ruled.count(name)} limits rule list {name!r}, wanted one" for name in names if ruled.count(name) > 1]
        if faults:
            raise ValueError(f"{'; '.join(faults)}; source.items.columns.filters maps {mapped}, lists are {names}")
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _pairs_for_graded_judges(cls, content: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Looks at what is given, not at what was read: a fault elsewhere must not hide this one until the next try."""
        faults = _graded_without_pairs(content)
        try:
            settings = handler(content)
        except ValidationError as error:
            raise ValidationError.from_exception_data(error.title, [*map(_fault_again, error.errors()), *faults]) from error
        if faults:
            raise ValidationError.from_exception_data(cls.__name__, faults)
        return settings

    @property
    def list_names(self) -> list[str]:
        """The lists an item has: one per head, then merged."""
        return [*self.model.heads, "merged"]

    def fingerprint(self) -> str:
        """Hash of every setting that can change a table; session, lake place, gates, patience, alerts and logs cannot, nor can `merge`: the
        table merge_policy rules once it is there.
        """
        content = self.model_dump(mode="json", exclude=_DECIDES_NO_TABLE)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


PATIENCE = {"timeout_seconds", "checkpoint_seconds", "max_restarts"}
"""Settings of `training` that decide no number."""
_DECIDES_NO_TABLE: Any = dict.fromkeys(("spark", "lake", "merge", "gates", "online", "backtest", "explorer", "alerts", "log"), True) | {
    "source": {"max_rejected_share"},
    "training": PATIENCE,
}


def _graded_without_pairs(content: Any) -> list[InitErrorDetails]:
    """A fault for each judge of kind graded, if there is no source of graded pairs; what cannot be read is another check's fault."""
    judges = _at(content, "backtest", "judges")
    if _at(content, "source", "pair_relevance") is not None or not isinstance(judges, dict):
        return []
    message = "a judge of kind graded reads source.pair_relevance, which is not set; set its path, or choose another kind of judge"
    return [
        InitErrorDetails(
            type=PydanticCustomError("no_pair_relevance", message), loc=("backtest", "judges", str(name), "kind"), input="graded"
        )
        for name, judge in judges.items()
        if _at(judge, "kind") == "graded"
    ]


def _at(content: Any, *keys: str) -> Any:
    """What lies below these keys, of mappings or of sections that are made already; None for nothing."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else getattr(content, key, None)
    return content


def _fault_again(fault: ErrorDetails) -> InitErrorDetails:
    """A fault as it is raised, of one that was reported."""
    return InitErrorDetails(type=fault["type"], loc=fault["loc"], input=fault["input"], ctx=fault.get("ctx", {}))


def _merge(base: Json, over: Json) -> Json:
    """Overlay wins; mappings merge key by key, everything else is replaced whole."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


_MOST_SHOWN = 200  # characters of a value in a message
_MOST_NODES = 100_000  # of a settings file, aliases written out


def _parse(text: str, where: str) -> Json:
    try:
        _check_nodes(yaml.compose(text, Loader=yaml.SafeLoader), where)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"{where} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"{where} holds a {type(content).__name__}; wanted a mapping of sections such as `lake:` and `source:`")
    if strange := [key for key in content if not isinstance(key, str)]:
        raise SettingsError(f"{where} has the key {strange[0]!r}; wanted names of sections such as `lake:` and `source:`")
    return content


def _check_nodes(root: yaml.Node | None, where: str) -> None:
    """Refuse a key given twice, of which YAML takes the last without a word, and aliases that write out to more than any settings need."""
    sizes: dict[int, int] = {}
    above = set[int]()

    def size(node: yaml.Node) -> int:
        if id(node) in above:
            raise SettingsError(f"{where} has an alias inside of what it names, line {node.start_mark.line + 1}; write it out")
        if id(node) not in sizes:
            above.add(id(node))
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            keys = [key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
            if twice := {key for key in keys if keys.count(key) > 1}:
                raise SettingsError(f"{where} has the key {min(twice)} twice, below line {node.start_mark.line + 1}; keep one")
            parts = [part for pair in pairs for part in pair] if pairs else node.value if isinstance(node, yaml.SequenceNode) else []
            sizes[id(node)] = 1 + sum(size(part) for part in parts)
            above.remove(id(node))
        return sizes[id(node)]

    if root is not None and (found := size(root)) > _MOST_NODES:
        raise SettingsError(f"{where} writes out to {found:,} values through its aliases, wanted at most {_MOST_NODES:,}; write them out")


def base_content() -> Json:
    """The defaults of every configuration, as conf/base.yaml gives them."""
    return _parse(resources.files("conf").joinpath("base.yaml").read_text(encoding="utf-8"), "conf/base.yaml")


def _overlay(config: str) -> tuple[str, Json]:
    """The overlay's name and content: a packaged one by name, or a file by path."""
    if config.endswith((".yaml", ".yml")):
        path = Path(config)
        if not path.is_file():
            raise SettingsError(f"no settings file {config}; give a path to a .yaml file or one of {packaged_configs()}")
        try:
            return path.stem, _parse(path.read_text(encoding="utf-8"), config)
        except UnicodeDecodeError as error:
            raise SettingsError(f"{config} is not UTF-8: byte {error.start} is {error.object[error.start]:#x}; save it as UTF-8") from error
    if config not in packaged_configs():
        raise SettingsError(f"no configuration named {config!r}; have {packaged_configs()}, or give a path ending in .yaml")
    return config, _parse(resources.files("conf").joinpath(f"{config}.yaml").read_text(encoding="utf-8"), f"conf/{config}.yaml")


def packaged_configs() -> list[str]:
    """Names of the overlays that come with the project."""
    names = (entry.name for entry in resources.files("conf").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml") and name != "base.yaml")


def _assign(content: Json, assignment: str) -> None:
    """Apply one `--set a.b=value`; the value is read as YAML."""
    dotted, equals, value = assignment.partition("=")
    if not equals or not dotted:
        raise SettingsError(f"--set {assignment!r} is no assignment; wanted section.key=value, e.g. pairs.half_life_days=30")
    *sections, key = dotted.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise SettingsError(f"--set {assignment!r}: {section!r} is a value, not a section")
    content[key] = _parse(f"value: {value}", f"--set {assignment!r}")["value"]


def load_settings(config: str, assignments: Sequence[str] = ()) -> Settings:
    """Read, overlay and validate.

    Args:
        config: name of a packaged overlay, or path of a .yaml file.
        assignments: `section.key=value`, later ones win.

    Raises:
        SettingsError: with every fault found, one a line.
    """
    name, overlay = _overlay(config)
    content = _merge(_merge(base_content(), {"name": name}), overlay)
    for assignment in assignments:
        _assign(content, assignment)
    try:
        settings = Settings.model_validate(content)
    except ValidationError as error:
        raise SettingsError(f"configuration {config!r} has {error.error_count()} fault(s):\n" + _describe(error)) from error
    root = settings.lake.root.replace("{config}", settings.name)
    return settings.model_copy(update={"lake": settings.lake.model_copy(update={"root": root})})


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _describe(error: ValidationError) -> str:
    lines = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"]) or "(whole)"
        found = "" if isinstance(fault["input"], dict) else f"; found {_brief(fault['input'])}"
        lines.append(f"  {where}: {fault['msg']}{found}")
    return "\n".join(lines)
