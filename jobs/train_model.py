"""Stage 4: torch workers train MTMH on pinned table versions; the checkpoint is kept and `item_embeddings` is written.

Workers read Delta without Spark. Each leaves a status file, which is what this job believes: TorchDistributor's return value may be any
rank's, and its exception does not carry the cause.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.ml.torch.distributor import TorchDistributor
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from conf.errors import MtmhError, TrainingError
from conf.settings import TrainingSettings
from conf.tables import (
    CO_ENGAGEMENT_DAILY,
    CO_ENGAGEMENT_PAIRS,
    ENGAGEMENTS,
    EXPOSURE_PAIRS,
    ITEM_EMBEDDINGS,
    ITEM_FEATURES,
    ITEM_POPULARITY,
    RELEVANCE_EXAMPLES,
)
from features.increments import fingerprint_days
from jobs.ledger import StageRecord
from jobs.night_words import first_line
from jobs.progress import Reading
from jobs.reader import artifacts_of
from jobs.stage import Night, StageRun, stage_main
from models.data import TableRef
from models.resume import FILE
from models.scorer import Widths
from models.spec import DISTILLATION, REHEARSAL, TrainingSpec

STAGE, _READ_BY = "train_model", "publish_neighbors"
_CARRIERS = ("gloo", "NCCL")
_LEAST_FREE = 1 << 20  # bytes; a worker that leaves no word with less has had no room for it
_GPUS_OF_A_TASK = "spark.task.resource.gpu.amount"
_INPUTS = (ENGAGEMENTS, CO_ENGAGEMENT_DAILY, CO_ENGAGEMENT_PAIRS, ITEM_POPULARITY, ITEM_FEATURES, RELEVANCE_EXAMPLES)


def train_model(run: StageRun) -> None:
    """Train, take over the vectors, gate."""
    folder = run.night.artifacts("model")
    signals = run.settings.model.signals
    inputs = [
        *_INPUTS,
        *([EXPOSURE_PAIRS] if run.settings.source.impressions else []),
        *(CO_ENGAGEMENT_PAIRS.of_signal(name) for name in signals),
    ]
    spec = TrainingSpec(
        tables={table.name: TableRef(uri=run.night.lake.path(table), version=run.version(table)) for table in inputs},
        run_date=run.run_date,
        half_life_days=run.settings.pairs.half_life_days,
        symmetric=run.settings.pairs.window.symmetric,
        min_users=run.settings.pairs.min_users_per_pair,
        folder=str(folder),
        model=run.settings.model,
        training=run.settings.training,
        widths=Widths.of(run.settings.retrieval),
        signals={name: run.settings.pairs.half_life_of(name) for name in signals},
        previous=previous_model(run),
    )
    with run.night.display.watch("training", _progress(folder)):
        distribute(spec, anew=run.force, note=run.note)
    for text in json.loads((folder / "notes.json").read_text()):
        run.note(text)
    run.replace(ITEM_EMBEDDINGS, _embeddings(run, folder))
    run.gate(_metrics(run, folder), num_items=run.read(ITEM_FEATURES).count())


def model_stands(night: Night) -> bool:
    """Whether the night's model is where its lists are made from it, unless they are made: old ones are removed, by run date."""
    if night.ledger.last_success(run_id=night.run_id, stage=_READ_BY):
        return True
    return (artifacts_of(night.settings.lake, night.run_id) / "model" / "scorer.json").is_file()


