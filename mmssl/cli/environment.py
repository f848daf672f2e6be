"""``mmssl env``: what a run stands on, for the head of its log and for bug reports.  No secrets."""

import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

PACKAGES = ("torch", "torchvision", "lightning", "timm", "webdataset", "wandb")
# Where a cluster's settings stand.  W&B's by name: its other variables hold keys.
_PREFIXES = ("NCCL_", "TORCH_NCCL_", "TORCH_FR_", "GLOO_", "FI_", "UCX_", "OMP_", "MMSSL_")
_NAMES = ("CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "MASTER_PORT", "WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY")
_SLURM = (
    "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_NNODES", "SLURM_NTASKS",
    "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK", "SLURM_CPUS_PER_GPU", "SLURM_GPUS_ON_NODE", "SLURM_RESTART_COUNT",
    "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_SUBMIT_DIR", "SLURM_CLUSTER_NAME",
)  # fmt: skip
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(\w+://)[^/@\s]+@")


def show() -> None:
    """Print versions, host, GPUs, the state of the code, and the variables of SLURM and NCCL; no secrets."""
    print("\n".join(report()), flush=True)


def report(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The report's lines."""
    lines = [f"mmssl {_version('mmssl')}, {_code()}"]
    lines.append(f"python {platform.python_version()}, " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    lines.append(f"host {socket.gethostname()}, {platform.system()} {platform.release()}, {_processors()}")
    lines += _devices()
    lines += [f"{name}={value}" for name, value in variables(environ).items()]
    return lines


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that decide how ranks start and talk; a value that may be secret is left out."""
    shown = {name: environ[name] for name in _SLURM if name in environ}
    for name in sorted(environ):
        if name.startswith(_PREFIXES) or name in _NAMES:
            shown[name] = "(not shown)" if _SECRET.search(name) else _USER_IN_URL.sub(r"\1", environ[name])
    return shown


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _code() -> str:
    """The commit of the checkout that mmssl runs from, and whether it was changed since."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return f"installed in {folder}"
    commit = _said("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD")
    changed = _said("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    if commit is None or changed is None:
        return f"checkout in {folder}, git does not tell its state"
    return f"commit {commit}" + (f" with {len(changed.splitlines())} changed files" if changed else "")


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processors() -> str:
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{usable} of {os.cpu_count()} processors, {memory:.0f} GiB of memory"


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return ["no GPU"]
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0") or "unknown"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    lines = [f"CUDA {torch.version.cuda}, driver {driver}, NCCL {nccl}"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        lines.append(f"GPU {i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return lines
