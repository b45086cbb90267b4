"""The recorded runs of corpus/ (made by record.py): each failure is found under its name within 20 steps of its onset,
and nothing is found in healthy runs."""

import json
from pathlib import Path

import pytest
from record import CORPUS, first_found, score

from rlhf_fast.verdicts import KINDS

RUNS = sorted(CORPUS.glob("*.json"))
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


def test_the_docs_have_the_score_of_the_second_set():
    page = (Path(__file__).parents[2] / "docs" / "debugging.md").read_text()
    assert score(CORPUS / "held_out") in page, "python tests/monitor/record.py --score"
