"""Routing that other programs recorded, as a `RoutingTrace`: replayed, swept, and learned from like one's own.

`read` is the door and knows the kinds; `responses` reads what vLLM and SGLang return, `llama_cpp` and `megatron` their
trace files, `tensors` plain arrays and safetensors; `requests` checks what they found and lays it out in steps.
"""

from .read import KINDS, read_trace

__all__ = ["KINDS", "read_trace"]
