"""Interactive views for notebooks; each is one Python class and one hand-written ES module."""

from qsae_kit.widgets.audit import Audit
from qsae_kit.widgets.explorer import FeatureExplorer
from qsae_kit.widgets.layers import LayerLoss
from qsae_kit.widgets.monitor import TrainingMonitor
from qsae_kit.widgets.steering import SteeringLab
from qsae_kit.widgets.tokens import TokenActivations

__all__ = [
    "Audit",
    "FeatureExplorer",
    "LayerLoss",
    "SteeringLab",
    "TokenActivations",
    "TrainingMonitor",
]
