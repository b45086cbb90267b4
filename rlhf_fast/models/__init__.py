"""The shared base with its adapters and heads, loading and saving."""

from rlhf_fast.models.heads import ScoreHead
from rlhf_fast.models.measure import same_states
from rlhf_fast.models.merged import Merged
from rlhf_fast.models.pretrained import load_pretrained
from rlhf_fast.models.shared import SharedBase, last_states
from rlhf_fast.models.vocabulary import Vocabulary

__all__ = ["Merged", "ScoreHead", "SharedBase", "Vocabulary", "last_states", "load_pretrained", "same_states"]
