"""Arrays and mappings that cannot be changed, for objects that are frozen through and through."""

from __future__ import annotations

from typing import NoReturn, TypeVar

import numpy as np

__all__ = ["FrozenDict", "frozen_array"]

Key = TypeVar("Key")
Value = TypeVar("Value")


def frozen_array(values: object, dtype: type) -> np.ndarray:
    """Return an own read-only copy of `values`, so that nothing outside can change a frozen object."""
    array: np.ndarray = np.array(values, dtype=dtype)
    array.setflags(write=False)
    return array


class FrozenDict(dict[Key, Value]):
    """A dict that refuses changes. Unlike ``types.MappingProxyType`` it can be copied, pickled and written as JSON."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("this mapping is part of an immutable object; make a changed copy with dict(...)")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type, tuple[dict[Key, Value]]]:
        return FrozenDict, (dict(self),)

    def __copy__(self) -> FrozenDict[Key, Value]:
        return self
