"""Meta-training: learning the weights of a rule.  Nothing outside this folder imports it."""

from ._stop import TrainingInterrupted
from .config import (
    CurriculumConfig,
    EstimatorConfig,
    FlatnessConfig,
    ImitationConfig,
    MetaTrainConfig,
    ObjectiveConfig,
    TaskConfig,
    ValidationConfig,
)
from .recipes import RECIPES
from .trainer import train

__all__ = [
    "RECIPES",
    "CurriculumConfig",
    "EstimatorConfig",
    "FlatnessConfig",
    "ImitationConfig",
    "MetaTrainConfig",
    "ObjectiveConfig",
    "TaskConfig",
    "TrainingInterrupted",
    "ValidationConfig",
    "train",
]
