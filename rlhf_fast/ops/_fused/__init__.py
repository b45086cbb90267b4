"""The ops on fused kernels: for each, the torch custom op with its fake and its autograd formula, over the kernels'
launchers. One op a file, under the names of rlhf_fast/ops; importing this package registers them all.
"""

from . import clipped_policy_loss as clipped_policy_loss
from . import clipped_value_loss as clipped_value_loss
from . import exact_kl as exact_kl
from . import gae as gae
from . import linear_cross_entropy as linear_cross_entropy
from . import linear_logprobs as linear_logprobs
from . import linear_policy_loss as linear_policy_loss
from . import linear_policy_ref as linear_policy_ref
from . import masked_logprobs as masked_logprobs
from . import masked_whiten as masked_whiten
from . import ppo_loss as ppo_loss
from . import token_kl as token_kl
