"""The Mosaic GPU kernels with the backward pass that adds in a fixed order: two runs give identical bits."""

from .contract import unchanged_d_query as finished_d_query
from .mosaic_gpu import deterministic_backward as backward
from .mosaic_gpu import forward, unsupported_reason

__all__ = ["backward", "finished_d_query", "forward", "unsupported_reason"]
