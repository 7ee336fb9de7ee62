"""What products of float32 are computed with, for tests that change it."""

import torch


def float32_settings() -> tuple[str, str, str]:
    """The settings of all devices (the old one), of GPUs and of CPUs."""
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer settings do not fit it
        legacy = "refused"
    backends = torch.backends
    return legacy, backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision


def set_of_each_device(gpu: str, cpu: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = gpu
    torch.backends.mkldnn.matmul.fp32_precision = cpu


def restore_float32() -> None:
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    set_of_each_device("none", "none")
