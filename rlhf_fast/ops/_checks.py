"""Argument checks shared by the public functions. Each error says what was expected, what was given and what to do."""

import math
from typing import Any

import torch
from torch._C._functorch import TransformType

from rlhf_fast.kernels.records import Range

# The range in which float32 holds the reciprocal of a temperature and its products with the exponents of a softmax.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 2.0**-126, 2.0**119
NUMBERS = (float, int, type(None))
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
PLAIN = {torch.Tensor, torch.nn.Parameter}


def floating(op: str, **tensors: torch.Tensor) -> None:
    """Every tensor is a floating-point torch.Tensor."""
    for name, tensor in tensors.items():
        if type(tensor) not in PLAIN:
            is_tensor(op, **{name: tensor})
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} must be float64, float32, bfloat16 or float16; got {tensor.dtype}")


def integral(op: str, **tensors: torch.Tensor) -> None:
    """Every tensor holds integers (token ids)."""
    for name, tensor in tensors.items():
        if type(tensor) not in PLAIN:
            is_tensor(op, **{name: tensor})
        if tensor.dtype not in INTEGERS:
            raise TypeError(f"{op}: {name} must hold integers (token ids); got {tensor.dtype}")


def is_tensor(op: str, **tensors: torch.Tensor) -> None:
    """Every argument is a torch.Tensor and no DTensor, which FSDP2 and tensor parallelism use."""
    for name, tensor in tensors.items():
        if type(tensor) in PLAIN:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor; got {type(tensor).__name__}")
        if hasattr(tensor, "full_tensor"):
            raise TypeError(
                f"{op}: {name} must be a whole tensor; got a DTensor, of which this rank may hold a part: pass "
                f"{name}.full_tensor(), or {name}.to_local() where every rank holds all of it"
            )


def alike(op: str, what: str, **tensors: torch.Tensor) -> None:
    """All are floating-point tensors on one device with the shape of the first; ``what`` names that shape in errors."""
    first = next(iter(tensors.values()))
    if type(first) in PLAIN:  # fast path: one loop for plain tensors without an error
        shape, device = first.shape, first.device
        for tensor in tensors.values():
            if type(tensor) not in PLAIN or tensor.dtype not in FLOATS:
                break
            if tensor.shape != shape or tensor.device != device:
                break
        else:
            return
    floating(op, **tensors)
    shaped(op, first.shape, what, **tensors)
    same_device(op, **tensors)


def same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """All tensors that are given are on one device."""
    given = [tensor.device for tensor in tensors.values() if tensor is not None]
    if given.count(given[0]) != len(given):
        places = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
        listing = ", ".join(f"{name} on {device}" for name, device in places.items())
        raise ValueError(f"{op}: all tensors must be on one device; got {listing}")


def shaped(op: str, expected: tuple[int, ...] | torch.Size, what: str, **tensors: torch.Tensor | None) -> None:
    """Every tensor that is given has the expected shape; ``what`` names that shape in errors."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != expected:
            raise ValueError(f"{op}: {name} must have shape {tuple(expected)} ({what}); got {tuple(tensor.shape)}")


def live_mask(op: str, mask: torch.Tensor | None, shape: torch.Size, device: torch.device) -> torch.Tensor | None:
    """A bool mask (True = counts) of ``shape``, from bool or 0/1 of any dtype; None stays None.

    Another value is an error on the CPU. On a GPU and under torch.compile it is not checked and counts as 1.
    """
    if mask is None:
        return None
    is_tensor(op, mask=mask)
    shaped(op, shape, "one entry a token, 1 = counts", mask=mask)
    if mask.device != device:
        raise ValueError(f"{op}: all tensors must be on one device; got mask on {mask.device}, the data on {device}")
    if mask.dtype == torch.bool:
        return constant(mask)
    live = mask.bool()
    if at_hand(mask) and not torch.equal(live.to(mask.dtype), mask):
        position = tuple((live.to(mask.dtype) != mask).nonzero()[0].tolist())
        raise ValueError(
            f"{op}: mask must be bool or 0/1; got {mask[position].item():g} at position {position}. It takes no "
            "weights: pass mask != 0 if such a token counts, and multiply the advantages or the loss by the weights."
        )
    return live


def has_values(tensor: torch.Tensor) -> bool:
    """Whether the tensor has real values: False under torch.compile and torch.func, for subclasses, and on "meta"."""
    return (
        type(tensor) in PLAIN
        and not tensor.is_meta
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def is_eager(tensor: torch.Tensor) -> bool:
    """Whether the tensor has real values, and no dispatch mode or tracer is active."""
    return has_values(tensor) and not torch._C._len_torch_dispatch_stack()


def at_hand(tensor: torch.Tensor) -> bool:
    """Whether the values can be read here: on a GPU that would synchronise, and under a tracer it would fail."""
    return tensor.is_cpu and is_eager(tensor)


def constant(tensor: torch.Tensor) -> torch.Tensor:
    """Without gradient. An inference tensor, such as from a rollout, is copied: autograd cannot save one."""
    if tensor.requires_grad:
        return tensor.detach()
    if torch.compiler.is_compiling() or not tensor.is_inference() or not torch.is_grad_enabled():
        return tensor
    return tensor.clone()


def differentiated_once(op: str) -> None:
    """Refuses nested differentiation by torch.func: its second derivative would silently lack this op's part."""
    if under_torch_func():
        kinds = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
        if kinds.count(TransformType.Grad) + kinds.count(TransformType.Jvp) > 1:
            raise RuntimeError(f"rlhf_fast.{op} has no second derivative: torch.func.grad cannot be taken twice")


