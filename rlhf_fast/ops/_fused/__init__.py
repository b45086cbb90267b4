"""The ops on fused kernels: for each, the torch custom op with its fake and its autograd formula, over the kernels'
launchers. One op a file, under the names of rlhf_fast/ops; importing this package registers them all.
"""

from . import masked_logprobs as masked_logprobs
