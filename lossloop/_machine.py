"""What a time was measured on."""

import platform
from datetime import date
from pathlib import Path

import torch


def processor() -> str:
    """The name of the machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def matmul_precision() -> str:
    """Of products of float32 matrices, as torch is set; "mixed" if it cannot say.

    It does not any more once one of the newer settings was used, of one library each.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "mixed"


def machine() -> str:
    """Processor or GPU, threads, versions and date, in a line."""
    cuda = torch.cuda.is_available()
    return (
        f"{torch.cuda.get_device_name() if cuda else processor()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {date.today().isoformat()}"
    )
