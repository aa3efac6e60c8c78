"""Meta-training: learning the weights of a rule.  Nothing outside this folder imports it."""

from ._stop import TrainingInterrupted as TrainingInterrupted
from .config import CurriculumConfig as CurriculumConfig
from .config import EstimatorConfig as EstimatorConfig
from .config import FlatnessConfig as FlatnessConfig
from .config import ImitationConfig as ImitationConfig
from .config import MetaTrainConfig as MetaTrainConfig
from .config import ObjectiveConfig as ObjectiveConfig
from .config import TaskConfig as TaskConfig
from .config import ValidationConfig as ValidationConfig
from .recipes import RECIPES as RECIPES
from .trainer import train as train
