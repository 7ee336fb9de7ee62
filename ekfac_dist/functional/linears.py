"""Caches that hooks fill, for models whose forwards stay as they are."""

import fnmatch
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from ekfac_dist.errors import ConfigError, ModelError
from ekfac_dist.functional.caches import MLPCache, is_aside, keep
from ekfac_dist.models.find.mlp_blocks import Anatomy
from ekfac_dist.models.modules import linear_modules, only_input


class LinearCaches(list[MLPCache]):
    """A list of caches, and the hooks that fill them; also a context that ends with them removed.

    Attributes:
        names: Names of the linear maps of each cache.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[list[str]] = []
        self._handles: list[Any] = []

    def remove(self) -> None:  # type: ignore[override]
        """Takes the hooks off the model; the caches are empty afterwards."""
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
    """Caches that are filled whenever a model runs, by hooks: no forward is rewritten.

    Of a Hugging Face transformer, be it wrapped, there is a cache for each MLP block, with all of
    the block's linear maps (`nn.Linear` and `Conv1D`); of any other model, one cache with all
    linear maps.

    Args:
        model: The model. The hooks stay until `remove` is called, or the context ends.
        modules: Glob of linear maps' names, or several: only these are cached.

    Returns:
        The caches, a list that can be given as `mlp_cache`.

    Raises:
        ConfigError: `model` is no module, or a glob matches no linear map.
        ModelError: There is no linear map, or a transformer has no MLP block.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"cache_linears was given a {type(model).__name__}; give a module.")
    anatomy = Anatomy(model) if _has_transformer(model) else None
    blocks: dict[str, list[str]] = {}
    for name in _chosen(model, modules, anatomy):
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
    # Whoever has one has imported this, which takes seconds; nobody else should have to.
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and any(
        isinstance(part, modeling.PreTrainedModel) for part in model.modules()
    )


def _chosen(
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
    wanted: set[str] = set()
    for glob in [globs] if isinstance(globs, str) else globs:
        matched = fnmatch.filter(linears, glob)
        if not matched:
            raise ConfigError(
                f"{glob!r} matches none of the {len(linears)} linear maps of {kind}, such as "
                f"{next(iter(linears))!r}."
            )
        wanted |= set(matched)
    return [name for name in linears if name in wanted]


class _Hooks:
    """The hooks of one cache; a deep copy of the model has copies, with a cache of its own."""

    def __init__(self, cache: MLPCache) -> None:
        self.cache = cache
        self._seen: set[nn.Module] = set()

    def begin(self, block: nn.Module, args: Any) -> None:
        if not self._passes_by():
            self.cache.clear()
            self._seen.clear()

    def record(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        given = only_input(args, kwargs)
        recording = self.cache.recording
        if recording is not None:
            output = recording.see(module, given, output)
        if self._passes_by():
            return output
        if module in self._seen:  # another forward, though the block as a whole was not called
            self.begin(module, args)
        self._seen.add(module)
        self.cache.input_hidden_pairs.append((given, output))
        if recording is None:
            keep(self.cache)
        return output

    def _passes_by(self) -> bool:
        """Whether this forward leaves what an earlier one of the same call recorded."""
        pairs = self.cache.input_hidden_pairs
        return is_aside(self.cache) and any(hidden.requires_grad for _, hidden in pairs)
