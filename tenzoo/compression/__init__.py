"""A trained dense network in, a tensorized one out.

Example:
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3))
    >>> small = plan(model, factorization="tt", budget=0.4)
    >>> _ = apply_(model, small)
    >>> sum(parameter.numel() for parameter in model.parameters()) == small.parameters
    True
"""

from tenzoo.compression.apply import apply_
from tenzoo.compression.decide import plan
from tenzoo.compression.export import export
from tenzoo.compression.fold import fold_
from tenzoo.compression.plans import LayerPlan, Plan
from tenzoo.compression.refine import refine_
from tenzoo.compression.restore import restore_

__all__ = ["LayerPlan", "Plan", "apply_", "export", "fold_", "plan", "refine_", "restore_"]
