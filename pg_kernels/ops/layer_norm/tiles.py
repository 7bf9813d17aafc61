"""Launch configurations of layer_norm's kernels: rms_norm's, as both do the same amount of work on the same rows."""

from __future__ import annotations

from functools import partial

from pg_kernels.ops.rms_norm import tiles as rms_norm
from pg_kernels.ops.rms_norm.tiles import MAX_BWD_BLOCK_N, Tiles, candidates, key, num_programs

__all__ = ["MAX_COLS", "Tiles", "candidates", "choose_backward", "choose_forward", "key", "num_programs"]

MAX_COLS = MAX_BWD_BLOCK_N
"""The longest row in elements. The backward kernel takes whole rows only."""

choose_forward = partial(rms_norm.choose_forward, op="layer_norm")
choose_backward = partial(rms_norm.choose_backward, op="layer_norm")
