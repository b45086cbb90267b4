"""The recorded runs of corpus/ (made by record.py): each failure is found under its name within 20 steps of its onset,
and nothing is found in healthy runs."""

import json
from pathlib import Path

import pytest
from record import first_found

from rlhf_fast.verdicts import KINDS

RUNS = sorted((Path(__file__).parent / "corpus").glob("*.json"))
LATEST = 20  # steps after the onset


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_recorded_run(path):
    run = json.loads(path.read_text())
    found = first_found(run)
    if run["verdict"]:
        assert found.get(run["verdict"], 10**9) <= run["onset"] + LATEST, found
    else:
        assert found == {}


def test_the_corpus_has_three_runs_of_each_verdict_and_thirty_in_all():
    verdicts = [json.loads(path.read_text())["verdict"] for path in RUNS]
    assert all(verdicts.count(name) >= 3 for name in [*KINDS, ""]), verdicts
    assert len(verdicts) >= 30
