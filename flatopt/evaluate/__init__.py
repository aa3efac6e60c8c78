"""Measured comparisons with baselines: the command ``flatopt-eval`` and ``python -m flatopt.evaluate.demo``."""

from ._report import Report as Report
from ._report import RunCache as RunCache
from ._report import markdown_table as markdown_table
from ._report import mean_and_std as mean_and_std
from ._training import Benchmark as Benchmark
from ._training import Options as Options
from .baselines import SAM as SAM
from .baselines import Contestant as Contestant
