"""A GPU for each worker: two points measured on one GPU at once would take each other's time, and nobody saw it."""

from collections.abc import Sequence
from typing import Any

from distributed import Client, LocalCluster

from ..device import visible_gpus
from ..errors import UnsupportedOption

VISIBLE = "CUDA_VISIBLE_DEVICES"


class OneGpuEach(LocalCluster):
    """Processes on this machine, each of which sees one GPU, as "cuda"; one that is started again sees the same.

    Args:
        gpus: as `visible_gpus` names them. n_workers: as many at most. kept: of `LocalCluster`.

    Raises:
        UnsupportedOption: there are fewer GPUs than workers.
    """

    def __init__(self, gpus: Sequence[str], n_workers: int, **kept: Any) -> None:
        if n_workers > len(gpus):
            raise UnsupportedOption(
                f"workers={n_workers}, but this process sees {len(gpus)} GPU{'s' * (len(gpus) != 1)} "
                f"({', '.join(gpus)}), and one is measured by one worker at a time; use workers={len(gpus)}"
            )
        self._gpus = list(gpus)
        super().__init__(n_workers=0, **kept)
        try:
            self.scale(n_workers)
            self.sync(self._correct_state)
        except BaseException:
            self.close()
            raise

    def new_worker_spec(self) -> dict[Any, dict[str, Any]]:
        """The next worker's, with a GPU that no other has."""
        taken = {spec["options"]["env"][VISIBLE] for spec in self.worker_spec.values()}
        free = next(gpu for gpu in self._gpus if gpu not in taken)
        [(name, spec)] = super().new_worker_spec().items()
        return {name: {**spec, "options": {**spec["options"], "env": {VISIBLE: free}}}}


def require_gpus_apart(client: Client) -> None:
    """Check that no two workers of a cluster would load their engine onto the same GPU.

    Raises:
        UnsupportedOption: two would.
    """
    taken: dict[tuple[str, str], str] = {}
    for address, gpus in client.run(visible_gpus).items():
        if not gpus:
            continue
        host = address.rpartition(":")[0]
        other = taken.setdefault((host, gpus[0]), address)  # an engine takes the first
        if other != address:
            raise UnsupportedOption(
                f"workers {other} and {address} would both measure on GPU {gpus[0]}; start each with a GPU of its own: "
                f"{VISIBLE}=0 dask worker ..., {VISIBLE}=1 dask worker ..., or dask-cuda's LocalCUDACluster"
            )
