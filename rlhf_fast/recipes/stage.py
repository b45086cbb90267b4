"""Shared by the training loops: processes, folder, optimizer, checkpoints, logs, interruptions.

with stage:
    for step in stage.steps():      # 1, 2, ... total; writes a checkpoint after the body if one is due
        ...                         # forward, stage.backward(loss), stage.update(...), stage.log(...)
"""

import asyncio
import copy
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from rlhf_fast import checkpoint, metrics
from rlhf_fast.config import StageConfig
from rlhf_fast.errors import Interrupted, UserError
from rlhf_fast.metrics import Metric
from rlhf_fast.models import adapters
from rlhf_fast.monitor.verdict import FILE as VERDICTS
from rlhf_fast.recipes.heap import Heap
from rlhf_fast.recipes.identity import identity, told
from rlhf_fast.recipes.opening import open_base, open_optimizer
from rlhf_fast.recipes.output import OutputFolder, open_output
from rlhf_fast.recipes.processes import Item, Processes
from rlhf_fast.recipes.records import Records, check_trackers, peak_memory
from rlhf_fast.recipes.snapshots import Snapshots, under
from rlhf_fast.recipes.watch import Watch, outcome, react
from rlhf_fast.signals import Interruptible
from rlhf_fast.text import one_line, shown

Config = TypeVar("Config", bound=StageConfig, covariant=True)
MICRO_BATCH_SIZE = 8  # the default
# Exceptions after which the stage writes a checkpoint of its last finished step.
LEAVING = (Exception, KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)


