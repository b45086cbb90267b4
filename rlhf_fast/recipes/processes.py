"""The processes that run a stage together: how a batch is split among them, and sums over all of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object

Item = TypeVar("Item")


class Processes:
    """This process and its communication with the others of ``accelerator``.

    Attributes:
        main: True in process 0, the only one that writes files.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.main = accelerator.is_main_process

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's share of a batch."""
        return list(items[self.accelerator.process_index :: self.accelerator.num_processes])

    def gather(self, values: Sequence[Any]) -> list[Any]:
        """The values of all processes, in the order of the items before ``share``."""
        if self.accelerator.num_processes == 1:
            return list(values)
        shares = gather_object([list(values)])
        longest = max(len(share) for share in shares)
        return [share[i] for i in range(longest) for share in shares if i < len(share)]

    def sum(self, values: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """0-dim tensors summed over all processes by one all-reduce, as numbers."""
        stacked = self.accelerator.reduce(torch.stack([value.double() for value in values.values()]), reduction="sum")
        return dict(zip(values, stacked.tolist(), strict=True))

    @property
    def group(self) -> torch.distributed.ProcessGroup | None:
        """All processes, for statistics over the whole batch; None if there is only one."""
        return torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None

    def begin_alike(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Gives every process the parameters of process 0."""
        for parameter in parameters:
            parameter.data.copy_(broadcast(parameter.data))

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sums the gradients over all processes; a parameter without a gradient counts as 0."""
        if self.accelerator.num_processes == 1:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = self.accelerator.reduce(torch.cat([g.reshape(-1) for g in gradients]), reduction="sum")
        pieces = flat.split([g.numel() for g in gradients])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)

    def on_main_first(self, find: Callable[[], Item]) -> Item | None:
        """Calls ``find`` in process 0 only, and returns its result in every process."""
        found = [find() if self.main else None]
        return gather_object(found)[0] if self.accelerator.num_processes > 1 else found[0]