def previous_model(run: StageRun) -> str | None:
    """The model of the night before, to start from: of the same settings, not too old, and made of nothing that was deleted since."""
    oldest = run.run_date - timedelta(days=run.settings.training.warm_start_days)
    alike = run.night.ledger.records(stage=STAGE, status="succeeded", settings_fingerprint=run.settings.fingerprint())
    earlier = [record for record in alike if oldest <= record.run_date < run.run_date]
    if run.force or not earlier:
        return None
    last = max(enumerate(earlier), key=lambda found: (found[1].run_date, found[0]))[1]
    try:
        gone = _num_deleted(run, last)
    except (MtmhError, PySparkException, Py4JJavaError) as error:
        run.note(f"starts cold: what {last.run_id} was trained on cannot be read any more ({first_line(str(error))})")
        return None
    if gone:
        run.note(f"starts cold: {gone:,} engagements up to {last.run_date} that {last.run_id} was trained on have been deleted")
        return None
    folder = artifacts_of(run.settings.lake, last.run_id) / "model"
    return str(folder) if (folder / "scorer.json").is_file() else None


def _num_deleted(run: StageRun, last: StageRecord) -> int:
    """Engagements that a night was trained on and that are not there any more; only days that have changed are compared by row."""
    frames = (run.night.lake.read(ENGAGEMENTS, last.input_versions[ENGAGEMENTS.name]), run.read(ENGAGEMENTS))
    then, now = (frame.where(F.col("event_date") <= F.lit(last.run_date)) for frame in frames)
    kept = now.transform(fingerprint_days).select("event_date", "fingerprint")
    changed = then.transform(fingerprint_days).join(kept, on=["event_date", "fingerprint"], how="left_anti").select("event_date")
    return then.join(F.broadcast(changed), on="event_date", how="left_semi").join(now, on=list(ENGAGEMENTS.key), how="left_anti").count()


def launch(spec_json: str, import_paths: Sequence[str]) -> None:
    """What every torch worker runs: find our modules, then train.

    Sent by value, because a worker of torchrun knows neither the driver's `sys.path` nor the zip of `--py-files`.
    """
    import glob
    import sys

    sys.path[:0] = [*glob.glob("*.zip"), *import_paths]
    from models.train import run_rank

    run_rank(spec_json)


def distribute(spec: TrainingSpec, *, anew: bool, note: Callable[[str], None]) -> None:
    """Train on all workers; when one is killed, go on from the saved state, as often as the settings say.

    Args:
        spec: of the training.
        anew: do not go on from what an earlier attempt has left.
        note: told of a restart.

    Raises:
        TrainingError: a worker failed, or was killed too often.
    """
    folder, training = Path(spec.folder), spec.training
    if anew:
        (folder / FILE).unlink(missing_ok=True)
    for restarts in range(training.max_restarts, -1, -1):
        failure = _attempt(spec)
        if failure is None:
            (folder / FILE).unlink(missing_ok=True)
            return
        if not restarts or not _was_killed(folder, training.num_processes):
            raise TrainingError(failure)
        note(f"{failure.splitlines()[0]}; training goes on from its saved state")


def _attempt(spec: TrainingSpec) -> str | None:
    """One start of all workers; what went wrong, None for nothing."""
    folder, training = Path(spec.folder), spec.training
    for stale in folder.glob("status/rank-*.json"):
        stale.unlink()
    given = _spark_gives_gpus(training)
    distributor = TorchDistributor(num_processes=training.num_processes, local_mode=training.local_mode, use_gpu=given)
    launch.__module__ = "__main__"  # cloudpickle then sends the function by value
    paths = [path for path in (os.path.abspath(path) for path in sys.path) if _holds_models(path)]
    try:
        distributor.run(launch, spec.to_json(), paths)
    except Exception as error:
        return _failure(folder, training.num_processes) or f"training failed: {str(error)[:2000]}"
    return _failure(folder, training.num_processes)


def _spark_gives_gpus(training: TrainingSettings) -> bool:
    """Whether each worker is a Spark task with a GPU of its own; on the driver's machine workers see for themselves what is there.

    TorchDistributor hides all GPUs from tasks that have been given none, and knows no share of one and no more than one.

    Raises:
        TrainingError: training.device is cuda, and tasks do not have one each.
    """
    session = SparkSession.getActiveSession()
    if training.local_mode or training.device == "cpu" or session is None:
        return False
    amount = session.conf.get(_GPUS_OF_A_TASK, "0")
    if amount != "1" and training.device == "cuda":
        raise TrainingError(
            f"training.device is cuda and training.local_mode false; found {_GPUS_OF_A_TASK} {amount}, wanted 1: set it, with "
            "spark.executor.resource.gpu.amount and its discoveryScript, or set training.device to auto"
        )
    return amount == "1"


