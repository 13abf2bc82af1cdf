"""The trainer: options, the compiled step, and the loop around it."""

from .config import TrainConfig as TrainConfig
from .config import load_config as load_config
from .config import parse_seq_len as parse_seq_len
from .loop import TrainResult as TrainResult
from .loop import train as train
from .optimizer import OptimizerConfig as OptimizerConfig
from .step import DeviceBatch as DeviceBatch
from .step import StepConfig as StepConfig
from .step import StepMetrics as StepMetrics
from .step import TrainState as TrainState
from .step import TrainStep as TrainStep
