"""Every table of the lake, declared once: name, key, layout, and a comment per column.

All times are UTC; `event_date` is the UTC day of `engaged_at`. Ids are strings exactly as the user's tables hold them.
Types are Spark SQL DDL. `order_by` is the layout inside a file; tables are not physically partitioned, because days on a small
set would be thousands of tiny folders.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

_OF_SIGNAL = "__"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: its name, Spark SQL type, what it means (with its unit), and whether it may be null."""

    name: str
    type: str
    comment: str
    nullable: bool = True


@dataclass(frozen=True, kw_only=True)
class Table:
    """A Delta table.

    `key` identifies a row; `restricted` tables hold user-level state and are never exported; what a failed stage wrote is taken back,
    except where it is `kept_on_failure`, to be looked at. A table `per_signal` has one more of its kind for each of `pairs.signals`.
    """

    name: str
    comment: str
    key: tuple[str, ...]
    columns: tuple[Column, ...]
    order_by: tuple[str, ...] = ()
    restricted: bool = False
    kept_on_failure: bool = False
    per_signal: bool = False

    def of_signal(self, signal: str | None) -> Self:
        """The table of the same kind for a signal; None: this one, of all actions."""
        return self if signal is None else replace(self, name=f"{self.name}{_OF_SIGNAL}{signal}", per_signal=False)

    @property
    def column_names(self) -> tuple[str, ...]:
        """Names in declared order: what every writer selects last."""
        return tuple(column.name for column in self.columns)

    @property
    def ddl(self) -> str:
        """`name type [NOT NULL] COMMENT '...'`, comma separated: input of `StructType.fromDDL` and of CREATE TABLE."""
        return ", ".join(
            f"`{c.name}` {c.type}{'' if c.nullable else ' NOT NULL'} COMMENT '{c.comment.replace(chr(39), chr(92) + chr(39))}'"
            for c in self.columns
        )


def _key(name: str, type_: str, comment: str) -> Column:
    return Column(name=name, type=type_, comment=comment, nullable=False)


def _col(name: str, type_: str, comment: str) -> Column:
    return Column(name=name, type=type_, comment=comment)


ENGAGEMENTS = Table(
    name="engagements",
    comment="Cleaned events: one row per user, item, action and instant.",
    key=("user_id", "item_id", "action", "engaged_at"),
    order_by=("event_date", "user_id", "engaged_at"),
    restricted=True,
    columns=(
        _key("user_id", "string", "Who engaged, as in the source."),
        _key("item_id", "string", "What was engaged with."),
        _key("action", "string", "Kind of engagement, e.g. purchase."),
        _key("engaged_at", "timestamp", "When, UTC."),
        _col("session_id", "string", "Basket, visit or invoice; null where the source has none."),
        _key("weight", "double", "Strength of the engagement, > 0: source weight times action weight."),
        _key("event_date", "date", "UTC day of engaged_at."),
    ),
)

ITEM_ANNOTATIONS = Table(
    name="item_annotations",
    comment="What is known about an item, with history: a row per item and time at which something became true.",
    key=("item_id", "event_timestamp"),
    order_by=("item_id", "event_timestamp"),
    columns=(
        _key("item_id", "string", "The item."),
        _key("event_timestamp", "timestamp", "From when the annotation holds, UTC; 1970-01-01 where the catalog has no times."),
        _key("created_timestamp", "timestamp", "When the annotation became known, UTC; later than event_timestamp for a correction."),
        _col("title", "string", "Display title."),
        _col("text", "string", "Free text that describes the item."),
        _col("categories", "array<string>", "Category path, coarse to fine."),
        _col("tags", "array<string>", "Labels without order."),
        _col("tag_weights", "array<double>", "Weight of each label, parallel to tags, > 0."),
        _col("attributes", "map<string,string>", "Further named properties: brand, size, author."),
        _col("embedding", "array<float>", "Content vector brought by the user; null lets the night fit one from text and labels."),
        _key("eligible", "boolean", "Whether the item may be offered as a neighbor."),
        _col("filter_values", "map<string,array<string>>", "Values of the columns that filters and limits read, by column."),
        _key("deleted", "boolean", "True in the marker row of an item that left the catalog."),
    ),
)

PAIR_RELEVANCE = Table(
    name="pair_relevance",
    comment="Optional graded relevance labels of item pairs, by people or language models.",
    key=("item_id", "other_item_id", "source", "rated_at"),
    columns=(
        _key("item_id", "string", "First item of the pair."),
        _key("other_item_id", "string", "Second item of the pair."),
        _key("source", "string", "Who graded: human, llm, or a name of the user's."),
        _key("rated_at", "timestamp", "When, UTC."),
        _key("grade", "double", "Relevance in [0,1]."),
        _col("source_version", "string", "Version of the guideline or model behind the grade."),
    ),
)

