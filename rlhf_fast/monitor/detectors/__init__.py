"""One function for each verdict of the monitor: the history of a run -> a finding, or None.

Each joins several metrics, since one alone misleads, and compares with where the run began and with its own noise.
A detector whose metrics are not there finds nothing.
"""

from collections.abc import Callable

from rlhf_fast.monitor.detectors.finding import Finding
from rlhf_fast.monitor.detectors.inputs import miscalibrated_reward, sampler_mismatch, truncation
from rlhf_fast.monitor.detectors.policy import kl_explosion, length_exploitation, mode_collapse, reward_hacking
from rlhf_fast.monitor.detectors.training import no_signal, not_learning, useless_critic
from rlhf_fast.monitor.history import History
from rlhf_fast.verdicts import Thresholds

DETECTORS: dict[str, Callable[[History, Thresholds], Finding | None]] = {
    detector.__name__: detector
    for detector in (
        kl_explosion,
        reward_hacking,
        mode_collapse,
        not_learning,
        useless_critic,
        miscalibrated_reward,
        sampler_mismatch,
        length_exploitation,
        no_signal,
        truncation,
    )
}

__all__ = ["DETECTORS", "Finding"]
