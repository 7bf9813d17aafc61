"""Stored runs: pytest-benchmark's JSON with our fields under the key "pg_kernels", read back as plain objects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

RUN_FILE = "run.json"
"""The name of a run's file inside its folder."""


@dataclass(frozen=True)
class Ceilings:
    """The machine's bandwidth and matrix rates, measured in the same run."""

    copy_bytes_per_s: float
    """Bytes read plus bytes written per second, measured by copying a large tensor."""
    read_bytes_per_s: float
    """Bytes read per second, measured by summing a large tensor."""
    flops_per_s: Mapping[str, float]
    """FLOP/s of a large matrix product by dtype ("float32", "bfloat16", "float16", "int8"). A multiply-add counts as 2."""

    @property
    def bytes_per_s(self) -> float:
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)

    def bound_s(self, row: Row) -> float:
        """Return the roofline bound: the least seconds in which this machine can move the row's bytes and do its FLOPs."""
        rate = self.flops_per_s.get(row.arithmetic)
        return max(row.bytes / self.bytes_per_s, row.flops / rate if rate else 0.0)


@dataclass(frozen=True)
class Row:
    """One contender on one case, timed or not."""

    case: str
    """Unique in a run, and the same in every run."""
    op: str
    mode: str
    """"forward", "backward" or "both"."""
    shape: str
    """A text of `sizes` for people."""
    sizes: Mapping[str, int | str]
    """"model" if the case belongs to one; "batch", "tokens", "vocabulary", "resolution" and other sizes of the op."""
    dtype: str
    contender: str
    ours: bool
    baseline: bool
    """Whether this contender is the baseline that the others of its case, and other runs, are compared with."""
    status: str
    """"timed", "skipped" (cannot run here), "wrong" (its output is not the op's) or "failed" (it raised)."""
    reason: str = ""
    """Why it was not timed."""
    error: float | None = None
    """Largest deviation from the op's definition, in units of the allowed deviation: 1 is the limit."""
    bytes: int = 0
    """Bytes that the op must move: every input read once, every output written once."""
    flops: int = 0
    arithmetic: str = ""
    """The dtype whose matrix rate bounds the op. Empty if only bytes do."""
    overhead_s: float | None = None
    """Seconds that a call keeps the host busy: until it returns on a GPU, at the smallest shape on a CPU."""
    peak_bytes: int | None = None
    """Peak memory of one call beyond its inputs."""
    samples: tuple[float, ...] = ()
    """Seconds per call, by round. The contenders of a case share the rounds."""

    @property
    def name(self) -> str:
        return f"{self.case}/{self.contender}"

    @cached_property
    def p20(self) -> float:
        return float(np.percentile(self.samples, 20))

    @cached_property
    def p50(self) -> float:
        return median(self.samples)

    @cached_property
    def p80(self) -> float:
        return float(np.percentile(self.samples, 80))

    def speedup_over(self, other: Row) -> float:
        """Return the speed-up over another contender of the same case: the median over their shared rounds."""
        return median(theirs / own for theirs, own in zip(other.samples, self.samples))

    def extra_info(self) -> dict[str, Any]:
        """Return all fields but the samples, which pytest-benchmark stores itself."""
        info = asdict(self)
        del info["samples"]
        return info


@dataclass(frozen=True)
class Run:
    """Everything that one run of the suite stored."""

    path: Path
    device: str
    device_type: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    commit: str
    command: str
    date: str
    ceilings: Ceilings
    rows: tuple[Row, ...]

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read a run's folder or its JSON file. Raises OSError or ValueError naming the file if that fails."""
        path = Path(path)
        if path.is_dir():
            path /= RUN_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            ours = content["pg_kernels"]
            known = {field.name for field in fields(Row)}
            rows = [
                Row(**{**_only(known, benchmark["extra_info"]), "samples": tuple(benchmark["stats"]["data"])})
                for benchmark in content["benchmarks"]
            ]
            rows += [Row(**_only(known, row)) for row in ours["not_timed"]]
            order = {case: index for index, case in enumerate(ours["cases"])}
            commit = content.get("commit_info") or {}
            return cls(
                path=path,
                device=ours["device"],
                device_type=ours["device_type"],
                machine=content["machine_info"],
                versions=ours["versions"],
                commit=(commit.get("id") or "unknown")[:12] + ("+changes" if commit.get("dirty") else ""),
                command=ours["command"],
                date=content["datetime"],
                ceilings=Ceilings(**ours["ceilings"]),
                rows=tuple(sorted(rows, key=lambda row: order[row.case])),
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a stored run of this suite: {error!r}") from error

    def cases(self) -> dict[str, list[Row]]:
        """The rows by case, in the order of the suite."""
        table: dict[str, list[Row]] = {}
        for row in self.rows:
            table.setdefault(row.case, []).append(row)
        return table

    def baseline(self, case: str) -> Row | None:
        """Return the timed baseline of a case, or None."""
        return next((row for row in self.cases()[case] if row.baseline and row.status == "timed"), None)

    def bound_s(self, row: Row) -> float:
        """Return the roofline bound in seconds: see `Ceilings.bound_s`."""
        return self.ceilings.bound_s(row)


def _only(known: set[str], info: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in info.items() if name in known}
