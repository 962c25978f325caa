"""`make bench-train`: how fast the encoder learns, how much of the machine's arithmetic that is, and where the rest goes.

The events are click logs of jobs.bench_worlds, counted with scipy: no Spark is needed. An *example* is one trigger of one step, against all
its candidates. Peers see the same events: gensim's word2vec (skip-gram, one vector an item) and implicit's ALS, at their own defaults, on
as many threads. The ratio is of the seconds of a whole training at default settings: a factorization and its steps twice, as the scorer is
fitted beside an encoder of the history before the holdout; calibration and scorer, of which peers have nothing, are not in it. Every size
runs in a process of its own; rows are kept in `var/bench/train.json`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from rich.table import Table as RichTable
from scipy.sparse import csr_array
from torch.utils.flop_counter import FlopCounterMode

from conf.errors import MachineError
from conf.settings import ModelSettings, RetrievalSettings, TrainingSettings, base_content
from jobs.arguments import report_errors
from jobs.bench_rows import FOLDER, keep_row, kept_rows
from jobs.bench_worlds import click_log
from models.batches import Batches
from models.data import TRENDS, Examples, History, Ints, TrainingData, sparse_rows
from models.draws import item_keys
from models.external import als_vectors, item2vec_vectors
from models.factorization import ScoreWeights, factorize
from models.fine_tuning import backward, make_batches
from models.mtmh import Mtmh
from models.resume import Optimization
from models.scorer import Widths
from models.spec import TrainingSpec
from models.start import build_model
from models.workers import Workers

Json = dict[str, Any]
SIZES = (0.25, 1.0, 4.0)
"""Millions of clicks: sixteen times from the first to the last."""
_PATH = FOLDER / "train.json"
_NUM_ITEMS = 50_000  # of all sizes: what is known of the catalog grows, not the catalog
_CONTENT = 128
_NUM_MEASURED = 12  # steps, after one to warm up
_SQUARE = 2048  # of the matrices whose product is the machine's rate
_EPOCHS, _WINDOW, _ITERATIONS = 5, 5, 15  # defaults of gensim and of implicit
_TRAININGS = 2  # before the holdout, beside which the scorer is fitted, and of everything


@dataclass(frozen=True, kw_only=True)
class World:
    """A click log as training reads it, as (U, N) of users and as sequences of item indices, one a session."""

    data: TrainingData
    sessions: list[list[int]]
    num_events: int


def make_world(millions: float, *, num_items: int = _NUM_ITEMS) -> World:
    """Pairs are of sessions, symmetric, of at least two users, as in the demo; items beyond the catalog's size are folded into it."""
    table = click_log(int(millions * 1_000_000))
    user, session, item = (_numbers(table[name].dictionary_encode().combine_chunks()) for name in ("user_id", "session_id", "item_id"))
    item = item % num_items
    baskets = sparse_rows(session, item, np.ones(len(item)), (int(session.max()) + 1, num_items))
    users = sparse_rows(user, item, np.ones(len(item)), (int(user.max()) + 1, num_items))
    for matrix in (baskets, users):
        matrix.data[:] = 1
    pairs = csr_array(baskets.T @ baskets).tocsr()
    pairs.setdiag(0)
    pairs.data[pairs.data < 2] = 0
    pairs.eliminate_zeros()
    pairs.sort_indices()
    popularity = np.bincount(item, minlength=num_items).astype(np.float32)
    rng = np.random.default_rng(0)
    content = rng.standard_normal((num_items, _CONTENT), np.float32)
    ids, trends = np.arange(num_items).astype(np.str_).astype(np.object_), np.zeros((num_items, len(TRENDS)), np.float32)
    history = History(pairs=pairs, user_items=users, popularity=popularity, trends=trends, keys=item_keys(ids.tolist()))
    trigger = np.repeat(np.arange(num_items, dtype=np.int32), 20)
    data = TrainingData(
        item_ids=ids,
        content=content / np.linalg.norm(content, axis=1, keepdims=True),
        full=history,
        fit=history,
        holdout=sparse_rows([], [], [], (num_items, num_items)),
        eligible=np.ones(num_items, np.bool_),
        examples=Examples(
            trigger=trigger,
            other=rng.integers(0, num_items, len(trigger)).astype(np.int32),
            target=rng.random(len(trigger), np.float32),
        ),
    )
    bounds = np.flatnonzero(np.diff(session, prepend=-1, append=-1))
    return World(data=data, sessions=[item[a:b].tolist() for a, b in pairwise(bounds)], num_events=len(item))


