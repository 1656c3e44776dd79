"""Run a transformers MoE model with its experts in host memory: `load`, `attach`, `generate`.

`engine` owns the pieces and their lifetimes; `layered` serves a MoE layer from Python, `graph` runs whole decode steps
from one CUDA graph, `schedule` is a schedule at work, `recorder` takes down what happened.
"""

from .engine import Engine
from .load import attach, load

__all__ = ["Engine", "attach", "load"]
