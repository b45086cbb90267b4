"""How varied the responses of a rollout are, by pairs of neighbouring tokens."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import pairwise


def distinct_2(token_ids: Sequence[Sequence[int]]) -> float:
    """The share of distinct bigrams among all bigrams of the responses (Li et al. 2016); 1 if there are none."""
    bigrams = [pair for tokens in token_ids for pair in pairwise(tokens)]
    return len(set(bigrams)) / len(bigrams) if bigrams else 1.0


def repetition(token_ids: Sequence[Sequence[int]]) -> float:
    """The share of bigrams that stand earlier in the same response; 0 if there are none."""
    each = [list(pairwise(tokens)) for tokens in token_ids]
    count = sum(map(len, each))
    return 1 - sum(len(set(bigrams)) for bigrams in each) / count if count else 0.0


def similarity(prompts: Sequence[Hashable], token_ids: Sequence[Sequence[int]]) -> float:
    """The chance that a bigram of one response is in the responses to another prompt; 0 with fewer than two prompts.

    Args:
        prompts: the prompt of each response; responses to one prompt may be alike.
    """
    others = len(set(prompts)) - 1
    owners: dict[tuple[int, int], set[Hashable]] = defaultdict(set)
    for prompt, tokens in zip(prompts, token_ids, strict=True):
        for bigram in pairwise(tokens):
            owners[bigram].add(prompt)
    shared = [len(owners[bigram]) - 1 for tokens in token_ids for bigram in set(pairwise(tokens))]
    return sum(shared) / len(shared) / others if shared and others else 0.0