def _numbers(column: Any) -> Ints:
    return np.asarray(column.indices.to_numpy(), dtype=np.int32)


def _spec() -> TrainingSpec:
    """The defaults of every configuration."""
    return TrainingSpec(
        tables={},
        run_date=date(2024, 3, 30),
        half_life_days=60,
        symmetric=True,
        min_users=2,
        folder="",
        model=ModelSettings.model_validate(base_content()["model"]),
        training=TrainingSettings(),
        widths=Widths.of(RetrievalSettings()),
    )


@dataclass(kw_only=True)
class Spent:
    """Seconds of the parts of a step, or of some."""

    data: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        """Of all parts."""
        return self.data + self.forward + self.backward + self.optimizer

    def __str__(self) -> str:
        parts = {name: value / max(self.total, 1e-12) for name, value in vars(self).items()}
        return ", ".join(f"{name} {share:.0%}" for name, share in parts.items())


def time_steps(batches: Batches, model: Mtmh, settings: TrainingSettings, num_steps: int) -> Iterator[Spent]:
    """Where the time of each of the first steps goes; what `backward` does outside of autograd's own is forward."""
    work = Optimization(model, learning_rate=settings.learning_rate, num_steps=settings.num_steps)
    plain = torch.autograd.backward

    def timed(*given: Any, **named: Any) -> None:
        begin = time.perf_counter()
        plain(*given, **named)
        spent.backward += time.perf_counter() - begin

    with patch.object(torch.autograd, "backward", timed):
        for step in range(num_steps):
            spent, marks = Spent(), [time.perf_counter()]
            batch = batches.batch(step)
            marks.append(time.perf_counter())
            work.clear()
            said = backward(model, batch, Workers(), affinity_weight=settings.affinity_weight, compare=False)
            marks.append(time.perf_counter())
            work.step(Workers().add_up(model, said))
            marks.append(time.perf_counter())
            of_data, of_both, of_optimizer = np.diff(marks).tolist()
            spent.data, spent.forward, spent.optimizer = of_data, of_both - spent.backward, of_optimizer
            yield spent


def measure(millions: float, *, num_threads: int, num_items: int = _NUM_ITEMS, num_measured: int = _NUM_MEASURED) -> Iterator[Json]:
    """The rows of one size: ours, and the peers."""
    torch.set_num_threads(num_threads)
    world = make_world(millions, num_items=num_items)
    row = {"work": f"training, 128-d, full defaults, {num_items:,} items", "size": world.num_events}
    rate = matrix_rate()
    yield row | _ours(world, rate, num_measured)
    seconds = _time(lambda: als_vectors(world.data.full.user_items, factors=128, seed=0, num_threads=num_threads))
    cells = world.data.full.user_items.nnz * _ITERATIONS / seconds
    yield row | _single(seconds) | {"method": "implicit ALS", "note": f"{cells:,.0f} cells/s over {_ITERATIONS} iterations"}
    given: Json = {"dimension": 128, "window": _WINDOW, "num_epochs": 1, "seed": 0, "num_threads": num_threads}
    seconds = _time(lambda: item2vec_vectors(world.sessions, num_items=num_items, **given))
    note = f"{world.num_events / seconds:,.0f} words/s; reckoned for {_EPOCHS} epochs from one"
    yield row | _single(_EPOCHS * seconds) | {"method": "gensim word2vec", "note": note}


def matrix_rate() -> float:
    """FLOP/s of the product of two large matrices, the best of five."""
    a, b = torch.randn(_SQUARE, _SQUARE), torch.randn(_SQUARE, _SQUARE)
    return 2 * _SQUARE**3 / min(_time(lambda: torch.mm(a, b)) for _ in range(5))


