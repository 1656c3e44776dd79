"""Decode steps that run from one CUDA graph: no launches from Python, no host in the way.

A `GraphStep` is one decode step of a fixed batch over its own static cache. Its first run is served layer by layer;
then it is captured, once for each *driver*: GPU-driven (the GPU decides and fetches misses itself), copy-engine (the
GPU decides, the host hands its orders to the copy engine) and host-driven (the host decides while the step runs; every
cache policy can, and every schedule). What the host does in a step is one call of compiled code: `follow_orders` for
the copy engine, `serve` where it decides.
`DecodeLoop` stands in for transformers' loop in `model.generate`; `Decoder` says which runs.
"""

from .choose import Decoder
from .loop import DecodeLoop
from .step import COPY, GPU, HOST, GraphStep
from .warm import compile_host_parts

__all__ = ["COPY", "GPU", "HOST", "DecodeLoop", "Decoder", "GraphStep", "compile_host_parts"]
