"""Files in the folders of runs that may not be what they should: of odd kinds, or somebody else's."""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Container, Iterator
from pathlib import Path

# What runs and the libraries under them write: checkpoints, adapters, tokenizers, the trackers' events.
NAMES = {"manifest.json", "state.json", "state.safetensors"}
NAMES |= {"adapter_config.json", "adapter_model.safetensors", "base_model.json", "calibration.json"}
NAMES |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"}
NAMES |= {"merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "hparams.yml"}
CARDS = ("README.md", "card.html")  # of a reward model; ours if they say so at their beginning
OUR_CARD = b"<!-- written by rlhf-fast"
EVENTS = re.compile(r"events\.out\.tfevents\..*")


def read_plain(path: Path, longest: int) -> bytes:
    """The first ``longest`` bytes of a plain file. OSError for what is none: a link, a folder, a pipe (without
    waiting for its other end)."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    handle = os.open(path, flags)
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            folder = stat.S_ISDIR(mode)
            raise OSError(errno.EISDIR, "Is a directory") if folder else OSError(errno.EINVAL, "it is no plain file")
        with open(handle, "rb", closefd=False) as file:
            return file.read(longest)
    finally:
        os.close(handle)


def others(folder: Path, listed: Container[str] = ()) -> Iterator[Path]:
    """What lies under ``folder`` and no run wrote, but for folders. ``listed``: further files of ours, relative to it.

    A run may replace or delete ``folder``, which it made; they stay.
    """
    for path in folder.rglob("*"):
        own = path.name in NAMES or EVENTS.fullmatch(path.name) or str(path.relative_to(folder)) in listed
        own = own or path.name in CARDS and _is_our_card(path)
        if path.is_symlink() or not (own or path.is_dir()):
            yield path


def _is_our_card(path: Path) -> bool:
    try:
        return OUR_CARD in read_plain(path, 4096)
    except OSError:  # a link, a folder, a pipe
        return False


def delete(folder: Path, listed: Container[str] = ()) -> None:
    """Deletes ``folder`` but for ``others``, which keep their places in it."""
    kept = set(others(folder, listed))
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            if Path(parent, name) not in kept:
                Path(parent, name).unlink()
        with contextlib.suppress(OSError):  # it is not empty: one of ``kept`` is in it
            os.rmdir(parent)


def carry(source: Path, target: Path, listed: Container[str] = ()) -> None:
    """Moves ``others`` of ``source`` into ``target``, where nothing of the same name is there already."""
    for path in list(others(source, listed)):
        place = target / path.relative_to(source)
        if not os.path.lexists(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
