"""The report's scores are the monitor's metrics."""

from __future__ import annotations

import pytest

from lightning_robust.results import load_study, metrics, read_records
from lightning_robust.results.study import scores
from tests.results.synthetic import write_run


@pytest.mark.parametrize(
    "adversarial", [["attack/a", "attack/b", "attack/embedding_pgd"], ["adversarial/x", "adversarial/y"]]
)
def test_scores_are_the_logged_metrics(adversarial, tmp_path):
    levels = {"clean/clean": 0.8, "ood/one": 0.7, "ood/two": 0.5, **dict.fromkeys(adversarial, 0.6)}
    write_run(tmp_path / "run", "run", [levels], num_items=60)
    (run,) = load_study(tmp_path / "run").runs
    logged = metrics(read_records(tmp_path / "run"))
    found = {f"{name}/accuracy": score.accuracy for name, score in scores(run.evaluations[-1]).items()}
    assert len(found) == 3
    assert found == pytest.approx({key: logged[key] for key in found})
