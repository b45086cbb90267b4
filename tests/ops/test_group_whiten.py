"""Whitening of groups of rows, against masked_whiten of each group alone."""

import pytest
import torch
from devices import seeded

from rlhf_fast.ops import group_whiten, masked_whiten


@pytest.mark.parametrize("options", [{}, {"shift_mean": False}, {"unbiased": False}], ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_each_group_is_whitened_alone(options: dict[str, bool], masked: bool) -> None:
    x = 3 + torch.randn(5, 6, generator=seeded(0))
    mask = torch.rand(5, 6, generator=seeded(1)) < 0.7
    mask[4] = False
    groups = torch.tensor([7, 3, 7, 9, 3])
    found = group_whiten(x, groups, mask if masked else None, **options)
    for group in (3, 7, 9):
        rows = groups == group
        alone = masked_whiten(x[rows], mask[rows] if masked else None, **options)
        torch.testing.assert_close(found[rows], alone, rtol=1e-5, atol=1e-5)


def test_a_size_and_what_is_not_read() -> None:
    x = torch.tensor([[1.0, 3.0, torch.nan], [5.0, 7.0, 4.0], [2.0, 2.0, 2.0], [9.0, torch.nan, torch.nan]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]])
    pairs, rows = group_whiten(x, 2, mask), group_whiten(x.requires_grad_(), 1, mask)
    torch.testing.assert_close(pairs, group_whiten(x, torch.tensor([0, 0, 1, 1]), mask))
    half = 0.5**0.5
    torch.testing.assert_close(rows[0], torch.tensor([-half, half, 0]))
    assert rows[2].tolist() == rows[3].tolist() == [0, 0, 0] and not rows.requires_grad


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"group_whiten: x must have shape \(B, T\); got \(3,\)"):
        group_whiten(torch.zeros(3), 1)
    with pytest.raises(ValueError, match="groups must be .* a size that divides N = 3; got 2"):
        group_whiten(torch.zeros(3, 2), 2)
    with pytest.raises(ValueError, match=r"groups must have shape \(3,\)"):
        group_whiten(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long))
