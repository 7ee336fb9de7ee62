"""How much is added to Λ before it is inverted: one number for each module."""

import fnmatch
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ekfac_dist.errors import ConfigError

DEFAULT = 0.1


@dataclass(frozen=True)
class Damping:
    """The damping λ of every module.

    Relative damping is a multiple of the module's mean(Λ); 0.1 of it is what Grosse et al. 2023,
    §5.1.1, use.

    Args:
        value: For every module that `modules` does not name; None if it must name all of them.
        relative: Whether values are multiples of mean(Λ), or λ itself.
        modules: Values for some modules, by name or glob; a name goes before globs, and the first
            glob that matches before the others.

    Raises:
        ConfigError: A value is negative or no finite number.
    """

    value: float | None = DEFAULT
    relative: bool = True
    modules: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.modules, Mapping):
            raise ConfigError(
                f"damping of modules is {self.modules!r}; it must give each a number, by name or "
                "glob."
            )
        given = [("damping", self.value)] if self.value is not None else []
        given += [(f"damping of {name}", value) for name, value in self.modules.items()]
        for what, value in given:
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0:
                raise ConfigError(f"{what} is {value!r}; it must be a number of 0 or more.")

    @classmethod
    def of(cls, value: "float | Mapping[str, float] | Damping", relative: bool) -> "Damping":
        """From a function's arguments: one value for all modules, or one for each."""
        if isinstance(value, Damping):
            return value
        if isinstance(value, Mapping):
            return cls(None, relative, dict(value))
        return cls(value, relative)

    def require_used(self, names: Iterable[str]) -> None:
        """Refuses a value that is no module's.

        Args:
            names: All modules.

        Raises:
            ConfigError: A name or glob of `modules` matches none of them.
        """
        names = list(names)
        for glob in self.modules:
            if not fnmatch.filter(names, glob) and glob not in names:
                raise ConfigError(
                    f"damping is given for {glob!r}, which is no tracked module's name, nor a glob "
                    f"of any, such as {', '.join(names[:2])}."
                )

    def absolute(self, name: str, lambda_OI: Tensor) -> float:
        """λ of one module.

        Args:
            name: The module's name.
            lambda_OI: Its Λ.

        Raises:
            ConfigError: There is no value for it.
        """
        value = self._value(name)
        return value * lambda_OI.double().mean().item() if self.relative else value

    def _value(self, name: str) -> float:
        if name in self.modules:
            return self.modules[name]
        for glob, value in self.modules.items():
            if fnmatch.fnmatchcase(name, glob):
                return value
        if self.value is None:
            raise ConfigError(
                f"damping has no value for module {name}; give it one, or all the others by '*'."
            )
        return self.value
