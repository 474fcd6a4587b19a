"""Callbacks that work through the cores of any model."""

from tenzoo.callbacks.groups import PredictsDeviationRate
from tenzoo.callbacks.monitor import NormDynamicsMonitor
from tenzoo.callbacks.prediction import CompletedEntriesWriter, PredictedClassesWriter
from tenzoo.callbacks.rank_watch import RankWatch
from tenzoo.callbacks.rebalance import Rebalance
from tenzoo.callbacks.scaling import DeviationAwareScaling

__all__ = [
    "CompletedEntriesWriter",
    "DeviationAwareScaling",
    "NormDynamicsMonitor",
    "PredictedClassesWriter",
    "PredictsDeviationRate",
    "RankWatch",
    "Rebalance",
]