def _was_killed(folder: Path, num_processes: int) -> bool:
    """Whether a worker left no word, and the others said nothing but that it was gone (an error of what carries the messages)."""
    files = [folder / "status" / f"rank-{rank}.json" for rank in range(num_processes)]
    said = [json.loads(file.read_text()) for file in files if file.is_file()]
    return (
        len(said) < num_processes
        and not _is_full(folder)
        and all(content["ok"] or any(word in content["error"] for word in _CARRIERS) for content in said)
    )


def _holds_models(path: str) -> bool:
    return path.endswith(".zip") or os.path.isfile(os.path.join(path, "models", "train.py"))


def _failure(folder: Path, num_processes: int) -> str | None:
    """The first failed rank's traceback, or which ranks left no word."""
    missing = []
    for rank in range(num_processes):
        status = folder / "status" / f"rank-{rank}.json"
        if not status.is_file():
            missing.append(rank)
            continue
        content = json.loads(status.read_text())
        if not content["ok"]:
            return f"training rank {rank} of {num_processes} failed:\n{content['error']}"
    if not missing:
        return None
    why = f"No space left on device, at {folder}" if _is_full(folder) else "killed, or out of memory?"
    return f"training ranks {missing} of {num_processes} ended without a status: {why}"


def _is_full(folder: Path) -> bool:
    return shutil.disk_usage(folder).free < _LEAST_FREE


def _progress(folder: Path) -> Callable[[], Reading | None]:
    path = folder / "progress.json"

    def read() -> Reading | None:
        try:
            content = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError):  # not there yet, or being written
            return None
        if content["phase"] == "calibration":  # how many settings will be tried depends on what they reach
            return content["done"], 0, "settings of the calibration tried"
        if content["phase"] == DISTILLATION:
            return content["done"], 0, "items whose expected partners were put into vectors"
        steps = "training steps beside which the scorer will be fitted" if content["phase"] == REHEARSAL else "training steps"
        return content["done"], content["total"], steps

    return read


def _embeddings(run: StageRun, folder: Path) -> DataFrame:
    version = json.loads((folder / "checkpoint" / "model.json").read_text())["model_version"]
    vectors = run.night.spark.read.parquet(str(folder / "embeddings"))
    return vectors.select("*", F.lit(version).alias("model_version"), F.lit(run.run_date).alias("as_of"))


def _metrics(run: StageRun, folder: Path) -> Mapping[str, float]:
    metrics: dict[str, float] = dict(json.loads((folder / "metrics.json").read_text()))
    bad = F.exists("trigger_vector", _not_finite) | F.exists("target_vector", _not_finite)
    repeated = (F.count("*") - F.count_distinct("item_id")).alias("repeated")
    rows = run.read_output(ITEM_EMBEDDINGS).groupBy("head").agg(F.count("*").alias("n"), F.count_if(bad).alias("bad"), repeated).collect()
    counts = {f"{row['head']}_num_vectors": float(row["n"]) for row in rows}
    num_repeated, num_bad = (float(sum(row[name] for row in rows)) for name in ("repeated", "bad"))
    return metrics | counts | {"num_nonfinite": num_bad, "num_duplicate_keys": num_repeated}


def _not_finite(value: Column) -> Column:
    return value.isNull() | F.isnan(value) | (F.abs(value) == float("inf"))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage alone."""
    stage_main(STAGE, train_model, description="train the encoder and its heads", stands=model_stands, argv=argv)


if __name__ == "__main__":
    main()
