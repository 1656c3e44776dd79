"""Compile the engine's and the simulator's large functions: `python -m tests.support.compile_first`.

CI does so on one core while the checks take the other. Else both workers of the tests compile them side by side, a
minute or two each, since numba does not know that another process is at it.
"""

from prescope.engine.graph.warm import compile_host_parts
from prescope.scheduler.costs import LayerCosts
from prescope.simulator import Simulator
from tests.support.small_run import ROW_BYTES, small_trace


def main() -> None:
    """Simulate something, then compile what runs beside a GPU."""
    costs = LayerCosts(link_us=100.0, gpu_us=5.0, rest_us=200.0, source="made up")
    Simulator(small_trace(steps=4, batch=1, prompt=3, seed=0), costs, row_bytes=ROW_BYTES).run("on-demand")
    compile_host_parts()


if __name__ == "__main__":
    main()