def _ours(world: World, rate: float, num_measured: int) -> Json:
    spec, data = _spec(), world.data
    settings = spec.training
    weights = ScoreWeights(
        user_level_weight=spec.model.user_level_weight,
        dimension=spec.model.dimension,
        target_norm_exponent=spec.model.target_norm_exponent,
        popularity_weight=spec.model.popularity_weight,
        temperature=3.0,
        prior_users=1.0,
    )
    begin = time.perf_counter()
    start = factorize(data.full, data.content, weights=weights, seed=settings.seed)
    factorized = time.perf_counter() - begin
    model = build_model(start, data.content, spec.model, 0.5, seed=settings.seed)
    batches = make_batches(data, spec, Workers(), user_level_weight=weights.user_level_weight)
    with FlopCounterMode(display=False) as counter:
        backward(model, batches.batch(0), Workers(), affinity_weight=1.0, compare=False)
    _, *runs = time_steps(batches, model, settings, num_measured + 1)  # the first one lays out the optimizer's state
    step = statistics.median(run.total for run in runs)
    whole = Spent(**{name: sum(getattr(run, name) for run in runs) for name in vars(runs[0])})
    share = counter.get_total_flops() / step / rate
    each, steps = 1e3 * step / batches.batch_size, settings.num_steps
    seconds = [
        _TRAININGS * (factorized + steps * found) for found in (step, min(run.total for run in runs), max(run.total for run in runs))
    ]
    note = f"{1e3 / each:,.0f} examples/s, {each:.2f} ms each; {share:.0%} of {rate / 1e9:.0f} GFLOP/s; {whole}; "
    note += f"factorization {factorized:.1f} s; {data.full.pairs.nnz:,} pairs"
    times = dict(zip(("median_s", "min_s", "max_s"), seconds, strict=True))
    return times | {"runs": len(runs), "method": "mtmh", "note": note, "ms_per_example": each}


def _time(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _single(seconds: float) -> Json:
    return dict.fromkeys(("median_s", "min_s", "max_s"), seconds) | {"runs": 1}


# --- running ---


def _run(millions: float, num_items: int) -> list[Json]:
    """The rows of one size, measured in a process of its own; memory is its most so far, ours first."""
    command = [sys.executable, "-m", "jobs.bench_train", "--one", str(millions), "--items", str(num_items)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603 - our own command
    if done.returncode:
        raise MachineError(f"the benchmark of {millions} million clicks failed with status {done.returncode}; see above")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def show(console: Console, rows: Sequence[Json]) -> None:
    """The table, ratios to ours at the same size."""
    table = RichTable("work", "clicks", "method", "seconds", "ratio", "peak MB", "note", title="training", title_justify="left")
    ours = {(row["work"], row["size"]): row["median_s"] for row in rows if row["method"] == "mtmh"}
    for row in sorted(rows, key=lambda row: (row["work"], row["size"], row["method"] != "mtmh")):
        mine = ours.get((row["work"], row["size"]))
        ratio = "-" if mine is None else f"{row['median_s'] / mine:.2f}"
        shown = [f"{row['median_s']:.1f}", ratio, f"{row['peak_rss_mb']:,.0f}", row["note"]]
        table.add_row(row["work"], f"{row['size']:,}", row["method"], *shown)
    console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all sizes, print the table, write the numbers."""

    def run() -> None:
        parser = argparse.ArgumentParser(description="the benchmark of training")
        parser.add_argument("--sizes", nargs="*", type=float, default=list(SIZES), help="millions of clicks")
        parser.add_argument("--items", type=int, default=_NUM_ITEMS, help="of the catalog")
        parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
        values = parser.parse_args(argv)
        if values.one:
            for row in measure(values.one, num_threads=len(os.sched_getaffinity(0)), num_items=values.items):
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                print(json.dumps(row | {"peak_rss_mb": round(peak, 1)}), flush=True)
            return
        for millions in values.sizes:
            for row in _run(millions, values.items):
                keep_row(row, _PATH)
        show(Console(), kept_rows(_PATH))

    report_errors(run)


if __name__ == "__main__":
    main()
