"""Callbacks that work through the cores of any model."""

from tenzoo.callbacks.monitor import NormDynamicsMonitor
from tenzoo.callbacks.rank_watch import RankWatch
from tenzoo.callbacks.rebalance import Rebalance
from tenzoo.callbacks.scaling import DeviationAwareScaling
from tenzoo.predictions import CompletedEntriesWriter, PredictedClassesWriter

__all__ = [
    "CompletedEntriesWriter",
    "DeviationAwareScaling",
    "NormDynamicsMonitor",
    "PredictedClassesWriter",
    "RankWatch",
    "Rebalance",
]
