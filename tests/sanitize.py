"""The op tests on an engine compiled with AddressSanitizer and UndefinedBehaviorSanitizer, on each CPU path in turn.

They run on an unpacked wheel, so that the engine of the checkout is not replaced.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rlhf_fast import build_info

ROOT = Path(__file__).parent.parent


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        settings = {"RLHF_FAST_SANITIZE": "address,undefined", "RLHF_FAST_CUDA": "0"}
        command = ["pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", place, ROOT]
        subprocess.run([sys.executable, "-m", *command], env=os.environ | settings, check=True)
        (wheel,) = Path(place).glob("*.whl")
        zipfile.ZipFile(wheel).extractall(place)
        for path in build_info()["cpu_paths"]:
            print(f"{path}:", flush=True)
            command = [
                "pytest",
                "-q",
                ROOT / "tests" / "ops",
                "-p",
                "no:cacheprovider",
                "--capture=sys",
                "-k",
                "native",
            ]
            subprocess.run([sys.executable, "-m", *command], env=environment(place, path), cwd=place, check=True)


def environment(place: str, path: str) -> dict[str, str]:
    """Python itself is not instrumented, so the sanitizers' libraries must be loaded before it starts."""
    compiler = os.environ.get("CXX", "c++")
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return os.environ | {
        "PYTHONPATH": place,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
        "RLHF_FAST_CPU_PATH": path,
    }


if __name__ == "__main__":
    main()
