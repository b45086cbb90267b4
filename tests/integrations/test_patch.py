"""The patch machinery on a peer made up of modules here. The real peers: tests/peers, `make test-peers`."""

import importlib.metadata
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

from rlhf_fast.integrations._patch import Patch, Replacement, Step


def theirs(value: int) -> int:
    return value


def ours(value: int) -> int:
    return 10 * value


class Trainer:
    def __init__(self, hot: bool) -> None:
        self.hot = hot

    def step(self) -> int:
        return sys.modules["peer.utils"].function(1) if self.hot else 1


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """peer.utils has the function, and peer.user has imported it under another name."""
    names = ("peer", "peer.utils", "peer.user")
    modules = {name: ModuleType(name) for name in names}
    vars(modules["peer"]).update(utils=modules["peer.utils"], __path__=[])
    vars(modules["peer.utils"]).update(function=theirs, Function=type("Function", (), {"apply": theirs}))
    vars(modules["peer.utils"]).update(Trainer=Trainer, absent=None)
    vars(modules["peer.user"]).update(imported=theirs)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    version(monkeypatch, "2.3.1")
    return modules


def version(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)


def a_patch(**changes: Any) -> Patch:
    replacements = [Replacement("peer.utils.function", ours)]
    step = Step("peer.utils.Trainer.step", ours, lambda trainer: trainer.hot is not None)
    return Patch(
        **{"peer": "peer", "versions": ("2.3", "2.4"), "replacements": replacements, "left": {}, "step": step} | changes
    )


def test_rebinds_every_name_and_puts_it_back(peer: dict[str, ModuleType]) -> None:
    patch = a_patch(left={"loss": "too small"})
    report = patch.patch()
    late = ModuleType("peer.late")  # imports the name while it is ours
    vars(late).update(function=peer["peer.utils"].function)
    sys.modules["peer.late"] = late
    try:
        assert (peer["peer.utils"].function(2), peer["peer.user"].imported(2), late.function(2)) == (20, 20, 20)
        ours(2)
        assert report.peer == "peer 2.3.1" and report.left == {"loss": "too small"}
        assert {"peer.utils.function", "peer.user.imported"} <= set(report.replaced["ours"])
        assert patch.report() is report and report.calls == {"ours": 3}
        patch.unpatch()
        assert peer["peer.utils"].function is peer["peer.user"].imported is late.function is theirs
        patch.unpatch()
    finally:
        del sys.modules["peer.late"]
    with pytest.raises(RuntimeError, match=r"peer is not patched: call rlhf_fast.integrations.peer.patch\(\) first"):
        patch.report()


def test_a_name_alone_a_class_and_what_is_not_there(peer: dict[str, ModuleType]) -> None:
    replacements = [
        Replacement("peer.utils.function", ours, everywhere=False),
        Replacement("peer.utils.Function", ours, method="apply"),
        Replacement("peer.utils.absent", ours),
        Replacement("peer.utils.older", ours),
    ]
    utils = peer["peer.utils"]
    with a_patch(replacements=replacements).patched() as report:
        assert peer["peer.user"].imported is theirs
        assert (utils.function(1), utils.Function.apply(2), utils.absent(3)) == (10, 20, 30)
        assert report.left == {"peer.utils.older": "not in peer 2.3.1"}
    assert utils.function is theirs and utils.Function.apply is theirs and utils.absent is None


def test_a_second_patch_starts_anew_and_an_error_inside_unpatches(peer: dict[str, ModuleType]) -> None:
    patch = a_patch()
    patch.patch(strict=True)
    with pytest.raises(KeyError), patch.patched() as report:
        assert Trainer(hot=False).step() == 1  # no longer strict
        assert Trainer(hot=True).step() == 10 and report.calls == {"ours": 1}
        raise KeyError
    assert peer["peer.utils"].function is theirs and Trainer(hot=True).step() == 1


def test_strict(peer: dict[str, ModuleType]) -> None:
    with a_patch().patched(strict=True):
        assert Trainer(hot=True).step() == 10
        with pytest.raises(RuntimeError, match="a training step of Trainer did not call ours"):
            Trainer(hot=False).step()
    step = Step("peer.utils.Trainer.step", ours, lambda trainer: trainer.hot)
    with a_patch(step=step).patched(strict=True):
        assert Trainer(hot=False).step() == 1
    assert Trainer(hot=False).step() == 1


@pytest.mark.parametrize("found", ["2.2.9", "2.5.0.dev0", "3.3"])
def test_versions_outside_the_range_are_refused(
    peer: dict[str, ModuleType], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    version(monkeypatch, found)
    with pytest.raises(ImportError, match=rf"expected peer 2.3 to 2.4, which are tested; found {found}"):
        a_patch().patch()
    assert peer["peer.utils"].function is theirs


def test_a_peer_that_is_not_installed() -> None:
    with pytest.raises(ImportError, match="expected no_such_peer 2.3 to 2.4, which are tested; found none"):
        a_patch(peer="no_such_peer").patch()


def test_importing_the_integrations_imports_no_peer() -> None:
    code = "import sys, rlhf_fast.integrations.trl; print({'trl', 'peft', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
