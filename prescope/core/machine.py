"""Facts about the machine a run took place on, for `RunResult.hardware`, and which machine it is, for a profile.

Measured curves are in `profile`. Knows nothing of torch: GPU and link are asked of nvidia-smi.
"""

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

NVIDIA_SMI_SECONDS = 20
GIT_SECONDS = 10
MEMINFO = Path("/proc/meminfo")


class Place(NamedTuple):
    """What a measured time depends on; two machines of equal places are taken for the same."""

    cpu: str  # with family, model and stepping: virtual machines call many CPUs by one name
    cores: int
    device: str  # GPU, or what stands in for it
    link: str  # "PCIe 5 x16", "PCIe" where nothing is known of it, "emulated", "virtual"

    def __str__(self) -> str:
        link = f"an {self.link} link" if self.link == "emulated" else self.link
        return f"{self.device} behind {link}, {self.cores} cores of {self.cpu}"


def this_place(described: Mapping[str, Any] | None = None) -> Place:
    """The machine at hand.

    Args:
        described: a device's `describe()`; None: the first GPU that nvidia-smi knows, else the CPU standing in for one.
    """
    gpus = gpu_links()
    if described is None:
        device = next(iter(gpus), CPU_DEVICE)
        kind = "measured" if gpus else "emulated"
    else:
        device, kind = str(described["device"]), str(described["link"])
    is_real = kind == "measured" or (described or {}).get("link_factor", 1) > 1  # a real link, made slower
    link = gpus.get(device, "PCIe") if is_real else kind
    return Place(_cpu_name() + _cpu_model(), os.cpu_count() or 1, device, link)


#: What `EmulatedLinkDevice` calls the CPU that stands in for a GPU.
CPU_DEVICE = "CPU (standing in for the GPU)"


@cache
def gpu_links() -> dict[str, str]:
    """The GPUs nvidia-smi knows by name, each with its link, such as "PCIe 5 x16"; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return {}
    # The most that GPU and slot can do together: the link in use falls to PCIe 1 while the GPU idles.
    query = ["nvidia-smi", "--query-gpu=name,pcie.link.gen.max,pcie.link.width.max", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    links: dict[str, str] = {}
    for line in answer.stdout.splitlines():
        name, gen, width = ([part.strip() for part in line.split(",")] + ["", ""])[:3]
        links.setdefault(name, f"PCIe {gen} x{width}" if gen.isdigit() and width.isdigit() else "PCIe")
    return links


def available_memory_bytes() -> int:
    """Host memory that can be taken without swapping, within a container's limit if there is one."""
    _, available = _memory_bytes()
    return min([available, *_container_bytes()])


def _memory_bytes() -> tuple[int, int]:
    """All of it, and what can be taken."""
    if MEMINFO.exists():
        sizes = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
        total, available = sizes["MemTotal"], sizes.get("MemAvailable", sizes["MemFree"])
        return int(total.split()[0]) * 1024, int(available.split()[0]) * 1024
    memory = import_module("psutil").virtual_memory()  # not Linux; there nothing needs it
    return int(memory.total), int(memory.available)


def _container_bytes(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What a control group of Linux leaves to this container: its limit less what it holds besides file caches."""
    left = []
    for limit, used, caches in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        try:
            most, held = (root / limit).read_text().strip(), int((root / used).read_text())
            stats = dict(line.split() for line in (root / caches).read_text().splitlines())
        except (OSError, ValueError):  # the other version, or no control groups
            continue
        if most.isdigit():
            left.append(max(0, int(most) - held + int(stats.get("inactive_file", 0))))
    return left


def machine_facts() -> dict[str, Any]:
    """CPU, cores, memory, operating system, and the versions and the commit that decide speed."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "host_memory_gib": round(_memory_bytes()[0] / 2**30, 1),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "commit": commit(),
        **{name: _version(name) for name in ("prescope", "torch", "transformers", "triton")},
    }


@cache
def commit() -> str:
    """Of the checkout that this code runs from, with "+" behind it where files differ from it; "" outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file() or not (root / ".git").exists():
        return ""
    git = ["git", "-c", f"safe.directory={root}", "-C", str(root)]
    try:
        asked = [
            subprocess.run(
                [*git, *words], capture_output=True, text=True, timeout=GIT_SECONDS, check=True
            ).stdout
            for words in (
                ("rev-parse", "--short=12", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no"),
            )
        ]
    except (OSError, subprocess.SubprocessError):  # no git, or no commit yet
        return ""
    return asked[0].strip() + ("+" if asked[1].strip() else "")


@cache
def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    wanted = {"cpu family": "family", "model": "model", "stepping": "stepping"}
    found: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        name, _, value = line.partition(":")
        if name.strip() in wanted:
            found.setdefault(name.strip(), f"{wanted[name.strip()]} {value.strip()}")
    return f" ({' '.join(found[name] for name in wanted if name in found)})" if found else ""


@cache  # reads a package's metadata each time: 5 ms of every run's result
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