class Stage(Processes, Generic[Config]):
    """One stage of training in this process.

    Args:
        config: copied, and kept as ``config``.
        resume_from_checkpoint: replaces the config's, if given.

    Attributes:
        base: the shared base; the recipe adds its roles before ``start``.
        values: the recipe's state in every checkpoint, JSON-serialisable (KL coefficient, running moments, best loss).
        rows: name of training or held-out rows -> their fingerprint, which a resumed run compares.
        step: the number of finished steps.
    """

    def __init__(self, name: str, config: Config, resume_from_checkpoint: str | None = None) -> None:
        config.validate()
        check_trackers(config)
        self.config = config = copy.copy(config)
        config.resume_from_checkpoint = resume_from_checkpoint or config.resume_from_checkpoint
        if config.micro_batch_tokens is None:
            config.micro_batch_size = config.micro_batch_size or MICRO_BATCH_SIZE
        self.name, self.folder = name, Path(config.output_dir)
        super().__init__(Accelerator(log_with=config.report_to or None, project_dir=str(self.folder / "runs")))
        self._records = Records(name, config, self)
        self._watch = Watch(config.monitor_thresholds, self.say)
        self._output: OutputFolder | None = None  # set in the main process, the only one that writes
        self._resume_path = self.on_main_first(self._open_output)
        set_seed(config.seed)
        self.base, self._base_digest = open_base(config, self.accelerator.device, self.say)
        self.rows: dict[str, str] = {}
        self.values: dict[str, Any] = {}
        self.step = self.total = 0
        self.stopped_early = False
        self._snapshot: checkpoint.State | None = None

    # ---- set-up ------------------------------------------------------------------------------------------------

    def start(self, roles: Sequence[str], total_steps: int, values: dict[str, Any] | None = None) -> None:
        """Creates optimizer and schedule for the roles' parameters, and restores the checkpoint of a resumed run."""
        self.total, self.values = total_steps, dict(values or {})
        for note in self.base.notes:
            self.say(f"{self.name}: {note}")
        self.parameters = [p for role in roles for p in self.base.named_parameters(role).values()]
        self.begin_alike(self.parameters)
        self._optimizer, self._scheduler = open_optimizer(self.config, self.parameters, total_steps)
        # from here on, processes draw different random numbers; NumPy accepts only seeds below 2^32
        set_seed((self.config.seed + self.accelerator.process_index) % 2**32)
        self._snapshots = Snapshots(
            self.folder,
            self.base,
            roles,
            self._optimizer,
            self._scheduler,
            self.accelerator,
            identity(self.config, self.base, self._base_digest, roles, self.rows),
            keep=self.config.save_total_limit,
        )
        if self._resume_path is not None:
            self._resume(self._resume_path)
        self._records.open(self._output, self.step if self._resume_path is not None else None)
        self._set_learning_rate()
        if self._output is not None:
            self._output.claim(VERDICTS)
            self._watch.open(self.folder, self.values.get("rolled_back", []))

    def _resume(self, path: Path) -> None:
        fresh = self.values
        self.step, self.values, changed = self._snapshots.restore(path)
        for name, value in fresh.items():
            if not _alike(self.values.get(name, ...), value):
                found = shown(self.values.get(name))
                raise UserError(f"{path}: {name} in its state is {found}; name a checkpoint of this run")
        if changed is None:
            self.say(f"{path} was written by a version that noted no data and settings: they are not compared")
            if (self.folder / "best").is_dir():
                self._read_best()
        elif changed.differing and not self.config.resume_with_changes:
            raise UserError(
                f"{path} is of another run: {told(changed.differing)}; resume with what began it (its config.yaml), or "
                "let the changes hold from here on: --resume_with_changes true"
            )
        else:
            for change in (changed.differing, changed.allowed):
                if change:
                    self.say(f"{self.name}: changed from here on: {told(change)}")
            # state that a setting initialises, such as the KL coefficient, restarts if the setting changes
            self.values |= {name: getattr(self.config, name) for name in changed.differing if name in fresh}
        self.say(f"{self.name}: going on after step {self.step} from {path}")
        if self._output is None:
            return
        checkpoint.drop_after(self.folder, self.step)
        if self.step < self.total:
            self._output.remove("summary.json")  # its existence means that the run has ended
        if self._snapshots.best:
            self._save_best("best")

    # ---- the loop ----------------------------------------------------------------------------------------------

    def __enter__(self) -> "Stage[Config]":
        self._signals = Interruptible().__enter__()
        gc.freeze()  # full collections then skip the modules and the tokenizer, which saves 0.3 s each
        self._records.start_progress(self.step, self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.unfreeze()
        self._records.stop_progress(kind, error, trace)
        try:
            if isinstance(error, LEAVING) and self._snapshot is not None:
                self._leave(error, self._snapshot)
        finally:
            self._signals.__exit__(kind, error, trace)
            if error is not None:
                self._release()

    def _leave(self, error: BaseException, snapshot: checkpoint.State) -> None:
        """Writes a checkpoint of the last finished step, and reports it. With several processes it cannot be written,
        because each process stops at another point; then only the last periodic checkpoint is kept."""
        try:
            self._claim(f"{checkpoint.PREFIX}{snapshot.step}")
            where = self._snapshots.keep(snapshot) if self.accelerator.num_processes == 1 else self._last_checkpoint()
        except KeyboardInterrupt:  # a second Ctrl-C, while the checkpoint is written
            error, where = KeyboardInterrupt(), f"it was not written; {self._last_checkpoint()}"
        message = f"{self.name}: stopped after step {snapshot.step} of {self.total}; {where}"
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"{message}; go on with --resume_from_checkpoint auto") from None
        self.say(message)
        if not isinstance(error, Exception):
            what = one_line(f"{type(error).__name__}({error})", 200)
            raise UserError(f"{self.name} step {snapshot.step + 1}: code that it ran ended it by {what}") from error

    def _last_checkpoint(self) -> str:
        there = checkpoint.list_checkpoints(self.folder)
        return f"checkpoint {there[-1]}" if there else "no checkpoint yet"

    def steps(self) -> Iterator[int]:
        """The numbers (from 1) of the remaining steps. Writes a checkpoint after a step if one is due."""
        every, heap = self.config.save_steps or max(1, math.ceil(self.total / 10)), Heap()
        while self.step < self.total and not self.stopped_early:
            self._began = time.perf_counter()
            self._snapshot = self._snapshots.take(self.step, self.values)
            yield self.step + 1
            heap.after_step()
            self._scheduler.step()
            self.step += 1
            react(self, self.gather(self._watch.look()))
            if self.step % every == 0 or self.step == self.total or self.stopped_early:
                self._snapshot = self._snapshots.take(self.step, self.values)
                self._claim(f"{checkpoint.PREFIX}{self.step}")
                self._snapshots.write(self._snapshot)

    def micro_batches(self, items: Sequence[Item], lengths: Sequence[int]) -> list[Sequence[Item]]:
        """Splits ``items``, in order, into micro-batches as configured. ``lengths``: the tokens of each item."""
        self.check_lengths(lengths)
        rows, tokens = self.config.micro_batch_size, self.config.micro_batch_tokens
        bounds, total = [0], 0
        for place, length in enumerate(lengths):
            full = place - bounds[-1] == rows if tokens is None else total + length > tokens
            if full:
                bounds.append(place)
                total = 0
            total += length
        return [items[start:end] for start, end in pairwise([*bounds, len(items)]) if end > start]

    def check_lengths(self, lengths: Sequence[int]) -> None:
        """Raises UserError if a sequence has more tokens than a micro-batch may have."""
        budget, longest = self.config.micro_batch_tokens, max(lengths, default=0)
        if budget is not None and longest > budget:
            raise UserError(
                f"--micro_batch_tokens must hold the longest example, of {longest} tokens; got {budget}: set it to "
                f"{longest} or above, or lower --max_length"
            )

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulates the gradient of ``loss``, which must be divided by the count of the whole batch over all
        processes."""
        loss.backward()  # not accelerate's backward, which divides by its accumulation steps and applies loss scaling

    def update(self, loss: float, rows: Sequence[int]) -> float:
        """One optimizer step on the gradients of all processes; returns their norm before clipping.

        Raises UserError if loss or gradient is not finite, naming ``rows`` (the batch's row numbers in the data). The
        stage then writes a checkpoint of the last finished step.
        """
        self.sum_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(
                f"{self.name} step {self.step + 1}: loss {loss}, gradient norm {norm}: not finite; batch of rows "
                f"{', '.join(map(str, rows))}. Look at these rows, then try a lower --learning_rate or --dtype float32"
            )
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    @property
    def learning_rate(self) -> float:
        return self._optimizer.param_groups[0]["lr"]

    def scale_learning_rate(self, factor: float) -> None:
        """Multiplies the learning rate by ``factor`` from the next step on, also in runs that resume this one."""
        self.values["learning_rate_scale"] = self.values.get("learning_rate_scale", 1.0) * factor
        self._set_learning_rate()
        scale = self.values["learning_rate_scale"]
        self.say(f"{self.name}: learning rate {scale:g} times the configured one from step {self.step + 1} on")

    def _set_learning_rate(self) -> None:
        peak = self.config.learning_rate * self.values.get("learning_rate_scale", 1.0)
        self._snapshots.set_peak(peak)

    def roll_back(self, step: int, rolled_back: Sequence[Mapping[str, Any]]) -> bool:
        """Restores the newest checkpoint from before ``step``; False if there is none. All processes must call.

        ``rolled_back``: the verdicts, as JSON, for which the run has been rolled back, this time included.
        """
        whole = [path for path in checkpoint.list_checkpoints(self.folder) if checkpoint.step_of(path.name) < step]
        path = next((path for path in reversed(whole) if checkpoint.damage(path) is None), None)
        if path is None:
            return False
        scale = self.values.get("learning_rate_scale", 1.0)
        self.step, self.values, _ = self._snapshots.restore(path)
        self.values |= {"learning_rate_scale": scale, "rolled_back": list(rolled_back)}
        self.accelerator.wait_for_everyone()  # each reads the checkpoint before the later ones are deleted
        if self._output is not None:
            checkpoint.drop_after(self.folder, self.step)
            self._records.rewind(self.step)
            self._watch.open(self.folder, rolled_back)
            if self._snapshots.best:
                self._save_best("best")
        self.accelerator.wait_for_everyone()
        self.say(f"{self.name}: rolled back to {path}")
        return True

    def evaluation_due(self, step: int, *, times: int = 10) -> bool:
        """True after every eval_steps steps (unset: ``times`` times per run) and after the last step."""
        every = self.config.eval_steps or max(1, math.ceil(self.total / times))
        return step % every == 0 or step == self.total

    # ---- output ------------------------------------------------------------------------------------------------

    def say(self, message: str) -> None:
        self._records.say(message)

    def log(
        self,
        step: int,
        values: Mapping[Metric, float],
        *,
        tokens: int | None = None,
        shown: Mapping[str, str],
        logged: Mapping[str, float] | None = None,
    ) -> None:
        """Logs a line of metrics for ``step``. With ``tokens``, the number of live tokens trained on, it is the line of
        a training step.

        ``shown``: short texts for the progress bar. ``logged``: metrics that reward functions passed to ``log_metric``.
        Raises ValueError for a metric that ``rlhf_fast.metrics`` does not declare for this stage.
        """
        texts = dict(shown)
        if tokens is not None:
            seconds = time.perf_counter() - self._began
            values = {
                **values,
                metrics.LEARNING_RATE: self.learning_rate,
                metrics.SECONDS_STEP: seconds,
                metrics.TOKENS_PER_SECOND: tokens / seconds,
                metrics.PEAK_MEMORY: peak_memory(),
            }
            texts["speed"] = f"{tokens / seconds:.0f} tok/s"
        self._records.show(step, texts)
        line = {metrics.declared(self.name, metric).name: value for metric, value in values.items()}
        line |= logged or {}
        if tokens is None or step % self.config.logging_steps == 0 or step == self.total:
            self._watch.metrics(step, line)
            self._records.metrics(step, line)

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._watch.samples(step, rows)
        self._records.samples(step, rows)

    def report(self) -> None:
        self._watch.write()
        self._records.report()

    def finish(
        self,
        figures: dict[str, Any],
        rows: list[tuple[str, str, str]],
        roles: dict[str, str],
        also: Callable[[Path], None] | None = None,
    ) -> dict[str, Any]:
        """Writes the final adapters (role -> folder name), summary and report, and prints the table.

        ``also`` writes further files into the folder of each adapter.
        """
        for role, name in roles.items():
            self._save_adapter(role, name, also=also)
        self._watch.write()
        more_figures, more_rows = outcome(self)
        figures = self._records.close(figures | more_figures, [*rows, *more_rows], self.step)
        self._release()
        return figures

    def keep_best(self) -> None:
        """Keeps the trained role's current weights as the best so far: the folder ``best``, and every checkpoint."""
        self._snapshots.keep_best()
        self._save_best("best")

    def finish_with_best(self, name: str) -> None:
        """Writes the best weights of the run as the adapter ``name``."""
        if not self._snapshots.best:
            raise UserError(f"{self.folder / 'best'} is not there, which held the best adapter; start the run again")
        self._save_best(name)

    def _read_best(self) -> None:
        """Reads the best adapter from the folder ``best``, for a run whose checkpoints do not contain it."""
        (role,) = self._snapshots.roles
        tensors = adapters.read_adapter(self.folder / "best")[1]
        self._snapshots.best = {f"{role}/{n.removeprefix(adapters.PREFIX)}": t for n, t in tensors.items()}

    def _save_best(self, name: str) -> None:
        for role in self._snapshots.roles:
            self._save_adapter(role, name, under(f"{role}/", self._snapshots.best))

    def _save_adapter(
        self,
        role: str,
        name: str,
        parameters: dict[str, torch.Tensor] | None = None,
        also: Callable[[Path], None] | None = None,
    ) -> None:
        """Writes a role and the tokenizer in PEFT's format to the stage's folder, replacing the folder as a whole."""
        if self._output is not None:
            with checkpoint.whole_folder(self._output.claim(name)) as work:
                adapters.save_role(self.base, role, work, parameters=parameters)
                self.base.tokenizer.save_pretrained(work)
                if also is not None:
                    also(work)

    def _claim(self, name: str) -> None:
        if self._output is not None:
            self._output.claim(name)

    def _release(self) -> None:
        if self._output is not None:
            self._output.release()

    def _open_output(self) -> Path | None:
        self._output, resumed = open_output(self.config, self.name, self.say)
        return resumed


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's generators are seeded with ``seed``; afterwards their state is restored. For evaluations, which
    must not change the random numbers of training, and must draw the same numbers each time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _alike(value: Any, fresh: Any) -> bool:
    """Whether ``value`` has the type that ``fresh``, the initial value, has. An initial None becomes a number later."""
    if fresh is None or isinstance(fresh, (int, float)):
        return isinstance(value, (int, float)) or (value is None and fresh is None)
    return isinstance(value, type(fresh))
