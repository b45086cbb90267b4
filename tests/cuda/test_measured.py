"""`make gpu` ends with what it measured beside what docs/roofline.md predicts."""

from typing import Any

import pytest
from measured import beside, predictions


def results(gpu: str, op: str, **rates: float) -> dict[str, Any]:
    names = {"ours": "rlhf-fast", "copy": "a plain copy"}
    contestants = {names[name]: {"gb_per_s": rate} for name, rate in rates.items()}
    return {"gpu": {"name": gpu}, "rows": [{"op": op, "name": f"{op}, a size", "contestants": contestants}]}


def test_a_measurement_stands_beside_its_prediction() -> None:
    kernels = predictions("NVIDIA H200")["ppo_loss"]
    (low, limit), (high, _) = min(kernels), max(kernels)
    for op in ("ppo_loss", "clipped_policy_loss"):
        where, line = beside(results("NVIDIA H200", op, ours=1500, copy=3000))
        assert where == "NVIDIA H200: share of a plain copy's speed"
        assert line.startswith(f"{op}, a size ") and "measured   50%" in line
        assert line.endswith(f"predicted {low:4.0%} ({limit}) to {high:4.0%}")


def test_every_gpu_of_the_page_has_predictions() -> None:
    for gpu in ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA B200"):
        assert {"masked_logprobs", "token_kl", "ppo_loss"} <= set(predictions(gpu)), gpu


@pytest.mark.parametrize("rates", [{"ours": 5.0}, {}])
def test_what_has_no_copy_beside_it_is_left_out(rates: dict[str, float]) -> None:
    found = results("RTX", "linear_logprobs", **rates)
    found["rows"][0]["contestants"].setdefault("rlhf-fast", {"gflop_per_s": 1.0})
    assert beside(found) == ["RTX: share of a plain copy's speed; no prediction for this GPU"]
