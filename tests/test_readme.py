"""README's first examples run as they stand, on a small model, a picture made here and the CPU."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from pg_kernels.model import EMBEDDED_CHECKPOINT

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README[: README.index("## Measure it")], flags=re.DOTALL)


def run(block: str, **names: Any) -> dict[str, Any]:
    block = block.replace('"cuda"', '"cpu"')
    block = re.sub(r'"(?:google/)?paligemma2-3b-[a-z]+-224"', "CHECKPOINT", block)
    names["CHECKPOINT"] = EMBEDDED_CHECKPOINT
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (80, 60), "white").save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    # On a CPU an example would run, too, that leaves the inputs where they are.
    assert BLOCKS[0].count("processor(image") == BLOCKS[0].count('").to("cuda")') == 2
    names = run(BLOCKS[0])
    assert names["model"].lm_head.weight.dtype == torch.bfloat16
    assert torch.isfinite(names["loss"])
    assert capsys.readouterr().out.startswith("[")


def test_transformers() -> None:
    pytest.importorskip("transformers")
    from pg_kernels.integrations.transformers import unpatch

    unpatch(run(BLOCKS[1])["model"])


def test_ops() -> None:
    def linear(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False)

    q, k, v = torch.randn(3, 2, 4, 8, 16).unbind()
    x = torch.randn(2, 8, 32)
    names = run(
        BLOCKS[2],
        **{"q": q, "k": k[:, :1], "v": v[:, :1], "x": x, "residual": x, "hidden": x, "weight": torch.zeros(32)},
        prefix_lens=torch.tensor([3, 5], dtype=torch.int32),
        left_padding=torch.tensor([0, 2], dtype=torch.int32),
        lm_head=linear(32, 64),
        labels=torch.randint(64, (2, 8)),
        mlp=SimpleNamespace(gate_proj=linear(32, 48), up_proj=linear(32, 48), down_proj=linear(48, 32)),
        model=nn.Sequential(linear(32, 32)),
    )
    assert names["out"].shape == q.shape and torch.isfinite(names["loss"])
    assert names["mlp"].forward(x).shape == x.shape and type(names["model"][0]).__name__ == "Int8Linear"


def test_no_example_is_new() -> None:
    assert len(BLOCKS) == 3
