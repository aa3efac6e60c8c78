"""Meta-training: learning the weights of a rule.  Nothing outside this folder imports it."""

from .config import EstimatorConfig, MetaTrainConfig, ObjectiveConfig, TaskConfig
from .recipes import RECIPES
from .trainer import TrainingInterrupted, train

__all__ = [
    "RECIPES",
    "EstimatorConfig",
    "MetaTrainConfig",
    "ObjectiveConfig",
    "TaskConfig",
    "TrainingInterrupted",
    "train",
]
