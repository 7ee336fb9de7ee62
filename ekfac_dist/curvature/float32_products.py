"""Products of float32 matrices: exact to the rounding of float32, whatever the caller has set.

On a CPU torch has two libraries, and a setting of the process chooses between them,
`torch.backends.mkldnn.matmul.fp32_precision`:

                       MKL ("ieee")         oneDNN ("bf16")
    CPU with AMX       float32              operands rounded to bfloat16, sums in float32
    other CPUs         float32              float32

Rounding loses nothing where the operands are bfloat16 values in the first place: their products are
exact in float32. So on a CPU with AMX oneDNN multiplies bfloat16 rows into float32, 2.6 times as
fast as it multiplies float32 (Intel Xeon); see `covariance`. What a library does is found out by
trying.

oneDNN keeps a kernel of some 3 MB for each of the last 1,024 shapes, which for sequences of all
lengths is gigabytes: it gets products of few shapes alone. So float32 stays with MKL on AMD's CPUs
too, where oneDNN is 7 to 10 % faster (EPYC of family 25, from 256³ multiply-adds on).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

# The error beside float64 that other ways of making float32 products are allowed, over float32's.
MOST_OVER_FLOAT32 = 4.0
_EXACT, _ROUNDING = "ieee", "bf16"
# Rows of rounded products are multiples of this number, so that there are few shapes of them.
ROUNDED_ROWS = 256
# Shapes [m, k] × [k, n] with which oneDNN is tried: it has several kernels.
_TRIED = ((16, 16, 16), (300, 70, 500), (1, 512, 64), (768, 128, 256))


@contextmanager
def precisely(device: torch.device) -> Iterator[None]:
    """Turns off autocast and reduced-precision float32 products that the caller may have turned on.

    Args:
        device: Where the products are computed.
    """
    restore = _exact_float32_products()
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        restore()


@contextmanager
def rounded_to_bfloat16() -> Iterator[None]:
    """Lets products of float32 on the CPU round their operands to bfloat16 (but not their sums)."""
    setting = _cpu_matmul()
    if not hasattr(setting, "fp32_precision"):  # an older torch
        yield
        return
    before = setting.fp32_precision
    setting.fp32_precision = _ROUNDING
    try:
        yield
    finally:
        _restore(setting, before)


def rounds_on(device: torch.device) -> bool:
    """Whether `rounded_to_bfloat16` makes products on a device faster, by rounding."""
    return device.type == "cpu" and rounds_to_bfloat16()


@cache
def has_16_bit_units(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device multiplies matrices of a 16-bit dtype faster than those of float32."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if device.type == "cpu":
        return dtype == torch.bfloat16 and bool(torch.cpu._is_avx512_bf16_supported())
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


@cache
def rounds_to_bfloat16() -> bool:
    """Whether this CPU multiplies float32 faster where its operands may be rounded to bfloat16.

    Found out by a few products with operands that bfloat16 cannot hold.
    """
    value = 1 + 2.0**-12
    with torch.autocast("cpu", enabled=False), rounded_to_bfloat16():
        for m, k, n in _TRIED:
            left = torch.full((m, k), value, dtype=torch.float32, device="cpu")
            product = left @ torch.ones(k, n, dtype=torch.float32, device="cpu")
            if not bool((product == k * value).all()):  # a sum of so few is exact in float32
                return True
    return False


def _cpu_matmul() -> Any:
    """Where torch sets products on the CPU; None in a torch that has no such place."""
    return getattr(torch.backends.mkldnn, "matmul", None)


def _exact_float32_products() -> Callable[[], None]:
    """Makes products of float32 exact; the returned function restores what the caller had set.

    torch has an old setting of all devices, and from 2.9 on one of each, which the old one sets
    too. Where the new ones do not fit the old one, torch refuses to read the old one: then only the
    new ones are set.
    """
    settings: list[Any] = [
        matmul
        for matmul in (torch.backends.cuda.matmul, _cpu_matmul())
        if hasattr(matmul, "fp32_precision")
    ]
    before: list[str] = [setting.fp32_precision for setting in settings]
    legacy: str | None = None
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        if not settings:
            raise
    if legacy is not None:
        torch.set_float32_matmul_precision("highest")
    for setting in settings:
        setting.fp32_precision = _EXACT

    def restore() -> None:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        for setting, precision in zip(settings, before, strict=True):
            _restore(setting, precision)

    return restore


def _restore(setting: Any, precision: str) -> None:
    """Sets a device's precision, or lets it follow the setting of all devices if that is it."""
    setting.fp32_precision = "none"
    if setting.fp32_precision != precision:
        setting.fp32_precision = precision
