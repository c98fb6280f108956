"""The token tree: all strings of a fixed length over a small vocabulary, and policies with a row of logits a prefix.

The smallest world in which a language model's questions can be asked exactly: a policy writes a string token by
token, only the whole string is rewarded, and every probability can be enumerated.
"""

from __future__ import annotations

import torch

from polrl.core.sampling import sample_categorical


class TokenTree:
    """All strings of `depth` tokens from 0 .. `vocabulary` - 1.

    Attributes
    ----------
    strings : Tensor, int64 [N, depth]
        All N = vocabulary^depth strings in lexicographic order.
    prefixes : int
        Number of inner nodes, (vocabulary^depth - 1) / (vocabulary - 1): the rows of a policy's logits.
    nodes : Tensor, int64 [N, depth]
        The node, that is the prefix, from which each token of each string is written. The root is 0, then
        come the prefixes of one token, and so on.

    Examples
    --------
    >>> tree = TokenTree(vocabulary=2, depth=2)
    >>> tree.strings.tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1]]
    >>> tree.nodes.tolist()
    [[0, 1], [0, 1], [0, 2], [0, 2]]
    """

    def __init__(self, vocabulary: int, depth: int, device: torch.device | str = "cpu") -> None:
        if vocabulary < 2 or depth < 1:
            raise ValueError(f"a token tree needs vocabulary >= 2 and depth >= 1, got {vocabulary} and {depth}")
        self.vocabulary = vocabulary
        self.depth = depth
        powers = vocabulary ** torch.arange(depth - 1, -1, -1, device=device)
        number = torch.arange(vocabulary**depth, device=device)
        self.strings = number.unsqueeze(1) // powers % vocabulary
        first_of_level = (vocabulary ** torch.arange(depth, device=device) - 1) // (vocabulary - 1)
        self.nodes = first_of_level + number.unsqueeze(1) // (powers * vocabulary)
        self.prefixes = (vocabulary**depth - 1) // (vocabulary - 1)

    def token_log_probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Return log pi(token | prefix) [N, depth] along every string, for logits [prefixes, vocabulary]."""
        return torch.log_softmax(logits, dim=-1)[self.nodes, self.strings]

    def log_probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Return log pi(y) [N] of every string, for logits [prefixes, vocabulary]."""
        return self.token_log_probabilities(logits).sum(dim=1)

    def sample(self, logits: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw strings; returns their numbers int64 [count], rows of `strings`."""
        return sample_categorical(self.log_probabilities(logits).detach().expand(count, -1), generator)

    def logits_of(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Return the logits [prefixes, vocabulary] of the policy with the given string probabilities [N], all > 0."""
        mass = torch.zeros(self.prefixes, self.vocabulary, dtype=probabilities.dtype, device=probabilities.device)
        for level in range(self.depth):
            place = (self.nodes[:, level], self.strings[:, level])
            mass.index_put_(place, probabilities, accumulate=True)
        return mass.log()
