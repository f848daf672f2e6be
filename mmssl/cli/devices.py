"""Whether this machine has the devices that a config asks for: one line before a Trainer is made, in our words."""

import os
from typing import Any

import torch
from lightning.pytorch.accelerators import AcceleratorRegistry

from mmssl.cli.keys import UsageError, nearest


def check_devices(trainer: dict[str, Any]) -> None:
    """Compare ``trainer.accelerator`` and ``trainer.devices`` with this machine.

    Args:
        trainer: the Trainer's arguments.

    Raises:
        UsageError: There is no such accelerator, there are too few GPUs, or ``devices`` is no number of them.
    """
    accelerator, devices = trainer["accelerator"], _read(trainer["devices"])
    if isinstance(accelerator, str):
        _check_accelerator(accelerator)
    if devices is None:
        raise UsageError(
            f"trainer.devices is {trainer['devices']}; give how many, 1 or more, or auto for all of this machine's"
        )
    gpus = torch.cuda.device_count() if accelerator in ("gpu", "cuda", "auto") else 0
    if gpus:
        _check_count(devices, gpus)
    elif devices != "auto" and not (isinstance(devices, int) and devices > 0) and not _is_there("mps"):
        raise UsageError(f"trainer.devices is {devices}, and there is no GPU to choose; give how many processes")


def _read(devices: Any) -> int | list[int] | str | None:
    """``trainer.devices`` as Lightning takes it: "2" are two, "0,3" are these, "-1" are all; None if it is nothing."""
    if isinstance(devices, str) and devices != "auto":
        try:
            numbers = [int(part) for part in devices.split(",") if part.strip()]
        except ValueError:
            return None
        devices = numbers if "," in devices else numbers[0] if numbers else None
    nothing = not devices or (isinstance(devices, int) and devices < -1)
    return None if nothing else devices


def _check_accelerator(name: str) -> None:
    known = sorted({"auto", "gpu", *AcceleratorRegistry.available_accelerators()})
    if name not in known:
        raise UsageError(f"trainer.accelerator is {name!r}{nearest(name, known)}")
    if name == "auto" or (name == "gpu" and _is_there("mps")):
        return
    if name in ("gpu", "cuda"):
        if not torch.cuda.device_count():
            raise UsageError(f"trainer.accelerator is {name}, but {_why_no_gpu()}, or set trainer.accelerator to cpu")
    elif not _is_there(name):
        found = sorted(filter(_is_there, AcceleratorRegistry.available_accelerators()))
        raise UsageError(f"trainer.accelerator is {name}, and this machine has none; it has: {', '.join(found)}")


def _is_there(name: str) -> bool:
    return name == "cpu" or bool(AcceleratorRegistry[name]["accelerator"].is_available())


def _why_no_gpu() -> str:
    """Why torch sees no GPU, and what to do about it."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA; install one with it"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"torch sees no GPU with CUDA_VISIBLE_DEVICES={visible!r}; set that to the GPUs to use, or unset it"
    return "torch finds no GPU on this machine; look whether nvidia-smi lists one, and ask for one in a job"


def _check_count(devices: int | str | list[int], gpus: int) -> None:
    has = f"this machine has {gpus} GPU{'s' if gpus > 1 else ''}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        has += f" (CUDA_VISIBLE_DEVICES={visible})"
    if isinstance(devices, int) and devices > gpus:
        raise UsageError(f"trainer.devices is {devices}, but {has}; set it to {gpus}, or to auto for all there are")
    if not isinstance(devices, int | str) and any(not -1 <= number < gpus for number in devices):
        numbers = "0" if gpus == 1 else f"0 to {gpus - 1}"
        raise UsageError(f"trainer.devices names {devices}, but {has}: number {numbers}")
