"""This module owns the checkpoint of a sweep on disk: a zarr group, point by point, that a kill leaves whole.

Zarr, because each chunk is a file of its own that is replaced in one step, so that a process may die at any moment;
a netCDF file has one index for all, which a kill while it is written destroys. ``xarray.open_zarr`` reads what is
there at any time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import numpy as np

from fluidopt.errors import InvalidInput
from fluidopt.tables import shorten

if TYPE_CHECKING:
    import zarr

OPEN, DONE, FAILED = 0, 1, 2
# Files per quantity, at most about so many; a chunk is read and written again for every block in it.
MOST_CHUNKS = 1_024
Outcome = dict[str, float] | str
"""What became of a point: numbers by name, or the error."""


@dataclass(frozen=True)
class Store:
    """Finished points of one sweep, in a directory."""

    path: Path
    settings: Mapping[str, Any]
    """What makes it this sweep, JSON-able."""
    count: int
    """Number of points, N."""
    block: int
    """Points that are written together."""

    def read(self) -> dict[int, Outcome]:
        """The points that are finished, by number; makes the store where there is none.

        Raises:
            InvalidInput: the path cannot be used, or holds another sweep.
        """
        group = self._group
        if "status" not in group:
            return {}
        status = np.asarray(self._array(group, "status")[:])
        errors = np.asarray(self._array(group, "error")[:]).astype(object)
        names = [name for name in group.array_keys() if group[name].attrs.get("result")]
        columns = {unquote(name): np.asarray(self._array(group, name)[:]) for name in names}
        found: dict[int, Outcome] = {}
        for at in np.flatnonzero(status != OPEN).tolist():
            numbers = {name: float(column[at]) for name, column in columns.items()}
            found[at] = numbers if status[at] == DONE else str(errors[at])
        return found

    def add(self, start: int, outcomes: Sequence[Outcome], units: Mapping[str, str]) -> None:
        """Write the points from ``start`` on; they count as finished once their status is written, last of all."""
        group, stop = self._group, start + len(outcomes)
        names = dict.fromkeys(name for each in outcomes if isinstance(each, dict) for name in each)
        for name in names:
            column = [each.get(name, np.nan) if isinstance(each, dict) else np.nan for each in outcomes]
            attributes = {"result": True, "units": units.get(name, "")}
            self._array(group, quote(name, safe=" []"), "f8", np.nan, attributes)[start:stop] = np.array(column)
        errors = np.array([each if isinstance(each, str) else "" for each in outcomes], dtype=np.dtypes.StringDType())
        self._array(group, "error", str, "")[start:stop] = errors
        states = np.array([FAILED if isinstance(each, str) else DONE for each in outcomes], dtype="i1")
        flags = {"flag_values": [OPEN, DONE, FAILED], "flag_meanings": "open done failed"}
        self._array(group, "status", "i1", OPEN, flags)[start:stop] = states

    def _array(self, group: zarr.Group, name: str, dtype: Any = None, fill: Any = None, attributes: Any = None) -> Any:
        """The array of that name, made where there is none."""
        if name in group:
            return group[name]
        chunk = self.block * -(-self.count // (self.block * MOST_CHUNKS))
        return group.create_array(
            name,
            shape=(self.count,),
            chunks=(min(chunk, self.count),),
            dtype=dtype,
            fill_value=fill,
            attributes=attributes or {},
            dimension_names=("point",),
        )

    @cached_property
    def _group(self) -> zarr.Group:
        """The group on disk, checked to be of this sweep."""
        import zarr

        try:
            if not self.path.exists():
                return zarr.open_group(self.path, mode="w-", attributes={"fluidopt_sweep": dict(self.settings)})
            group = zarr.open_group(self.path, mode="r+")
        except (OSError, ValueError, KeyError) as error:
            raise InvalidInput(f"checkpoint: {self.path} cannot be used ({error}); give a new directory") from None
        there = group.attrs.get("fluidopt_sweep")
        if not isinstance(there, dict):
            raise InvalidInput(f"checkpoint: {self.path} is no checkpoint of a sweep; give a new directory")
        differ = [name for name, value in self.settings.items() if there.get(name) != value]
        if differ:
            raise InvalidInput(
                f"checkpoint: {self.path} is of a sweep with another {shorten(differ)} "
                f"({differ[0]} there: {_brief(there.get(differ[0]))}, here: {_brief(self.settings[differ[0]])}); give "
                "another directory"
            )
        return group


def _brief(value: object, most: int = 160) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]} ..."