RELEVANCE_FEEDBACK = Table(
    name="relevance_feedback",
    comment="Inbox of the explorer: thumbs up and down. Nights from the day of a vote on take each pair's latest into pair_relevance, as "
    "source human.",
    key=("item_id", "other_item_id", "rated_at"),
    columns=(
        _key("item_id", "string", "The trigger whose list was looked at."),
        _key("other_item_id", "string", "The neighbor that was judged."),
        _key("rated_at", "timestamp", "When, UTC."),
        _col("grade", "double", "1 thumbs up, 0 thumbs down, null: the vote before is withdrawn."),
        _key("head", "string", "The list that was looked at."),
        _key("run_id", "string", "The night of that list."),
    ),
)

REJECTED_ROWS = Table(
    name="rejected_rows",
    comment="Source rows that ingest refused, and why; user ids are hashed.",
    key=("run_id", "source", "row"),
    kept_on_failure=True,
    columns=(
        _key("run_id", "string", "The night that refused the row."),
        _key("source", "string", "events, items, pair_relevance or impressions."),
        _key("row", "string", "The refused row as JSON; user ids hashed."),
        _key("reason", "string", "What is wrong with it."),
        _key("num_rows", "bigint", "How many identical rows were refused."),
    ),
)

IMPRESSIONS = Table(
    name="impressions",
    comment="What was shown beside an item on the last days up to the run date; empty where there is no source.impressions.",
    key=("user_id", "trigger_item_id", "item_id", "shown_at"),
    restricted=True,
    columns=(
        _key("user_id", "string", "Who saw it."),
        _key("trigger_item_id", "string", "The item beside which it was shown."),
        _key("item_id", "string", "What was shown."),
        _key("shown_at", "timestamp", "When, UTC."),
        _key("event_date", "date", "UTC day of shown_at."),
    ),
)

EXPOSURE_PAIRS = Table(
    name="exposure_pairs",
    comment="How often an item was shown beside a trigger, and ignored, by at least min_users_per_pair distinct users.",
    key=("trigger_item_id", "target_item_id"),
    order_by=("trigger_item_id", "target_item_id"),
    columns=(
        _key("trigger_item_id", "string", "The item beside which it was shown."),
        _key("target_item_id", "string", "What was shown."),
        _key("num_shown", "bigint", "User-days on which it was shown."),
        _key("num_ignored", "bigint", "Of these, user-days on which no impression was taken."),
        _key("weight", "double", "Ignored user-days, decayed by pairs.half_life_days as of the run date."),
        _key("num_users", "bigint", "Distinct users who saw it."),
        _key("as_of", "date", "Run date."),
    ),
)

CO_ENGAGEMENT_DAILY = Table(
    name="co_engagement_daily",
    per_signal=True,
    comment="Co-engagements of one day: how many users engaged trigger and then target, the target on that day; of symmetric windows each "
    "pair once, the smaller id as the trigger.",
    key=("event_date", "trigger_item_id", "target_item_id"),
    order_by=("event_date", "trigger_item_id", "target_item_id"),
    restricted=True,
    columns=(
        _key("event_date", "date", "UTC day of the target engagement."),
        _key("trigger_item_id", "string", "Item engaged first."),
        _key("target_item_id", "string", "Item engaged then, never the trigger itself."),
        _key("num_users", "bigint", "Users with this pair on this day; a user counts once."),
        _key(
            "user_hashes", "array<bigint>", "The min_users_per_pair smallest keyed user hashes, ascending: mergeable, exact for at-least."
        ),
    ),
)

CO_ENGAGEMENT_DAYS = Table(
    name="co_engagement_days",
    per_signal=True,
    comment="What the days of co_engagement_daily were counted from, and how: what the next night compares itself with.",
    key=("event_date",),
    order_by=("event_date",),
    columns=(
        _key("event_date", "date", "A day with engagements, up to the run date."),
        _key("num_events", "bigint", "Rows of engagements on the day."),
        _key("fingerprint", "string", "Hash of these rows, whatever their order."),
        _key("num_capped_groups", "bigint", "User-days, or sessions up to the day, that max_items_per_user_day cuts."),
        _key("num_cut_items", "bigint", "Distinct items of these that take no part."),
        _key("reach_days", "int", "Days that the longest session ever seen spans after its first; 0 for other windows."),
        _key("counted_by", "string", "Hash of the code and the settings that decide the counts of a day."),
        _key("totaled_by", "string", "Hash of the settings that decide weights, and of landmark_date."),
        _key("landmark_date", "date", "The day d0 of the landmark form of the totals."),
        _key("holdout_from", "date", "As in co_engagement_pairs."),
        _key("as_of", "date", "The run date."),
    ),
)

