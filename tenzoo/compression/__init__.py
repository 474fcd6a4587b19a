"""A trained dense network in, a tensorized one out.

Example:
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3))
    >>> made = plan(model, factorization="tt", budget=0.4)
    >>> _ = apply_(model, made)
    >>> sum(parameter.numel() for parameter in model.parameters()) == made.parameters
    True
"""

from tenzoo.compression.apply import apply_, fold_, restore_
from tenzoo.compression.decide import plan
from tenzoo.compression.export import export
from tenzoo.compression.plans import LayerPlan, Plan

__all__ = ["LayerPlan", "Plan", "apply_", "export", "fold_", "plan", "restore_"]
