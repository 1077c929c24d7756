"""T5's relative position bias: one learned number a head for each bucket of distances.

Raffel et al. 2020, section 2.1, arXiv:1910.10683. A key s seen from a query t lies at the distance s − t. Near
distances have a bucket each; those further away share buckets that widen logarithmically, and everything from
`max_distance` on falls into the last one. With n buckets for one direction:

    bucket(d) = d                                                          for d < n/2
    bucket(d) = min(n − 1, n/2 + ⌊ln(2d/n) / ln(2 max_distance / n) · n/2⌋)   beyond

In the encoder half of the buckets is for keys after the query, half for those before it; in the decoder all are for
keys before it. The table (buckets, H) stands in block 0 of published stacks and is used by all their blocks.
"""

import math

import torch
from torch import Tensor, nn


class RelativeBias(nn.Module):
    """The table (buckets, H) and its look-up: (1, H, T, S) for the last T of S positions."""

    def __init__(self, n_buckets: int, max_distance: int, n_head: int, bidirectional: bool):
        super().__init__()
        self.table = nn.Embedding(n_buckets, n_head)
        self.n_buckets = n_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional

    def forward(self, t: int, s: int) -> Tensor:
        positions = torch.arange(s, device=self.table.weight.device)  # (S,)
        distance = positions - positions[s - t :, None]  # (T, S)
        index = buckets(distance, self.n_buckets, self.max_distance, self.bidirectional)  # (T, S)
        return self.table(index).permute(2, 0, 1)[None]  # (1, H, T, S)


def buckets(distance: Tensor, n_buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """The bucket of each distance (key − query), of any shape; without `bidirectional`, keys ahead fall into 0."""
    first = torch.zeros_like(distance)
    if bidirectional:
        # The upper half of the buckets is for keys after the query.
        n_buckets //= 2
        first = (distance > 0).long() * n_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)

    # One bucket a distance up to half of them, then on a logarithmic scale from there to `max_distance`.
    n_exact = n_buckets // 2
    share = torch.log(distance.clamp(min=1).float() / n_exact) / math.log(max_distance / n_exact)
    far = (n_exact + (share * (n_buckets - n_exact)).long()).clamp(max=n_buckets - 1)
    return first + torch.where(distance < n_exact, distance, far)
