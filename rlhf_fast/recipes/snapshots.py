"""Snapshots of a stage's training state: taken in memory before each step, written to and read from checkpoint-N/."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from rlhf_fast import checkpoint
from rlhf_fast.errors import UserError
from rlhf_fast.models import SharedBase, adapters
from rlhf_fast.recipes.identity import Changes, changes, told
from rlhf_fast.text import one_line


class Snapshots:
    """Takes, writes and restores snapshots of adapters, heads, optimizer, schedule, random generators and the recipe's
    values. Tensors are stored by parameter name.

    A snapshot takes three times the adapters' size of CPU memory. With it, a step that fails or is interrupted can
    still write a checkpoint of the step before.

    Attributes:
        best: the copies of ``keep_best``, by role and parameter name; part of every later snapshot.
    """

    def __init__(
        self,
        folder: Path,
        base: SharedBase,
        roles: Sequence[str],
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        accelerator: Accelerator,
        identity: dict[str, Any],
        *,
        keep: int,
    ) -> None:
        self._folder, self._base, self.roles, self._keep = folder, base, list(roles), keep
        self._identity = identity
        self.best: dict[str, torch.Tensor] = {}
        self._optimizer, self._scheduler, self._accelerator = optimizer, scheduler, accelerator
        self._names = {p: f"{role}/{name}" for role in roles for name, p in base.named_parameters(role).items()}

    def take(self, step: int, values: dict[str, Any]) -> checkpoint.State:
        """A snapshot after ``step`` finished steps."""
        tensors: dict[str, torch.Tensor] = {f"parameters/{name}": p for p, name in self._names.items()}
        optimizer = checkpoint.optimizer_tensors(self._optimizer, self._names)
        tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer.items()}
        generators, random_values = checkpoint.random_state()
        tensors |= {f"random/{name}": tensor for name, tensor in generators.items()}
        schedule = {key: value for key, value in self._scheduler.state_dict().items() if key != "lr_lambdas"}
        held = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        held |= {f"best/{name}": tensor for name, tensor in self.best.items()}  # immutable, so not copied
        state = {"recipe": values, "scheduler": schedule, "random": random_values, "identity": self._identity}
        return checkpoint.State(step=step, tensors=held, values=copy.deepcopy(state))

    def keep_best(self) -> None:
        """Keeps a copy of the roles' current parameters as the best so far."""
        self.best = {name: parameter.detach().to("cpu", copy=True) for parameter, name in self._names.items()}

    def write(self, state: checkpoint.State) -> Path:
        """Writes checkpoint-N/ with one PEFT folder per role. All processes must call; only process 0 writes."""
        own = {name: tensor for name, tensor in state.tensors.items() if name.startswith("random/")}
        shares = [(own, state.values["random"])]
        if self._accelerator.num_processes > 1:
            shares = gather_object(shares)
        path = self._folder / f"checkpoint-{state.step}"
        if self._accelerator.is_main_process:
            tensors = {name: t for name, t in state.tensors.items() if name.startswith(("optimizer/", "best/"))}
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
        """Writes ``state`` unless an undamaged checkpoint of its step exists. Returns a text with its path, or with the
        reason why it could not be written."""
        path = self._folder / f"checkpoint-{state.step}"
        if path.is_dir() and checkpoint.damage(path) is None:
            return f"checkpoint {path}"
        try:
            return f"checkpoint {self.write(state)}"
        except UserError as error:
            return str(error)

    def restore(self, path: Path) -> tuple[int, dict[str, Any], Changes | None]:
        """Restores everything from a checkpoint. Returns its step, the recipe's values, and the changes between its
        identity and this run's (None if the checkpoint has no identity).

        Raises UserError if it is damaged, from another stage, does not fit the config's adapters, or was written by
        another number of processes.
        """
        state = checkpoint.load(path)
        with _of_this_stage(path):
            generators = list(state.values["random"])
            identity = state.values.get("identity")
            changed = None if identity is None else changes(identity, self._identity)
        if len(generators) != self._accelerator.num_processes:
            raise UserError(
                f"{path} was written by {len(generators)} processes and this run has "
                f"{self._accelerator.num_processes}; resume with as many"
            )
        for role in self.roles:
            self._restore_role(path, role, changed)
        with _of_this_stage(path):
            optimizer = under("optimizer/", state.tensors)
            checkpoint.restore_optimizer(self._optimizer, self._names, optimizer)
            if state.values["scheduler"]["last_epoch"] != state.step:
                raise ValueError("its schedule is at another step")
            self._restore_schedule(dict(state.values["scheduler"]))
            rank = self._accelerator.process_index
            checkpoint.set_random_state(under(f"random/{rank}/", state.tensors), generators[rank])
            self.best = under("best/", state.tensors)
            if self.best and self.best.keys() != set(self._names.values()):
                raise ValueError("the best adapter is of other parameters")
            return state.step, dict(state.values["recipe"]), changed

    def _restore_schedule(self, saved: dict[str, Any]) -> None:
        """Restores the position in the schedule; peak rate and curve come from the config, as for a new run."""
        peak = float(self._scheduler.base_lrs[0])
        unset = [None] * len(self._optimizer.param_groups)  # keeps the lambdas, which come from the config
        self._scheduler.load_state_dict({**saved, "lr_lambdas": unset})
        self.set_peak(peak)

    def set_peak(self, peak: float) -> None:
        """Sets the peak learning rate of the schedule, and the rate that it gives for the next step."""
        self._scheduler.base_lrs = [peak] * len(self._optimizer.param_groups)
        rates = [peak * curve(self._scheduler.last_epoch) for curve in self._scheduler.lr_lambdas]
        self._scheduler._last_lr = list(rates)
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _restore_role(self, path: Path, role: str, changed: Changes | None) -> None:
        if not (path / role).is_dir():
            raise UserError(f"{path}: no {role} adapter in it: a checkpoint of another stage; name one of this stage")
        _, tensors = adapters.read_adapter(path / role)
        own = {adapters.PREFIX + name: parameter for name, parameter in self._base.named_parameters(role).items()}
        for name in own | tensors:
            if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
                what = f" ({told(changed.differing)})" if changed and changed.differing else ""
                raise UserError(
                    f"{path}: {role}/{name.removeprefix(adapters.PREFIX)} does not fit this config's adapters; resume "
                    f"with the config that began the run (config.yaml in its folder), or name a new --output_dir"
                    f"{what}"
                )
            own[name].data.copy_(tensors[name])

    def _write_roles(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        for role in self.roles:
            held = under(f"parameters/{role}/", tensors)
            adapters.save_role(self._base, role, folder / role, parameters=held)


@contextlib.contextmanager
def _of_this_stage(path: Path) -> Iterator[None]:
    """Inside, an error of restoring a checkpoint's content becomes a UserError of one line: an undamaged checkpoint may
    still have the wrong content."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        what = one_line(f"{type(error).__name__}: {error}", 200)
        raise UserError(f"{path}: its state does not fit this stage ({what}); name a checkpoint of this run") from error


def under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
