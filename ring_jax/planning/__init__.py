"""The planner: what a training step on a described cluster needs and how long it takes, before any GPU is rented."""

from .hardware import LINKS as LINKS
from .hardware import Cluster as Cluster
from .planner import CompileError as CompileError
from .planner import Plan as Plan
from .planner import leave_gpus_alone as leave_gpus_alone
from .planner import longest as longest
from .planner import make_plan as make_plan
from .planner import meshes as meshes
from .report import ranked as ranked
from .report import ranking as ranking
from .report import to_json as to_json
from .report import to_text as to_text
from .workload import ATTENTION as ATTENTION
from .workload import MODELS as MODELS
from .workload import AttentionShape as AttentionShape
from .workload import Workload as Workload
from .workload import find_model as find_model
