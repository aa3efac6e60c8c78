"""Inner problems: optimizees, the data behind them, and distributions of randomised problems for meta-training."""

from ._task import SPLITS as SPLITS
from ._task import Batch as Batch
from ._task import ClassificationTask as ClassificationTask
from ._task import Optimizee as Optimizee
from ._task import Params as Params
from ._task import Split as Split
from ._task import Task as Task
from ._task import accuracy as accuracy
from ._task import cross_entropy as cross_entropy
from ._task import mean_squared_error as mean_squared_error
from .cnn import CNN as CNN
from .distribution import Problems as Problems
from .distribution import TaskDistribution as TaskDistribution
from .images import ImageSplits as ImageSplits
from .images import ImageTask as ImageTask
from .images import load_images as load_images
from .mlp import MLP as MLP
from .recurrent import RecurrentNet as RecurrentNet
from .synthetic import QuadraticTask as QuadraticTask
from .synthetic import TeacherStudentTask as TeacherStudentTask
from .text import TextSplits as TextSplits
from .text import TextTask as TextTask
from .text import load_text as load_text
from .transformer import Transformer as Transformer
