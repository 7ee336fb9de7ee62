"""Caches that hooks fill, for models whose forwards are not rewritten."""

import fnmatch
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from ekfac_dist.errors import ConfigError, ModelError
from ekfac_dist.functional.caches import MLPCache, is_without_gradients, retain_or_clear
from ekfac_dist.models.find.mlp_blocks import Anatomy
from ekfac_dist.models.modules import linear_modules, only_input


class LinearCaches(list[MLPCache]):
    """A list of caches with the hooks that fill them; as a context, it removes them at its end.

    Attributes:
        names: Names of each cache's linear maps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[list[str]] = []
        self._handles: list[Any] = []

    def remove(self) -> None:  # type: ignore[override]
        """Removes the hooks from the model and empties the caches."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for cache in self:
            cache.clear()

    def __enter__(self) -> "LinearCaches":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def cache_linears(model: nn.Module, modules: str | Sequence[str] | None = None) -> LinearCaches:
    """Adds hooks to a model that record its linear maps whenever it runs.

    A Hugging Face transformer, also inside a wrapper, gets one cache for each MLP block, with all
    of the block's linear maps (`nn.Linear` and `Conv1D`). Any other model gets one cache with all
    of its linear maps.

    Args:
        model: The model. The hooks stay until `remove` is called, or the context ends.
        modules: A glob, or several, of the names of the linear maps to record; None for those
            above.

    Returns:
        The caches, a list that can be passed as `mlp_cache`.

    Raises:
        ConfigError: If `model` is no module, or a glob matches no linear map.
        ModelError: If there is no linear map, or a transformer has no MLP block.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"cache_linears was given a {type(model).__name__}; give a module.")
    anatomy = Anatomy(model) if _has_transformer(model) else None
    blocks: dict[str, list[str]] = {}
    for name in _chosen_linears(model, modules, anatomy):
        blocks.setdefault(anatomy.place(name).block if anatomy else "", []).append(name)
    caches = LinearCaches()
    for block, names in blocks.items():
        cache = MLPCache(model=model)
        caches.append(cache)
        caches.names.append(names)
        hooks = _Hooks(cache)
        caches._handles.append(model.get_submodule(block).register_forward_pre_hook(hooks.begin))
        for name in names:
            linear = model.get_submodule(name)
            caches._handles.append(
                linear.register_forward_hook(hooks.record, with_kwargs=True, prepend=True)
            )
    return caches


def _has_transformer(model: nn.Module) -> bool:
    # A model of transformers implies that this is imported; importing it here would take seconds.
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and any(
        isinstance(part, modeling.PreTrainedModel) for part in model.modules()
    )


def _chosen_linears(
    model: nn.Module, globs: str | Sequence[str] | None, anatomy: Anatomy | None
) -> list[str]:
    linears, kind = linear_modules(model), type(model).__name__
    if not linears:
        raise ModelError(f"{kind} has no Linear or Conv1D module, so there is nothing to cache.")
    if globs is None:
        names = [name for name in linears if anatomy is None or anatomy.is_mlp(name, linears[name])]
        if not names:
            raise ModelError(
                f"No MLP block was found in {kind}; name its linear maps with modules, for "
                f"instance {next(iter(linears))!r}."
            )
        return names
    matching: set[str] = set()
    for glob in [globs] if isinstance(globs, str) else globs:
        matched = fnmatch.filter(linears, glob)
        if not matched:
            raise ConfigError(
                f"{glob!r} matches none of the {len(linears)} linear maps of {kind}, such as "
                f"{next(iter(linears))!r}."
            )
        matching |= set(matched)
    return [name for name in linears if name in matching]


class _Hooks:
    """The hooks that fill one cache.

    A class, not functions, so that a deep copy of the model copies them with a cache of their own.
    """

    def __init__(self, cache: MLPCache) -> None:
        self.cache = cache
        self._recorded: set[nn.Module] = set()

    def begin(self, block: nn.Module, args: Any) -> None:
        if not self._leaves_pairs_alone():
            self.cache.clear()
            self._recorded.clear()

    def record(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        inputs = only_input(args, kwargs)
        recording = self.cache.recording
        if recording is not None:
            output = recording.observe(module, inputs, output)
        if self._leaves_pairs_alone():
            return output
        if module in self._recorded:  # a new forward that did not call the block as a whole
            self.begin(module, args)
        self._recorded.add(module)
        self.cache.input_hidden_pairs.append((inputs, output))
        if recording is None:
            retain_or_clear(self.cache)
        return output

    def _leaves_pairs_alone(self) -> bool:
        """Whether this forward records nothing, because an earlier one of the same call has."""
        pairs = self.cache.input_hidden_pairs
        return is_without_gradients(self.cache) and any(hidden.requires_grad for _, hidden in pairs)
