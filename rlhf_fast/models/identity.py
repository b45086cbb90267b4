"""Identifies the base that an adapter was made for by a digest of its weights, because paths and names can change."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlhf_fast.base_weights import in_four_bits
from rlhf_fast.errors import UserError

FILE = "base_model.json"  # next to PEFT's files; PEFT ignores it
SAMPLES = 64  # values of each weight that go into the digest


def fingerprint(linear: Mapping[str, Any]) -> dict[str, str]:
    """A digest of the linear layers that adapters can be on, given by their path in the decoder.

    The weights are rounded to bfloat16 first, so that the digest is the same for weights read in float32 and bfloat16.
    float16 and packed 4-bit weights have other digests: bfloat16 values may be out of float16's range.
    """
    weights = [module.weight.detach() for module in linear.values()]
    rounded = torch.float16 if any(weight.dtype == torch.float16 for weight in weights) else torch.bfloat16
    if any(map(in_four_bits, linear.values())):
        rounded = torch.uint8
    samples = [weight.flatten()[:: max(1, weight.numel() // SAMPLES)][:SAMPLES].to(rounded) for weight in weights]
    digest = hashlib.sha256(torch.cat(samples).cpu().view(torch.uint8).numpy().tobytes())
    for path, weight in zip(linear, weights, strict=True):
        digest.update(f"{path} {tuple(weight.shape)}\n".encode())
    return {"rounded_to": str(rounded).removeprefix("torch."), "weights_sha256": digest.hexdigest()}


def write(folder: Path, own: Mapping[str, str]) -> None:
    (folder / FILE).write_text(json.dumps(own, indent=2) + "\n")


def check(who: str, folder: Path, named: str | None, own: Mapping[str, str], own_name: str) -> str | None:
    """A note for the user if the adapter in ``folder`` names another base than ``own_name``, else None.

    ``who``: the adapter's name in messages. ``named``: the base in its config. ``own``: the digest of this base. Raises
    UserError if the digest in ``folder`` is that of other weights.
    """
    told = _read(folder / FILE)
    comparable = told.get("rounded_to") == own["rounded_to"]
    if comparable and told["weights_sha256"] != own["weights_sha256"]:
        raise UserError(
            f"{who}: made for another base; the weights of {own_name or 'this one'} are not those that "
            f"{folder / FILE} was written for (it names {named or 'none'}): set --model_name_or_path to that one"
        )
    if not named or not own_name or source(named) == source(own_name):
        return None
    if comparable:
        return f"{who}: made on {named}; {own_name} has the same weights, so it is used"
    return f"{who}: made on {named}, and this base is {own_name}; nothing shows that the two are the same model"


def proven(folder: Path, own: Mapping[str, str]) -> bool:
    """Whether the digest in ``folder`` shows that its adapter was made for exactly these weights."""
    return _read(folder / FILE) == own


def source(name: str) -> str:
    """The absolute path of a folder; any other name unchanged."""
    return os.path.realpath(name) if os.path.isdir(name) else name


def _read(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return {name: str(told[name]) for name in ("rounded_to", "weights_sha256")}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error!r}); delete it, or copy the adapter again") from error
