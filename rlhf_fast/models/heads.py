"""The scalar head of the reward model and of the critic."""

import torch
from torch import nn


class ScoreHead(nn.Module):
    """Maps each hidden state to a calibrated score: (w·h − mean) / std.

    ``weight`` is (1, H) float32, like the ``score`` layer of transformers' sequence classifiers. It is initialised with
    standard deviation 1/√(H+1) (lm-human-preferences; N+ Implementation Details of RLHF with PPO). ``mean`` and ``std``
    are the calibration constants, 0 and 1 until ``calibrate`` is called.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden_size).normal_(std=(hidden_size + 1) ** -0.5))
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., H) of any float dtype -> (...) float32."""
        return ((hidden.float() @ self.weight[0]) - self.mean) / self.std

    def calibrate(self, mean: float, std: float) -> None:
        """Sets the calibration constants, so that scores with this mean and std become scores with mean 0 and std 1."""
        self.mean.fill_(mean)
        self.std.fill_(std)

    @torch.no_grad()
    def refit(self, slope: float, shift: float) -> None:
        """Changes weight and mean so that a score s becomes slope * s + shift."""
        self.weight.mul_(slope)
        self.mean.mul_(slope).sub_(shift * self.std)