CO_ENGAGEMENT_TOTALS = Table(
    name="co_engagement_totals",
    per_signal=True,
    comment="Sums over days of the pairs of at least min_users_per_pair distinct users, which the next night builds on.",
    key=("trigger_item_id", "target_item_id"),
    order_by=("trigger_item_id", "target_item_id"),
    columns=(
        _key("trigger_item_id", "string", "Item engaged first."),
        _key("target_item_id", "string", "Item engaged then."),
        _key("weight", "double", "As in co_engagement_pairs, before the cut to max_pairs_per_trigger."),
        _key("num_user_days", "bigint", "Sum over days of users: undecayed count."),
        _key("fit_weight", "double", "As in co_engagement_pairs."),
    ),
)

CO_ENGAGEMENT_PAIRS = Table(
    name="co_engagement_pairs",
    per_signal=True,
    comment="Pairs engaged by at least min_users_per_pair distinct users, decayed, as of the run date.",
    key=("trigger_item_id", "target_item_id"),
    order_by=("trigger_item_id", "target_item_id"),
    columns=(
        _key("trigger_item_id", "string", "Item engaged first."),
        _key("target_item_id", "string", "Item engaged then."),
        _key("weight", "double", "Landmark form: sum over days of users * 2^((day - landmark_date) / half_life_days)."),
        _key("landmark_date", "date", "The day d0 of the landmark form; weight at day D is weight * 2^((d0 - D) / half_life_days)."),
        _key("num_user_days", "bigint", "Sum over days of users: undecayed count."),
        _key("fit_weight", "double", "Landmark weight of the days before holdout_from; 0 unless min_users_per_pair users before it."),
        _key("holdout_from", "date", "First day of the last slice of engagements, on which scores are calibrated."),
        _key("conditional", "double", "weight(i,j) / weight of i's pairs: share of i's co-engagement that goes to j."),
        _key("cosine", "double", "user-days(i,j) / sqrt(user-days(i) * user-days(j)), item user-days from item_popularity."),
        _key("jaccard", "double", "user-days(i,j) / (user-days(i) + user-days(j) - user-days(i,j)), capped at 1."),
        _key("lift", "double", "user-days(i,j) * total user-days / (user-days(i) * user-days(j))."),
        _key("decayed_jaccard", "double", "Jaccard of weights: weight(i,j) / (weight(i) + weight(j) - weight(i,j)), capped at 1."),
        _key("bm25", "double", "BM25 of num_user_days over the rows of this table, triggers as documents, targets as terms."),
        _key("swing", "double", "Swing over swing_max_users users of i: user pairs with both items weigh more, the less else they share."),
        _key("as_of", "date", "The run date."),
    ),
)

ITEM_POPULARITY = Table(
    name="item_popularity",
    per_signal=True,
    comment="How much each item was engaged with up to the run date: denominators of every association score.",
    key=("item_id",),
    order_by=("item_id",),
    columns=(
        _key("item_id", "string", "The item."),
        _key("weight", "double", "Landmark form of user-days, as in co_engagement_pairs."),
        _key("landmark_date", "date", "The day d0 of the landmark form."),
        _key("num_user_days", "bigint", "Days with an engagement, summed over users."),
        _key("fit_weight", "double", "Landmark weight of the days before holdout_from."),
        _key("holdout_from", "date", "As in co_engagement_pairs."),
        _key("num_users", "bigint", "Distinct users."),
        _key("first_engaged_date", "date", "Day of the first engagement."),
        _key("last_engaged_date", "date", "Day of the last engagement."),
        _key("as_of", "date", "The run date."),
    ),
)

