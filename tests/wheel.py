"""`python tests/wheel.py dist`: a wheel on a machine without a compiler.

Installs the wheel of that folder into a fresh environment without a compiler on PATH, and runs the op tests in a
separate folder, so that neither the checkout nor its module is used by mistake.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import version
from pathlib import Path

TESTS = Path(__file__).parent


def main(folder: Path) -> None:
    (wheel,) = folder.resolve().glob("rlhf_fast-*.whl")
    print(f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB")
    with tempfile.TemporaryDirectory() as place:
        venv.create(f"{place}/venv", with_pip=True)
        bin = f"{place}/venv/bin"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RLHF_FAST_")}
        environment |= {"PATH": bin, "CXX": "none", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}

        def run(*command: str) -> None:
            subprocess.run([f"{bin}/python", "-m", *command], cwd=place, env=environment, check=True)

        run("pip", "install", "--quiet", f"torch=={version('torch').partition('+')[0]}")
        run("pip", "install", "--quiet", str(wheel), "pytest", "hypothesis", "triton>=3.6")
        shutil.copytree(TESTS / "ops", f"{place}/ops", ignore=shutil.ignore_patterns("__pycache__"))
        # inductor, the default of torch.compile, needs a C++ compiler
        run("pytest", "-q", "ops", "-p", "no:cacheprovider", "-k", "not inductor")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: {sys.argv[0]} FOLDER_WITH_THE_WHEEL")
    main(Path(sys.argv[1]))
