"""`make ablate CONFIG=ifdb_games`: what each part of the model is worth, on the validation slice of a backtest.

Every variant is a few settings, none a code path. All train on the same pairs, features and draws as the default, with each seed, and are
judged on the same triggers: a trigger's value is the mean over seeds, a difference is paired over triggers. Nothing is tuned on what comes
out, and the last slice is not read.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from conf.errors import SettingsError
from conf.settings import Settings, load_settings
from jobs.arguments import add_config, report_errors
from jobs.backtest import Backtest, backtest_settings
from jobs.backtest_report import REPORTS
from jobs.backtest_results import ENCODER, VALIDATION
from jobs.demo_source import lay_source
from jobs.exam import CutData, read_cut
from jobs.judge_cut import Opened, head_lists
from jobs.progress import Display
from jobs.session import start_session
from jobs.stage import StageRun, run_stage
from jobs.train_model import train_model
from jobs.turns import turn
from models import metrics
from models.metrics import Estimate, Values
from models.scoreboard import Key, measure

DEFAULT = "default"
VARIANTS: Mapping[str, Sequence[str]] = {
    DEFAULT: (),
    "an encoder for each head": ("model.encoder=separate",),
    "one head for both goals": (
        "model.heads={engagement: {engagement: 1, relevance: 1, affinity: 2}, relevance: {engagement: 1, relevance: 1, affinity: 2}}",
    ),
    "no relevance loss": ("model.heads.engagement={engagement: 1, relevance: 0}", "model.heads.relevance={relevance: 0, affinity: 2}"),
    "no affinity loss": ("model.heads.relevance={relevance: 1, affinity: 0}",),
    "no relevance in the engagement head": ("model.heads.engagement={engagement: 1, relevance: 0}",),
    "no content on the engagement head's triggers": ("model.content_sides=[target]",),
    "no content on the engagement head's targets": ("model.content_sides=[trigger]",),
    "no content in the engagement head": ("model.content_sides=[]",),
    "no id dropout": ("model.id_dropout=0",),
    "in-batch negatives": ("training.in_batch_negatives=true",),
    "no training steps": ("training.num_steps=0",),
}
"""Settings of each variant, beside those of the configuration."""

_HEADS = ("merged", "engagement", "relevance", ENCODER)
_SLICES = ("all", "new_pairs", "cold_triggers", "cold_targets", *(f"trigger_decile_{number}" for number in (1, 5, 10)))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A variant: per head and measure its (T,) values, means over seeds; seconds of a training, mean over seeds."""

    values: Mapping[tuple[str, Key], Values]
    seconds: float


def ablate(backtest: Backtest, variants: Mapping[str, Settings], seeds: Sequence[int]) -> Iterator[tuple[str, Measured]]:
    """Train and judge every variant with every seed on the first validation cut, one after the other.

    Args:
        backtest: of the configuration; its pairs and features are what all variants train on.
        variants: settings by name, of the same lake.
        seeds: of training.
    """
    cut, until = backtest.cuts()[0]
    base = backtest.trained_cold(cut)
    data = read_cut(StageRun(night=base, stage=VALIDATION), until=until)
    for name, settings in variants.items():
        backtest.display.say(f"[bold]{name}[/bold]")
        runs = [_measured(backtest, settings, seed, cut, data) for seed in seeds]
        keys = runs[0][0].keys()
        values = {key: np.mean([run[key] for run, _ in runs], axis=0) for key in keys}
        yield name, Measured(values=values, seconds=float(np.mean([seconds for _, seconds in runs])))


def _measured(backtest: Backtest, settings: Settings, seed: int, cut: date, data: CutData) -> tuple[dict[tuple[str, Key], Values], float]:
    training = settings.training.model_copy(update={"seed": seed, "warm_start_days": 0})
    night = backtest.with_settings(settings.model_copy(update={"training": training})).night(cut)
    night = replace(night, accept="an ablation may be as bad as it is")
    record = run_stage(night, "train_model", train_model)
    run = StageRun(night=night, stage=VALIDATION)
    lists = head_lists(run, Opened.of(run, data))
    values: dict[tuple[str, Key], Values] = {}
    for head in _HEADS:
        scored = measure(lists[head], data.exam).values
        values |= {(head, key): scored[key] for key in _keys(data)}
    return values, sum(float(record.metrics.get(f"{part}_seconds", 0.0)) for part in ("calibration", "rehearsal", "training"))


