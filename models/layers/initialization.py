"""How new weights begin."""

import torch
from torch import nn

from ...kernels import Linear
from .heads import MLPHead


@torch.no_grad()
def initialize(module: nn.Module, std: float = 0.02, excluded: nn.Parameter | None = None) -> None:
    """N(0, std²) for matrices, zero for biases, one for norm weights: GPT-2's and BERT's initialisation.

    A head of D columns that scores a text begins with N(0, 1/(D + 1)) (Stiennon et al. 2020, arXiv:2009.01325). The
    matrix `excluded` stays as it is.
    """
    for child in module.modules():
        if isinstance(child, Linear | nn.Embedding) and child.weight is not excluded:
            child.weight.normal_(0.0, std)

        for name, parameter in child.named_parameters(recurse=False):
            if name == "bias":
                parameter.zero_()
            elif parameter.dim() == 1:  # a norm's weight
                parameter.fill_(1.0)

    # In a second pass: a head comes before its own projection, which would be drawn over above.
    for child in module.modules():
        if isinstance(child, MLPHead) and child.scalar:
            child.out.weight.normal_(0.0, (child.out.in_features + 1) ** -0.5)
