"""`rlhf-fast doctor`: checks of the user's model, tokenizer, data and settings before a long run.

The modules in the order of the work:

1. subject: what the checks of a stage look at: its tokenizer, rows and settings; then its model with all roles.
2. settings, tokens, rows, pairs, between, machine: checks without weights.
3. start: checks of the model; rewards: the Python reward functions.
4. examine: runs the checks; findings, output: what they give, and how it is printed.

A check is a function that returns a finding, or None where it does not apply. Nothing is written to disk.
"""

from rlhf_fast.doctor.examine import doctor, examine
from rlhf_fast.doctor.findings import Finding

__all__ = ["Finding", "doctor", "examine"]
