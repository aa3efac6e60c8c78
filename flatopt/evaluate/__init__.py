"""Measured comparisons with baselines: the command ``flatopt-eval`` and ``python -m flatopt demo``."""

from ._cache import RunCache as RunCache
from ._evaluation import Evaluation as Evaluation
from ._evaluation import option as option
from ._report import Report as Report
from ._report import markdown_table as markdown_table
from ._report import mean_and_std as mean_and_std
from ._training import Benchmark as Benchmark
from .baselines import SAM as SAM
from .baselines import MuonWithAdamW as MuonWithAdamW
from .contestants import Contestant as Contestant
from .contestants import Setting as Setting
from .quality import Quality as Quality
