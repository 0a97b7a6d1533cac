"""Edges, weights and losses of boosted residual blocks: the mathematics of `meprop.boost`.

Source: Huang, Ash, Langford and Schapire, "Learning Deep ResNet Blocks Sequentially using Boosting Theory" (ICML 2018,
arXiv 1706.04964). docs/recipes/boost.md derives the loss.
"""

from __future__ import annotations

from math import copysign, inf, log, sqrt

from torch import Tensor, float32, promote_types

__all__ = ["alpha_of", "cost_matrix", "edge_of", "gamma_of", "log_exponential_loss"]

_LARGEST_EDGE = 1 - 1e-12
"""An edge of 1 would have an infinite alpha. This one has 14.2."""


def cost_matrix(scores_NK: Tensor, target_N: Tensor) -> Tensor:
    """What each answer costs, by the scores of the classifiers before.

    C(i, l) = exp(s(i, l) - s(i, y_i)) for a wrong class l. C(i, y_i) is minus the sum of the others.

    Args:
        scores_NK: Scores s = alpha_t o_t, ``[N, K]``.
        target_N: The right classes, int64 ``[N]``.

    Returns:
        float64 ``[N, K]``.
    """
    of_target = target_N[:, None]
    scores_NK = scores_NK.double()
    cost_NK = (scores_NK - scores_NK.gather(1, of_target)).exp().scatter(1, of_target, 0.0)
    return cost_NK.scatter(1, of_target, -cost_NK.sum(dim=1, keepdim=True))


def edge_of(outputs_NK: Tensor, cost_NK: Tensor) -> float:
    """The edge of a classifier: -sum(C * o) / Z, where Z is the sum of the costs of wrong classes.

    Args:
        outputs_NK: Probabilities o, ``[N, K]``.
        cost_NK: What `cost_matrix` returns.

    Returns:
        From -1 to 1. 0 for a classifier that gives all classes the same probability.
    """
    edge = -float((cost_NK * outputs_NK).sum() / cost_NK.clamp(min=0).sum())
    return max(min(edge, 1.0), -1.0)  # which rounding can exceed; in this order NaN stays NaN


def alpha_of(edge: float) -> float:
    """The weight of a classifier by its edge: ln((1 + edge) / (1 - edge)) / 2, from -14.2 to 14.2."""
    edge = max(min(edge, _LARGEST_EDGE), -_LARGEST_EDGE)  # in this order NaN stays NaN
    return log((1 + edge) / (1 - edge)) / 2


def gamma_of(edge: float, before: float) -> float:
    """What a block has gained: the root of (edge^2 - before^2) / (1 - before^2).

    Args:
        edge: The edge of the block's classifier.
        before: That of the classifier before it.

    Returns:
        At most 1. Where the edge is smaller than the one before, minus the root of the magnitude. 0 after an edge of 1,
        over which nothing can be gained.
    """
    if before == 1:
        return 0.0
    square = (edge**2 - before**2) / (1 - before**2)
    return copysign(sqrt(abs(square)), square)


def log_exponential_loss(scores_NK: Tensor, target_N: Tensor) -> Tensor:
    """The logarithm of the exponential loss, which is the mean of exp(cross_entropy) - 1.

    exp(cross_entropy) - 1 of an example i is the sum over wrong classes l of exp(s(i, l) - s(i, y_i)). Its mean is at
    least the share of examples that the scores get wrong. It overflows where its logarithm does not. The gradient of
    the logarithm is that of the mean, divided by the mean. It is formed in float32 or wider.

    Args:
        scores_NK: Scores, ``[N, K]``.
        target_N: The right classes, int64 ``[N]``.
    """
    of_target = target_N[:, None]
    scores_NK = scores_NK.to(promote_types(scores_NK.dtype, float32))
    differences_NK = (scores_NK - scores_NK.gather(1, of_target)).scatter(1, of_target, -inf)
    return differences_NK.flatten().logsumexp(dim=0) - log(len(target_N))
