"""Products of float32 matrices: exact to the rounding of float32, on the faster units at hand.

On a CPU torch has two libraries, and a setting of the process chooses between them,
`torch.backends.mkldnn.matmul.fp32_precision`:

                       MKL ("ieee")         oneDNN ("bf16")
    CPU with AMX       float32              operands rounded to bfloat16, sums in float32
    other CPUs         float32              float32

Rounding loses nothing where the operands are bfloat16 values in the first place: their products are
exact in float32. So on a CPU with AMX oneDNN multiplies bfloat16 rows into float32, 2.6 times as
fast as it multiplies float32 (Intel Xeon); see `covariance`. On AMD's CPUs, which have no AMX,
oneDNN is the faster library for float32: measured on an EPYC of family 25 (AVX-512, 1 thread, by
`tests/benchmarks/choices.py`), by 7 to 10 % from 256³ multiply-adds on, and by a third for the thin
products of low-rank queries. What a library does is found out by trying; which is chosen depends on
the processor alone, so that a run that is continued computes the same.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

_EXACT, _ROUNDING = "ieee", "bf16"
_CPU_INFO = Path("/proc/cpuinfo")
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
def faster_library() -> Iterator[None]:
    """Multiplies float32 on the CPU with the faster library, if the caller wants full precision."""
    before = _cpu_setting()
    if before not in (None, "none", _EXACT):
        yield
        return
    with _set_for_cpu(_full_precision(), before):
        yield


@contextmanager
def rounded_to_bfloat16() -> Iterator[None]:
    """Lets products of float32 on the CPU round their operands to bfloat16 (but not their sums)."""
    with _set_for_cpu(_ROUNDING, _cpu_setting()):
        yield


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
    if _cpu_setting() is None:  # a torch without that setting
        return False
    value = 1 + 2.0**-12
    with torch.autocast("cpu", enabled=False), rounded_to_bfloat16():
        for m, k, n in _TRIED:
            left = torch.full((m, k), value, dtype=torch.float32, device="cpu")
            product = left @ torch.ones(k, n, dtype=torch.float32, device="cpu")
            if not bool((product == k * value).all()):  # a sum of so few is exact in float32
                return True
    return False


@cache
def _full_precision() -> str:
    """The setting of the faster library that rounds no operand."""
    return _ROUNDING if _is_amd() and not rounds_to_bfloat16() else _EXACT


def _is_amd() -> bool:
    with suppress(OSError):  # there is no such file but on Linux
        text = _CPU_INFO.read_text(encoding="utf-8", errors="replace")
        return re.search(r"^vendor_id\s*:\s*AuthenticAMD", text, re.MULTILINE) is not None
    return False


def _cpu_setting() -> str | None:
    """The setting of products on the CPU; None in a torch that has none."""
    return getattr(_cpu_matmul(), "fp32_precision", None)


def _cpu_matmul() -> Any:
    """Where torch sets products on the CPU; None in a torch that has no such place."""
    return getattr(torch.backends.mkldnn, "matmul", None)


@contextmanager
def _set_for_cpu(wanted: str, before: str | None) -> Iterator[None]:
    """Sets how products on the CPU are computed, and restores it.

    Args:
        wanted: The setting.
        before: What `_cpu_setting` is; nothing is done if it is None.
    """
    if before is None:
        yield
        return
    setting = _cpu_matmul()
    setting.fp32_precision = wanted
    try:
        yield
    finally:
        _restore(setting, before)


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
        setting.fp32_precision = _full_precision() if setting is _cpu_matmul() else _EXACT

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