ITEM_FEATURES = Table(
    name="item_features",
    comment="What the encoder reads, one row per item known at the run date or engaged with before it.",
    key=("item_id",),
    order_by=("item_index",),
    columns=(
        _key("item_id", "string", "The item."),
        _key("item_index", "int", "Dense index from 0, ascending by item_id."),
        _col("title", "string", "Display title as known at the run date."),
        _col("categories", "array<string>", "Category path, coarse to fine."),
        _col("tags", "array<string>", "Labels."),
        _col("tag_weights", "array<double>", "Weights parallel to tags."),
        _col("attributes", "map<string,string>", "Further named properties."),
        _key("content_vector", "array<float>", "Unit-length content vector; all zeros for an item without any text or label."),
        _key("in_catalog", "boolean", "The catalog holds the item at the run date."),
        _key("eligible", "boolean", "In the catalog and allowed as a neighbor."),
        _col("filter_values", "map<string,array<string>>", "Values of the columns that filters and limits read, by column."),
        _key("age_days", "int", "Days since first engagement or first annotation, whichever is earlier; 0 on the first day."),
        _key("num_user_days", "bigint", "Undecayed engagements, from item_popularity; 0 for a new item."),
        _key("as_of", "date", "The run date."),
    ),
)

RELEVANCE_EXAMPLES = Table(
    name="relevance_examples",
    comment="Labelled and mined item pairs with a graded relevance target.",
    key=("item_id", "other_item_id"),
    order_by=("item_id", "other_item_id"),
    columns=(
        _key("item_id", "string", "First item."),
        _key("other_item_id", "string", "Second item."),
        _key("target", "double", "Relevance in [0,1]."),
        _key("source", "string", "Most trusted source that grades the pair: human, llm, another of pair_relevance, taxonomy or teacher."),
        _key("mined_by", "string", "Why the pair is here: label, content (near in content) or co_engaged (engaged together)."),
        _key("as_of", "date", "The run date."),
    ),
)

ITEM_EMBEDDINGS = Table(
    name="item_embeddings",
    comment="Vectors per item and head: score of target j for trigger i is trigger_vector(i) . target_vector(j).",
    key=("item_id", "head"),
    order_by=("head", "item_id"),
    columns=(
        _key("item_id", "string", "The item."),
        _key("head", "string", "Head name from the settings, e.g. engagement; or distilled: what the scorer expects of both."),
        _key("trigger_vector", "array<float>", "The item as a trigger; its last dimension multiplies the target's bias."),
        _key("target_vector", "array<float>", "The item as a target; its last dimension is the popularity bias (0 in a head without)."),
        _key("model_version", "string", "Which checkpoint made it."),
        _key("as_of", "date", "The run date."),
    ),
)

NEIGHBOR_STRUCT = (
    "struct<neighbor_id:string,score:double,reason:string,sources:array<string>,num_user_days:bigint,relevance:double,filled:boolean>"
)

_LIST_COLUMNS = (
    _key("run_date", "date", "The night the list belongs to."),
    _key("run_id", "string", "Run that wrote it: date and fingerprint of inputs, settings and code."),
    _key("item_id", "string", "The trigger item."),
    _key("head", "string", "engagement, relevance, a further head of the settings, or merged."),
    _key(
        "neighbors",
        f"array<{NEIGHBOR_STRUCT}>",
        "Best first. score: of a head its own; in the merged list the calibrated probability p(j|i) as the policy moves it, of a blend "
        "plus value * relevance, so that it can be compared across triggers. reason in words: how many distinct users engaged with both at "
        "any time, on how many user-days within the window of pairs, what both share; sources that found it; num_user_days of counted "
        "co-engagement (0: none above the privacy minimum of distinct users); relevance in [-1,1]; filled: offered only to fill up the "
        "merged list.",
    ),
    _key("model_version", "string", "Checkpoint behind the scores."),
    _key("list_hash", "string", "Hash of the neighbor ids in order: unchanged lists keep it."),
    _key("contract_version", "int", "Version of this table's meaning; a change that breaks readers raises it."),
)

ITEM_NEIGHBORS_HISTORY = Table(
    name="item_neighbors_history",
    comment="Every night's lists, published or not; gates run here.",
    key=("run_date", "run_id", "item_id", "head"),
    order_by=("item_id", "head"),
    kept_on_failure=True,
    columns=_LIST_COLUMNS,
)

ITEM_NEIGHBORS = Table(
    name="item_neighbors",
    comment="The current good night: for every item the list of each head. Replaced by one commit a night.",
    key=("item_id", "head"),
    order_by=("item_id", "head"),
    columns=_LIST_COLUMNS,
)

