"""Which base an adapter was made for: a digest of its weights, since folders move and names are given twice."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlhf_fast.base_weights import in_four_bits
from rlhf_fast.errors import UserError

FILE = "base_model.json"  # beside PEFT's own files, which do not read it
SAMPLES = 64  # values of each weight that go into the digest


def fingerprint(linear: Mapping[str, Any]) -> dict[str, str]:
    """A digest of the linear layers that adapters can stand on, by their path in the decoder.

    The weights are rounded to bfloat16 first, so that it is the same whether they were read in float32 or bfloat16;
    float16 cannot hold all of them, and has a digest of its own, as have packed 4-bit numbers.
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
    """A note where the adapter in ``folder`` names another base than ``own_name``; None where there is none to give.

    ``who``: what messages call the adapter. ``named``: the base in its config. Raises UserError where the digest beside
    it is of other weights.
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
    """True where the digest in ``folder`` shows that its adapter was made for these very weights."""
    return _read(folder / FILE) == own


def source(name: str) -> str:
    """A folder by its whole path, any other name as it is."""
    return os.path.realpath(name) if os.path.isdir(name) else name


def _read(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return {name: str(told[name]) for name in ("rounded_to", "weights_sha256")}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error!r}); delete it, or copy the adapter again") from error