def under_torch_func() -> bool:
    """Whether a transform of torch.func (grad, vmap, ...) is active."""
    return torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()


def temperatures(
    op: str, temperature: float | torch.Tensor, shape: torch.Size, device: torch.device
) -> float | torch.Tensor:
    """Checks a temperature: a positive number, or a tensor of them, () or one per row. Returns a float or the tensor.

    A tensor's entries are checked on the CPU only. On a GPU that would synchronise, and under torch.compile it would
    break the graph; there a wrong entry gives NaN in its row.
    """
    if isinstance(temperature, torch.Tensor):
        floating(op, temperature=temperature)
        if temperature.dim() != 0:
            shaped(op, shape, "one temperature a row", temperature=temperature)
        if temperature.device != device:
            raise ValueError(f"{op}: temperature must be on {device}; got {temperature.device}")
        if at_hand(temperature):
            wrong = temperature[~usable_temperature(temperature)]
            if wrong.numel():
                raise ValueError(f"{op}: every temperature must be > 0 and at most 2^119; got {wrong[0].item()}")
        return temperature
    if not isinstance(temperature, (int, float)) or not LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE:
        raise ValueError(f"{op}: temperature must be a number > 0 and at most 2^119; got {temperature!r}")
    return float(temperature)


def usable_temperature(temperature: torch.Tensor) -> torch.Tensor:
    return (temperature >= LOWEST_TEMPERATURE) & (temperature <= HIGHEST_TEMPERATURE)


def is_number(op: str, **numbers: object) -> None:
    """No argument is a tensor. A tensor would pass the range checks, but the kernels need a number."""
    for name, number in numbers.items():
        # compares types first, because isinstance(number, Tensor) takes ten times as long
        if type(number) not in NUMBERS and isinstance(number, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a number; got a tensor of shape {tuple(number.shape)}: .item() it")


def positive(op: str, **numbers: float | None) -> None:
    for name, number in numbers.items():
        if type(number) not in NUMBERS:
            is_number(op, **{name: number})
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{op}: {name} must be a finite number > 0; got {number!r}")


def non_negative(op: str, **numbers: float | None) -> None:
    for name, number in numbers.items():
        if type(number) not in NUMBERS:
            is_number(op, **{name: number})
        if number is not None and not 0 <= number < math.inf:
            raise ValueError(f"{op}: {name} must be a finite number >= 0; got {number!r}")


def within(op: str, lowest: float, highest: float, **numbers: float) -> None:
    for name, number in numbers.items():
        if type(number) not in NUMBERS:
            is_number(op, **{name: number})
        if not lowest <= number <= highest:
            raise ValueError(f"{op}: {name} must be in [{lowest:g}, {highest:g}]; got {number!r}")


def in_ranges(op: str, ranges: dict[str, Range], numbers: dict[str, float | None], prefix: str = "") -> dict[str, Any]:
    """Checks each number against the range of its name. Returns them, inf for None. Errors put ``prefix`` first."""
    for name, number in numbers.items():
        if type(number) not in NUMBERS:
            is_number(op, **{prefix + name: number})
        allowed = ranges[name]
        if number is None and allowed.optional:
            numbers[name] = math.inf
        elif number is None or not allowed.least <= number <= allowed.most:
            raise ValueError(f"{op}: {prefix}{name} must be {allowed.text}; got {number!r}")
    return numbers


def one_of(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}; got {value!r}")