MERGE_POLICY = Table(
    name="merge_policy",
    comment="How head lists become the merged list; data, so that it changes without training.",
    key=("scope",),
    columns=(
        _key("scope", "string", "default, a coarsest category of the trigger, or column=value of a mapped filter column, e.g. market=de."),
        _key("kind", "string", "blend, quota or rrf (reciprocal rank fusion)."),
        _key(
            "value",
            "double",
            "blend: lambda, relevance per unit of probability; quota: share of the list taken from the relevance head, in [0,1]; "
            "rrf: weight of the relevance order, in [0,1].",
        ),
        _key("popularity_exponent", "double", "Discount of popularity in the engagement score, 0 (none) to 1."),
        _col(
            "relevance_share",
            "double",
            "Share of the positions that goes to the most relevant, by relevance + log p / 80, 0 (also null, and of a quota) to 1: of 0.1 "
            "every tenth position.",
        ),
        _col(
            "new_pair_bonus",
            "double",
            "Added to log p of items that were never counted with the trigger, 0 (also null) to 10: 0.3 makes them 1.35 times as likely.",
        ),
        _col(
            "new_item_bonus",
            "double",
            "Added to log p of items with hardly any engagements yet (retrieval.new_below_user_days), 0 (also null) to 10.",
        ),
    ),
)

RUNS = Table(
    name="runs",
    comment="The ledger: one row per attempt at a stage.",
    key=("run_id", "stage", "attempt"),
    columns=(
        _key("run_id", "string", "Night: date and fingerprint."),
        _key("run_date", "date", "The run date."),
        _key("stage", "string", "Stage name."),
        _key("attempt", "int", "From 1, per run and stage."),
        _key("sequence", "bigint", "Place in the order of writing, which says what is newest: a clock may go back."),
        _key("status", "string", "succeeded or failed."),
        _key("started_at", "timestamp", "UTC."),
        _key("ended_at", "timestamp", "UTC."),
        _key("seconds", "double", "Wall time of the stage."),
        _key("input_versions", "map<string,bigint>", "Delta version of each table read."),
        _key("output_versions", "map<string,bigint>", "Delta version of each table written."),
        _key("fingerprint", "string", "Hash of sources, settings and code."),
        _key("settings_fingerprint", "string", "Hash of the settings alone: volumes are compared between nights of equal settings."),
        _key("metrics", "map<string,double>", "Numbers of the stage; gates ran on them."),
        _col("gates", "string", "Gate results as JSON."),
        _col("notes", "array<string>", "What a reader should know, e.g. catalog not point-in-time."),
        _col("error", "string", "Message of the failure."),
        _col("report", "string", "Page about the night, there once `nightly` or `backtest` has ended."),
    ),
)

EVALUATION = Table(
    name="evaluation",
    comment="How well the lists of a night met what happened since.",
    key=("run_id", "method", "head", "metric", "slice"),
    columns=(
        _key("run_id", "string", "Run whose lists were judged."),
        _key("run_date", "date", "Night of the judged lists."),
        _key("method", "string", "mtmh or a baseline."),
        _key("head", "string", "Head, or - for a baseline."),
        _key("metric", "string", "E.g. recall@100."),
        _key("slice", "string", "all, a part of the triggers or of their partners, or judge:<name>."),
        _key("value", "double", "The mean over triggers."),
        _key("low", "double", "Lower end of the 95 % bootstrap interval over triggers."),
        _key("high", "double", "Upper end."),
        _key("num_triggers", "bigint", "Triggers behind the mean."),
        _key("horizon_days", "int", "Days after the run date that were judged."),
    ),
)

CONTRACT_VERSION = 1

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        ENGAGEMENTS,
        ITEM_ANNOTATIONS,
        PAIR_RELEVANCE,
        RELEVANCE_FEEDBACK,
        REJECTED_ROWS,
        IMPRESSIONS,
        EXPOSURE_PAIRS,
        CO_ENGAGEMENT_DAILY,
        CO_ENGAGEMENT_DAYS,
        CO_ENGAGEMENT_TOTALS,
        CO_ENGAGEMENT_PAIRS,
        ITEM_POPULARITY,
        ITEM_FEATURES,
        RELEVANCE_EXAMPLES,
        ITEM_EMBEDDINGS,
        ITEM_NEIGHBORS_HISTORY,
        ITEM_NEIGHBORS,
        MERGE_POLICY,
        RUNS,
        EVALUATION,
    )
}


def table_named(name: str) -> Table:
    """The declaration behind a table's name, also where it is of a signal."""
    kind, _, signal = name.partition(_OF_SIGNAL)
    return TABLES[kind].of_signal(signal or None)


def signals_of(names: Iterable[str]) -> set[str]:
    """The signals that tables of these names are of."""
    return {signal for _, _, signal in (name.partition(_OF_SIGNAL) for name in names) if signal}


def tables_with(signals: Iterable[str]) -> list[Table]:
    """All tables, those of each signal included."""
    of_signals = [table.of_signal(signal) for signal in signals for table in TABLES.values() if table.per_signal]
    return [*TABLES.values(), *of_signals]
