"""Callbacks for any LightningModule: training methods that work through cores, and writers of predictions."""

from tenzoo.callbacks.groups import PredictsDeviationRate
from tenzoo.callbacks.monitor import NormDynamicsMonitor
from tenzoo.callbacks.rank_watch import RankWatch
from tenzoo.callbacks.rebalance import Rebalance
from tenzoo.callbacks.scaling import DeviationAwareScaling
from tenzoo.prediction import CompletedEntriesWriter, PredictedClassesWriter

__all__ = [
    "CompletedEntriesWriter",
    "DeviationAwareScaling",
    "NormDynamicsMonitor",
    "PredictedClassesWriter",
    "PredictsDeviationRate",
    "RankWatch",
    "Rebalance",
]
