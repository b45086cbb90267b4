"""Argument checks shared by the public functions. Each error says what was expected, what came and what to do."""

import math

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def floating(op: str, **tensors: torch.Tensor) -> None:
    """Every tensor is a floating-point torch.Tensor."""
    for name, tensor in tensors.items():
        is_tensor(op, **{name: tensor})
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} must be float64, float32, bfloat16 or float16; got {tensor.dtype}")


def integral(op: str, **tensors: torch.Tensor) -> None:
    """Every tensor holds integers (token ids)."""
    for name, tensor in tensors.items():
        is_tensor(op, **{name: tensor})
        if tensor.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
            raise TypeError(f"{op}: {name} must hold integers (token ids); got {tensor.dtype}")


def is_tensor(op: str, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor; got {type(tensor).__name__}")


def same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """All tensors that are given are on one device."""
    places = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(places.values())) > 1:
        listing = ", ".join(f"{name} on {device}" for name, device in places.items())
        raise ValueError(f"{op}: all tensors must be on one device; got {listing}")


def shaped(op: str, expected: tuple[int, ...] | torch.Size, what: str, **tensors: torch.Tensor | None) -> None:
    """Every tensor that is given has the expected shape; ``what`` says where that shape comes from."""
    for name, tensor in tensors.items():
        if tensor is not None and tuple(tensor.shape) != tuple(expected):
            raise ValueError(f"{op}: {name} must have shape {tuple(expected)} ({what}); got {tuple(tensor.shape)}")


def live_mask(op: str, mask: torch.Tensor | None, shape: torch.Size, device: torch.device) -> torch.Tensor | None:
    """A bool mask (True = counts) of ``shape``, from bool or 0/1 of any dtype; None stays None."""
    if mask is None:
        return None
    is_tensor(op, mask=mask)
    shaped(op, shape, "one entry a token, 1 = counts", mask=mask)
    if mask.device != device:
        raise ValueError(f"{op}: all tensors must be on one device; got mask on {mask.device}, the data on {device}")
    return mask if mask.dtype == torch.bool else mask != 0


def temperatures(
    op: str, temperature: float | torch.Tensor, shape: torch.Size, device: torch.device
) -> float | torch.Tensor:
    """A positive number, or a tensor of positive numbers, one a row (scalar tensors become numbers' shape ``()``).

    A tensor on the CPU is checked for positive entries; on a GPU that would synchronise, and under torch.compile break
    the graph, so there a non-positive entry gives NaN in its row.
    """
    if isinstance(temperature, torch.Tensor):
        floating(op, temperature=temperature)
        if temperature.dim() != 0:
            shaped(op, shape, "one temperature a row", temperature=temperature)
        if temperature.device != device:
            raise ValueError(f"{op}: temperature must be on {device}; got {temperature.device}")
        if device.type == "cpu" and not torch.compiler.is_compiling() and not bool((temperature > 0).all()):
            raise ValueError(f"{op}: every temperature must be > 0; got {temperature.min().item()}")
        return temperature
    if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature must be a finite number > 0; got {temperature!r}")
    return float(temperature)


def positive(op: str, **numbers: float | None) -> None:
    for name, number in numbers.items():
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{op}: {name} must be a finite number > 0; got {number!r}")


def non_negative(op: str, **numbers: float | None) -> None:
    for name, number in numbers.items():
        if number is not None and not 0 <= number < math.inf:
            raise ValueError(f"{op}: {name} must be a finite number >= 0; got {number!r}")


def one_of(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}; got {value!r}")
