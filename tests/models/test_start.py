"""Where a training starts: what the scorer is fitted on."""

import dataclasses
from pathlib import Path

from conf.settings import HeadSettings, RetrievalSettings
from models.data import TrainingData, sparse_rows
from models.scorer import Widths
from models.spec import TrainingSpec
from models.train import train
from models.workers import Workers
from tests.models.small_world import make_spec


def fitted(data: TrainingData, spec: TrainingSpec) -> bytes:
    train(data, spec, Workers())
    return (Path(spec.folder) / "scorer.json").read_bytes()


def test_the_scorer_is_fitted_beside_a_trained_encoder_that_knows_nothing_of_the_holdout(data: TrainingData, tmp_path: Path) -> None:
    known = fitted(data, make_spec(tmp_path / "known"))
    assert fitted(data, make_spec(tmp_path / "untrained", num_steps=0)) != known
    ignored = sparse_rows([0], [9], [500.0], (data.num_items, data.num_items))
    for name, other in {
        "full": dataclasses.replace(data, full=data.fit),
        "exposures": dataclasses.replace(data, exposures=ignored),
    }.items():
        assert fitted(other, make_spec(tmp_path / name)) == known, name


def test_what_a_head_learns_of_a_signal_it_learns_of_all_engagement_before_the_holdout(data: TrainingData, tmp_path: Path) -> None:
    plain = make_spec(tmp_path)
    found = []
    for name, head in {"signal": HeadSettings(signals={"buy": 0.5}), "engagement": HeadSettings(engagement=0.5)}.items():
        model = plain.model.model_copy(update={"heads": plain.model.heads | {"buy": head}})
        signals = {"buy": data.full.pairs} if head.signals else {}
        spec = dataclasses.replace(plain, model=model, signals=dict.fromkeys(signals, 30.0), folder=str(tmp_path / name))
        found.append(fitted(dataclasses.replace(data, signals=signals), spec))
    assert found[0] == found[1]


def test_the_scorer_is_fitted_on_as_many_candidates_as_lists_are_made_from(data: TrainingData, tmp_path: Path) -> None:
    numbers = {"counts": 1, "users": 2, "head": 3, "content": 4, "popular": 5}
    few = Widths.of(RetrievalSettings(list_length=9, **{f"num_candidates_{source}": number for source, number in numbers.items()}))
    assert few == Widths(**numbers | {"head": 9}), "a head looks for a whole list"
    known = fitted(data, make_spec(tmp_path / "known"))
    assert fitted(data, dataclasses.replace(make_spec(tmp_path / "few"), widths=few)) != known
