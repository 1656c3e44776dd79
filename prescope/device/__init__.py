"""Devices: CUDA, the CPU with an emulated link, and a null device with a virtual clock."""

from typing import Any

import torch

from ..core.machine import CPU_DEVICE
from ..errors import UnsupportedOption
from .base import Device, Events, LinkFunctions, Mark
from .cuda import CudaDevice, visible_gpus
from .emulated import EmulatedLinkDevice, emulated_link_gb_per_s
from .null import NullDevice

__all__ = [
    "DEVICES",
    "CudaDevice",
    "Device",
    "EmulatedLinkDevice",
    "Events",
    "LinkFunctions",
    "Mark",
    "NullDevice",
    "describe_auto",
    "emulated_link_gb_per_s",
    "open_device",
    "resolve_device",
    "torch_device_of",
    "visible_gpus",
]


#: By the name a user gives; what each can do stands in its attributes (`Device`).
DEVICES: dict[str, type[Device]] = {
    "cuda": CudaDevice,
    "cpu": EmulatedLinkDevice,
    "null": NullDevice,
}


def resolve_device(device: str, link_gb_per_s: float | None, model_device: torch.device) -> tuple[str, str]:
    """What "auto" means here, with the reason: the GPU if there is one, else the CPU with an emulated link."""
    if device != "auto":
        return device, "as given"
    if link_gb_per_s is not None:
        return "cpu", "link_gb_per_s asks for an emulated link"
    if model_device.type == "cuda":
        return str(model_device), "the model is on the GPU"
    if torch.cuda.is_available():
        return "cuda", f"torch sees {torch.cuda.get_device_name()}"
    return "cpu", "torch sees no CUDA GPU; the CPU stands in for it, the link is emulated"


def describe_auto() -> dict[str, Any]:
    """Device and link that "auto" would open here, as its `describe()` names them; opens none.

    nvidia-smi also knows GPUs that torch cannot use: it is built without CUDA, or CUDA_VISIBLE_DEVICES leaves them out.
    """
    if resolve_device("auto", None, torch.device("cpu"))[0] == "cuda":
        return {"device": torch.cuda.get_device_name(), "link": "measured"}
    return {"device": CPU_DEVICE, "link": "emulated"}


def torch_device_of(device: str | torch.device) -> torch.device:
    """Where torch puts tensors for a device as a user names it; "auto" is the GPU if there is one, else the CPU.

    Raises:
        UnsupportedOption: there is no such device here.
    """
    name, _ = resolve_device(str(device), None, torch.device("cpu"))
    try:
        found = torch.device("cpu" if name == "null" else name)
        torch.empty(0, dtype=torch.float32, device=found)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UnsupportedOption(
            f"device is {device!r}, which torch has not here ({str(error).splitlines()[0]}); choose 'auto', 'cpu', or "
            f"a GPU that is there, such as 'cuda:0'"
        ) from error
    return found


def open_device(kind: str, link_gb_per_s: float | None, row_bytes: int, link_factor: int = 1) -> Device:
    """Open a device of a resolved kind, such as "cuda" or "cuda:1".

    Args:
        row_bytes: of an expert; an emulated link's default follows from it.

    Raises:
        UnsupportedOption: there is no such GPU, or `link_factor` without a real link.
    """
    kind, _, index = kind.partition(":")
    if kind == "cuda":
        return CudaDevice(int(index) if index else None, link_factor=link_factor)
    if link_factor != 1:
        raise UnsupportedOption(
            f"link_factor={link_factor} makes a GPU's link slower; without one say link_gb_per_s=..."
        )
    link = emulated_link_gb_per_s(row_bytes) if link_gb_per_s is None else link_gb_per_s
    return NullDevice(link) if kind == "null" else EmulatedLinkDevice(link)
