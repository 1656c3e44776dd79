"""How many threads the CPU lane may have."""

import os
from pathlib import Path

#: Cores left alone: one for the thread that launches kernels, one for whatever moves bytes (the emulated link's copies,
#: the driver's interrupts) and the operating system.
SPARE_CORES = 2


def physical_cores(cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """Cores among the CPUs this process may use; two hyperthreads of one core share its units and count once."""
    if hasattr(os, "sched_getaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
    else:
        allowed = list(range(os.cpu_count() or 1))
    return len({_siblings(cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list", cpu) for cpu in allowed})


def default_threads() -> int:
    """All cores but those of the main thread and the link, at least one."""
    return max(1, physical_cores() - SPARE_CORES)


def may_stay_awake(threads: int) -> bool:
    """Whether this many threads may wait without sleeping, without taking a core that others need."""
    return threads + SPARE_CORES <= physical_cores()


def _siblings(file: Path, cpu: int) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # not Linux, or a container that hides it
        return str(cpu)