def _keys(data: CutData) -> list[Key]:
    return [("debiased_recall@100", "all"), data.exam.relevance_metric, *(("recall@100", part) for part in _SLICES)]


def differences(found: Mapping[str, Measured], *, num_resamples: int, seed: int) -> list[dict[str, Any]]:
    """A row a variant, head and measure: the mean, and its paired difference from the default with its 95 % interval."""
    rows = []
    for name, measured in found.items():
        for (head, (metric, part)), values in measured.values.items():
            known = values[~np.isnan(values)]
            row = {"variant": name, "head": head, "metric": metric, "slice": part, "value": float(known.mean()) if len(known) else None}
            if name != DEFAULT and len(known):
                base = found[DEFAULT].values[head, (metric, part)]
                gained: Estimate = metrics.paired_difference(values, base, num_resamples=num_resamples, seed=seed)
                row |= {"difference": gained.value, "low": gained.low, "high": gained.high}
            rows.append(row | {"training_seconds": measured.seconds})
    return rows


def show(rows: Sequence[Mapping[str, Any]], relevance: str, console: Console) -> None:
    """A table a head: every variant against the default."""
    columns = [("recall@100", "all"), ("debiased_recall@100", "all"), (relevance, "all"), ("recall@100", "cold_triggers"),
               ("recall@100", "cold_targets"), ("recall@100", "new_pairs")]  # fmt: skip
    for head in _HEADS:
        table = RichTable("variant", *(metric if part == "all" else f"{metric}, {part.replace('_', ' ')}" for metric, part in columns),
                          title=f"list: {head} (difference from the default, 95 % interval)")  # fmt: skip
        for name in dict.fromkeys(row["variant"] for row in rows):
            mine = {(row["metric"], row["slice"]): row for row in rows if (row["variant"], row["head"]) == (name, head)}
            table.add_row(name, *(_cell(mine[key]) for key in columns))
        console.print(table)


def _cell(row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return "-"
    if "difference" not in row:
        return f"{row['value']:.4f}"
    return f"{row['value']:.4f}\n{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the variants, print their tables, write `var/backtest/<config>-ablations.json`."""
    parser = argparse.ArgumentParser(description="what each part of the model is worth")
    add_config(parser, default="demo")
    parser.add_argument("--seeds", nargs="+", type=int, default=[17, 18, 19], help="of training")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), help=f"some of {', '.join(map(repr, VARIANTS))}")

    def run() -> None:
        values = parser.parse_args(argv)
        if unknown := set(values.variants) - set(VARIANTS):
            raise SettingsError(f"found --variants {sorted(unknown)}, wanted some of {list(VARIANTS)}")
        names = list(dict.fromkeys([DEFAULT, *values.variants]))
        variants = {name: backtest_settings(load_settings(values.config, [*values.set, *VARIANTS[name]])) for name in names}
        settings, console = variants[DEFAULT], Console(width=200)
        if settings.name == "demo":
            lay_source(Path(settings.source.events.path).parent)
        spark = start_session(settings.spark, app_name=f"mtmh ablate {settings.name}")
        backtest = Backtest(settings=settings, spark=spark, display=Display(), now=datetime.now(UTC))
        share = settings.source.user_share
        REPORTS.mkdir(parents=True, exist_ok=True)
        path = REPORTS / f"{settings.name}{'' if share == 1 else f'-{share:g}-of-users'}-ablations.json"
        found, rows = dict[str, Measured](), list[dict[str, Any]]()
        with turn(settings.lake, "ablations"):
            for name, measured in ablate(backtest, variants, values.seeds):
                found[name] = measured
                rows = differences(found, num_resamples=settings.evaluation.num_bootstrap, seed=settings.training.seed)
                path.write_text(json.dumps(rows, indent=1))  # each variant takes minutes; what is measured stays, whatever comes
        show(rows, next(row["metric"] for row in rows if "relevance" in row["metric"]), console)
        for name, measured in found.items():
            console.print(f"{name}: a training takes {measured.seconds:.0f} s", highlight=False)

    report_errors(run)


if __name__ == "__main__":
    main()
