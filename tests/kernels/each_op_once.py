"""Every op once on each of a GPU's backends, forward and backward, at its bench's small sizes: what compute-sanitizer
watches.
"""

import torch

from rlhf_fast import backends, use_backend
from rlhf_fast.bench import harness
from rlhf_fast.bench.command import BENCHES, chosen
from rlhf_fast.bench.device import KERNELS
from rlhf_fast.bench.workload import OURS


def main(device: torch.device, kernels: tuple[str, ...]) -> None:
    benches = ",".join(name for name in BENCHES if name != "overhead")  # which calls the same ops again
    smallest = {workload.name(workload.quick): workload for workload in chosen(benches, torch.device("cuda"))}
    for name, workload in smallest.items():
        contest = harness.built(workload, workload.quick, device)
        for backend in kernels:
            if contest.fresh:
                contest.fresh()
            with use_backend(backend):
                contest.runs[OURS]()
            harness.synchronize(device)
            print(name, backend, flush=True)


if __name__ == "__main__":
    device = torch.device("cuda")
    main(device, tuple(name for name in KERNELS if name in backends(device)["gae"]["available"]))
