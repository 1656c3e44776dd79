"""Will this model run here, how fast, and with which settings? From a `config.json` and a few numbers of the machine.

`model_size` reads what memory a model needs, `machine_spec` what a machine can do, measured or typed in; `capacity`
simulates made-up routing between the two, and `advice` is what comes back; `paces` says how fast batches are.
"""

from .advice import Advice, CapacityPoint
from .capacity import INTERVAL, advise
from .machine_spec import KNOWN, MachineSpec
from .model_size import ModelSize
from .paces import paces

__all__ = ["INTERVAL", "KNOWN", "Advice", "CapacityPoint", "MachineSpec", "ModelSize", "advise", "paces"]
