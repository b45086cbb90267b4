"""How good a reward model is on held-out pairs: accuracy with its interval, buckets, length, calibration."""

import math
from dataclasses import dataclass, field

import torch

BUCKETS = 5
BINS = 10
Z95 = 1.959964


@dataclass(frozen=True)
class Quality:
    """Figures over N held-out pairs; ``accuracy_low``/``accuracy_high`` are Wilson's 95% interval.

    Attributes:
        margin: mean of r_chosen − r_rejected.
        length_correlation: Pearson's, between the score difference and the difference in response tokens.
        length_accuracy: what preferring the longer response would reach (or the shorter, where that is better).
        calibration_error: expected calibration error of σ(margin) against the labels, 10 equal bins.
        margin_buckets: accuracy by fifths of |margin|: low, high, accuracy, count.
        reliability: per bin of the predicted probability of the side that is preferred: predicted, observed, count.
    """

    pairs: int
    loss: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    margin: float
    length_correlation: float
    length_accuracy: float
    calibration_error: float
    margin_buckets: list[dict[str, float]] = field(default_factory=list)
    reliability: list[dict[str, float]] = field(default_factory=list)

    def warnings(self, ceiling: float | None = None) -> list[str]:
        """What a figure far from the healthy 70-80% suggests, in words."""
        said = []
        top = ceiling if ceiling is not None else 0.85
        if self.accuracy_low > top:
            said.append(
                f"accuracy {self.accuracy:.1%} is above {top:.0%}: look for leakage from training to held-out data, or "
                f"a shortcut (length alone reaches {self.length_accuracy:.1%})"
            )
        if self.accuracy_high < 0.6:
            said.append(
                f"accuracy {self.accuracy:.1%} is far below the 70-80% of a healthy preference model: more data, a "
                "stronger base or a higher learning rate; PPO would chase noise"
            )
        if abs(self.length_correlation) > 0.6:
            said.append(f"scores follow response length (correlation {self.length_correlation:+.2f})")
        return said


def assess(chosen: torch.Tensor, rejected: torch.Tensor, length_difference: torch.Tensor) -> Quality:
    """Scores (N,) of both sides and chosen minus rejected response length (N,) in tokens."""
    margin = chosen.double() - rejected.double()
    right = (margin > 0).double() + 0.5 * (margin == 0).double()
    low, high = wilson(right.sum().item(), len(right))
    lengths = length_difference.double()
    longer = ((lengths > 0).double() + 0.5 * (lengths == 0).double()).mean().item()
    reliability, error = _reliability(margin)
    return Quality(
        pairs=len(margin),
        loss=torch.nn.functional.softplus(-margin).mean().item(),
        accuracy=right.mean().item(),
        accuracy_low=low,
        accuracy_high=high,
        margin=margin.mean().item(),
        length_correlation=_correlation(margin, lengths),
        length_accuracy=max(longer, 1 - longer),
        calibration_error=error,
        margin_buckets=buckets(margin.abs(), right),
        reliability=reliability,
    )


def wilson(successes: float, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share (Wilson 1927)."""
    share, z2 = successes / count, Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def buckets(size: torch.Tensor, right: torch.Tensor) -> list[dict[str, float]]:
    """Accuracy by fifths of ``size`` (N,): low, high, accuracy, count. ``right`` (N,): 1 = ranked right, 0.5 a tie."""
    order = size.argsort()
    return [
        {
            "low": size[part].min().item(),
            "high": size[part].max().item(),
            "accuracy": right[part].mean().item(),
            "count": len(part),
        }
        for part in order.tensor_split(BUCKETS)
        if len(part)
    ]


def _reliability(margin: torch.Tensor) -> tuple[list[dict[str, float]], float]:
    """Each pair once, as the side that the model prefers: predicted σ(|margin|), observed: does the label agree."""
    predicted, observed = torch.sigmoid(margin.abs()), (margin > 0).double() + 0.5 * (margin == 0).double()
    bins = ((predicted - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    points, error = [], 0.0
    for index in range(BINS):
        inside = bins == index
        count = int(inside.sum())
        if count:
            mean, share = predicted[inside].mean().item(), observed[inside].mean().item()
            points.append({"predicted": mean, "observed": share, "count": count})
            error += abs(mean - share) * count / len(margin)
    return points, error


def _correlation(left: torch.Tensor, right: torch.Tensor) -> float:
    left, right = left - left.mean(), right - right.mean()
    scale = (left.norm() * right.norm()).item()
    return (left @ right).item() / scale if scale > 0 else 0.0
