"""How hard the terms of the objective pull at the student's logits, and whether in one direction.

With N samples in an optimiser step, over all its batches and processes, the step's objective is a mean over them. N
times the gradient of one of its terms with respect to the student's logits is a vector with a part for each sample,
g_i (K,): the gradient of that sample's ``beta · loss``, say. Parts of different samples lie on different coordinates,
so their squares add up, in whichever batches and processes they are. Over all n samples since the last log::

    grad_norm_ce, grad_norm_distill    sqrt(sum_i |g_i|² / n)
    grad_cosine                        sum_i <g_i^ce, g_i^distill> / sqrt(sum_i |g_i^ce|² · sum_i |g_i^distill|²)

The norms do not depend on the batch size, and their ratio is that of the two gradients. Cross-entropy is a mean over
the N_y samples that have a label: the others' g_i is 0, and theirs is N / N_y times that of ``ce_weight · CE``.

For each term the graph is walked once more, but only from the term to the logits: some passes over (B, K) tensors,
nothing of the network. The gradients that train are left as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .losses.functional import promote


# A term on features does not go through the logits.
_TERMS = ("ce", "distill")
_SQUARE = "gradient of {}, squared"
_PRODUCT = "product of gradients"


def watched(logits: Tensor) -> Tensor:
    """The same logits (B, K), in a place of the graph where looking at gradients is noticed by nobody.

    FSDP and DeepSpeed put hooks on what a network returns, which would take the look for the backward pass.
    """
    return logits.view_as(logits)


@torch.no_grad()
def products(terms: Mapping[str, Tensor], logits: Tensor, scale: float | Tensor) -> dict[str, Tensor]:
    """Squares and product of the terms' gradients, summed over the samples of a batch: scalars.

    Args:
        terms: of the objective, by name; the gradients of "ce" and "distill" are looked at.
        logits: from :func:`watched`, that the terms were computed from. A term that does not go through them (a loss
            that takes them from elsewhere) has no gradient here, and is left out.
        scale: what the gradients are multiplied by: how many samples the terms are divided by.
    """
    gradients = {}
    for name in _TERMS:
        if name in terms and terms[name].requires_grad and logits.requires_grad:
            (gradient,) = torch.autograd.grad(terms[name], logits, retain_graph=True, allow_unused=True)
            if gradient is not None:
                gradients[name] = scale * promote(gradient)
    found = {_SQUARE.format(name): gradient.square().sum() for name, gradient in gradients.items()}
    if len(gradients) == len(_TERMS):
        ce, distill = gradients.values()
        found[_PRODUCT] = (ce * distill).sum()
        # Where one of them is not finite none is: those that are left out are left out together.
        nothing = 0.0 * sum(found.values())
        found = {name: total + nothing for name, total in found.items()}
    return found


def norms_and_cosine(means: Mapping[str, float]) -> dict[str, float]:
    """Means over samples, with those of :func:`products` turned into ``grad_norm_...`` and ``grad_cosine``.

    A gradient of 0 has no direction: there the cosine is left out.
    """
    squares = {name: means[_SQUARE.format(name)] for name in _TERMS if _SQUARE.format(name) in means}
    used = {_PRODUCT, *(_SQUARE.format(name) for name in squares)}
    found = {name: value for name, value in means.items() if name not in used}
    norms = {name: math.sqrt(square) for name, square in squares.items()}
    found.update({f"grad_norm_{name}": norm for name, norm in norms.items()})
    if _PRODUCT in means and (size := math.prod(norms.values())):
        # Rounding can take it a little further.
        found["grad_cosine"] = max(-1.0, min(1.0, means[_PRODUCT] / size))
    return found
