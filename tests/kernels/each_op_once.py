"""Every op once, forward and backward, on the GPU at its bench's small sizes: what compute-sanitizer watches."""

import torch

from rlhf_fast.bench import harness
from rlhf_fast.bench.command import BENCHES, chosen
from rlhf_fast.bench.workload import OURS


def main(device: torch.device) -> None:
    benches = ",".join(name for name in BENCHES if name != "overhead")  # which calls the same ops again
    smallest = {workload.name(workload.quick): workload for workload in chosen(benches, torch.device("cuda"))}
    for name, workload in smallest.items():
        contest = harness.built(workload, workload.quick, device)
        if contest.fresh:
            contest.fresh()
        contest.runs[OURS]()
        harness.synchronize(device)
        print(name, flush=True)


if __name__ == "__main__":
    main(torch.device("cuda"))
