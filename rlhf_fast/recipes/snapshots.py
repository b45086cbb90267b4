"""The state of a stage in training: taken in memory before each step, written to and restored from checkpoint-N/."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from rlhf_fast import checkpoint
from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase, adapters


class Snapshots:
    """Adapters, heads, optimizer, schedule, random generators and the recipe's own values, by parameter name.

    A snapshot in memory costs three times the adapters' size on the CPU; it lets a step that fails or is interrupted
    leave a checkpoint of the step before it.
    """

    def __init__(
        self,
        folder: Path,
        base: SharedBase,
        roles: Sequence[str],
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        accelerator: Accelerator,
        *,
        keep: int,
    ) -> None:
        self._folder, self._base, self._roles, self._keep = folder, base, list(roles), keep
        self._optimizer, self._scheduler, self._accelerator = optimizer, scheduler, accelerator
        self._names = {p: f"{role}/{name}" for role in roles for name, p in base.named_parameters(role).items()}

    def take(self, step: int, values: dict[str, Any]) -> checkpoint.State:
        """Copies of everything after ``step`` finished steps."""
        tensors: dict[str, torch.Tensor] = {f"parameters/{name}": p for p, name in self._names.items()}
        optimizer = checkpoint.optimizer_tensors(self._optimizer, self._names)
        tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer.items()}
        generators, random_values = checkpoint.random_state()
        tensors |= {f"random/{name}": tensor for name, tensor in generators.items()}
        schedule = {key: value for key, value in self._scheduler.state_dict().items() if key != "lr_lambdas"}
        held = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        state = {"recipe": values, "scheduler": schedule, "random": random_values}
        return checkpoint.State(step=step, tensors=held, values=copy.deepcopy(state))

    def write(self, state: checkpoint.State) -> Path:
        """checkpoint-N/ with one PEFT folder a role. Every process gives its random state, process 0 writes."""
        own = {name: tensor for name, tensor in state.tensors.items() if name.startswith("random/")}
        shares = [(own, state.values["random"])]
        if self._accelerator.num_processes > 1:
            shares = gather_object(shares)
        path = self._folder / f"checkpoint-{state.step}"
        if self._accelerator.is_main_process:
            tensors = {name: tensor for name, tensor in state.tensors.items() if name.startswith("optimizer/")}
            for rank, (generators, _) in enumerate(shares):
                tensors |= {name.replace("random/", f"random/{rank}/", 1): t for name, t in generators.items()}
            values = {**state.values, "random": [share[1] for share in shares]}
            checkpoint.save(
                self._folder,
                checkpoint.State(state.step, tensors, values),
                also=lambda folder: self._write_roles(folder, state.tensors),
                keep=self._keep,
            )
        self._accelerator.wait_for_everyone()
        return path

    def keep(self, state: checkpoint.State) -> str:
        """Writes ``state`` unless a whole checkpoint of its step is there; says in words where it is, or why not."""
        path = self._folder / f"checkpoint-{state.step}"
        if path.is_dir() and checkpoint.damage(path) is None:
            return f"checkpoint {path}"
        try:
            return f"checkpoint {self.write(state)}"
        except UserError as error:
            return str(error)

    def restore(self, path: Path) -> tuple[int, dict[str, Any]]:
        """Everything from a checkpoint; returns its step and the recipe's values. Raises UserError where it is damaged
        or was written with another config or number of processes."""
        state = checkpoint.load(path)
        generators = state.values["random"]
        if len(generators) != self._accelerator.num_processes:
            raise UserError(
                f"{path} was written by {len(generators)} processes and this run has "
                f"{self._accelerator.num_processes}; resume with as many"
            )
        for role in self._roles:
            self._restore_role(path, role)
        optimizer = _under("optimizer/", state.tensors)
        checkpoint.restore_optimizer(self._optimizer, self._names, optimizer)
        unset = [None] * len(self._optimizer.param_groups)  # the lambdas themselves come from the config
        self._scheduler.load_state_dict({**state.values["scheduler"], "lr_lambdas": unset})
        for group, rate in zip(self._optimizer.param_groups, state.values["scheduler"]["_last_lr"], strict=True):
            group["lr"] = rate
        rank = self._accelerator.process_index
        checkpoint.set_random_state(_under(f"random/{rank}/", state.tensors), generators[rank])
        return state.step, state.values["recipe"]

    def _restore_role(self, path: Path, role: str) -> None:
        if not (path / role).is_dir():
            raise UserError(f"{path}: no {role} adapter in it: a checkpoint of another stage; name one of this stage")
        _, tensors = adapters.read_adapter(path / role)
        own = {adapters.PREFIX + name: parameter for name, parameter in self._base.named_parameters(role).items()}
        for name in own | tensors:
            if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
                raise UserError(
                    f"{path}: {role}/{name.removeprefix(adapters.PREFIX)} does not fit this config's adapters; resume "
                    "with the config that began the run (config.yaml in its folder), or name a new --output_dir"
                )
            own[name].data.copy_(tensors[name])

    def _write_roles(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        for role in self._roles:
            held = _under(f"parameters/{role}/", tensors)
            adapters.save_role(self._base, role, folder / role, parameters=held)


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
