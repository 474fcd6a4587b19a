"""Deviation-Aware Scaling in a training loop of one's own, without Lightning.

A Tucker tensor is fitted by SGD to a target that is seen through fresh noise in every step, starting from cores of
very different norms. SGD alone (alpha 0) lets their Norm Deviation Q fall slowly, as its steps are finite; DAS makes it
fall as SAM would, at the price of a few norms per step. The error is relative, against the target without noise.

    python examples/das_in_plain_torch.py
"""

import torch

from tenzoo import find_core_groups
from tenzoo.dynamics import bound_factors, deviation_aware_factors, norm_deviation, squared_norms
from tenzoo.factorizations import Tucker

SHAPE, RANK, LR, STEPS, NOISE = (12, 10, 8), 3, 1e-3, 2000, 0.5


def fit(alpha: float) -> tuple[float, float, float]:
    """Train at one strength of DAS; return Q before, Q after, and the error."""
    torch.manual_seed(0)
    target = Tucker(SHAPE, RANK).reconstruct().detach()
    model = Tucker(SHAPE, RANK)
    (group,) = find_core_groups(model)  # of any model, in a list
    with torch.no_grad():
        group.cores[0].mul_(2)  # the same tensor, out of balance
        group.cores[1].div_(2)
    before = norm_deviation(squared_norms(group.cores))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(STEPS):
        observed = target + NOISE * torch.randn(SHAPE)
        optimizer.zero_grad()
        (model() - observed).square().sum().div(2).backward()
        with torch.no_grad():
            s, gamma = squared_norms(group.cores), squared_norms([core.grad for core in group.cores])
            factors = deviation_aware_factors(s, gamma, lr=LR, alpha=alpha)
            for core, factor in zip(group.cores, bound_factors(factors, max_scale=0.1), strict=True):
                core.mul_(1 + factor)  # after backward(), before step()
        optimizer.step()
    error = (model() - target).norm() / target.norm()
    return before.item(), norm_deviation(squared_norms(group.cores)).item(), error.item()


if __name__ == "__main__":
    torch.set_num_threads(1)  # the fastest for tensors this small
    print(f"{'':12}{'Q before':>10}{'Q after':>10}{'error':>10}")
    for alpha in (0, 0.1, 0.5):
        before, after, error = fit(alpha)
        print(f"alpha {alpha:<6g}{before:>10.2f}{after:>10.2f}{error:>10.4f}")
