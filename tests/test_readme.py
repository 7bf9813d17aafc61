"""README's Python examples run unchanged, on small models, a generated image and the CPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from pg_kernels.model import EMBEDDED_CHECKPOINT

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BACKEND, DROP_IN, BENCHMARK = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run(example: str, **names: Any) -> dict[str, Any]:
    example = example.replace('"cuda"', '"cpu"')
    example = re.sub(r'"(?:google/)?paligemma2-3b-[a-z]+-224"', "CHECKPOINT", example)
    names["CHECKPOINT"] = EMBEDDED_CHECKPOINT
    exec(compile(example, "README.md", "exec"), names)
    return names


def test_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (80, 60), "white").save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    # On a CPU, an example that forgets to move the inputs would also run.
    assert BACKEND.count("processor(image") == BACKEND.count('").to("cuda")') == 2
    names = run(BACKEND)
    assert names["model"].lm_head.weight.dtype == torch.bfloat16
    assert torch.isfinite(names["loss"])
    assert capsys.readouterr().out.startswith("[")


def test_drop_in() -> None:
    pytest.importorskip("transformers")
    from pg_kernels.integrations.transformers import unpatch

    q, k, v = torch.randn(3, 2, 4, 8, 16).unbind()
    x = torch.randn(2, 8, 32)
    names = run(
        DROP_IN,
        **{"q": q, "k": k[:, :1], "v": v[:, :1], "x": x, "residual": x, "hidden": x, "weight": torch.zeros(32)},
        prefix_lens=torch.tensor([3, 5], dtype=torch.int32),
        left_padding=torch.tensor([0, 2], dtype=torch.int32),
        lm_head=nn.Linear(32, 64, bias=False),
        labels=torch.randint(64, (2, 8)),
    )
    assert names["out"].shape == q.shape and torch.isfinite(names["loss"])
    model = names["model"]
    assert type(model.model.language_model.layers[0].mlp.up_proj).__name__ == "Int8Linear"
    assert type(model.lm_head) is nn.Linear
    unpatch(model)


def test_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    run(BENCHMARK)
    assert "rms_norm" in capsys.readouterr().out


def test_links_lead_to_files() -> None:
    for page in (Path("README.md"), Path("CONTRIBUTING.md"), *Path(__file__).parents[1].glob("docs/*.md")):
        page = Path(__file__).parents[1] / page
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_is_one_page() -> None:
    assert len(README.splitlines()) <= 130
