"""Clusters that are not there: XLA compiles for described GPUs, and what it compiled is read back."""

from .gpus import GPUS as GPUS
from .gpus import compile_only_devices as compile_only_devices
from .gpus import gpu_description as gpu_description
from .schedule import Hop as Hop
from .schedule import Schedule as Schedule
from .schedule import read_schedule as read_schedule
