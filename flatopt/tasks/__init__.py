"""Inner problems: optimizees, the data behind them, and distributions of randomised problems for meta-training."""

from ._data import Data as Data
from ._data import Table as Table
from ._optimizee import SPLITS as SPLITS
from ._optimizee import Batch as Batch
from ._optimizee import Optimizee as Optimizee
from ._optimizee import Params as Params
from ._optimizee import Split as Split
from ._optimizee import accuracy as accuracy
from ._optimizee import cross_entropy as cross_entropy
from ._optimizee import mean_squared_error as mean_squared_error
from .cnn import CNN as CNN
from .distribution import Problems as Problems
from .distribution import TaskDistribution as TaskDistribution
from .images import Images as Images
from .images import ImageSplits as ImageSplits
from .images import load_images as load_images
from .mlp import MLP as MLP
from .recurrent import RecurrentLanguageModel as RecurrentLanguageModel
from .recurrent import RecurrentNet as RecurrentNet
from .residual_mlp import ResidualMLP as ResidualMLP
from .tabular import Tabular as Tabular
from .text import Text as Text
from .text import TextSplits as TextSplits
from .text import load_text as load_text
from .transformer import Transformer as Transformer
from .vision_transformer import VisionTransformer as VisionTransformer
