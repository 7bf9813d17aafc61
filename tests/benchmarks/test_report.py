"""Reports, plots, growth and README's tables: exact on small runs, complete on a synthetic one."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from synthetic import synthetic_run, timed_row

from pg_kernels.benchmarks.report import growth, plots, readme
from pg_kernels.benchmarks.report import markdown as report
from pg_kernels.benchmarks.report.plots import scaling, speedup, style
from pg_kernels.benchmarks.report.results import Ceilings, Row, Run
from pg_kernels.benchmarks.report.text import duration, markdown_table, times

CEILINGS = Ceilings(1e9, 2e9, {"bfloat16": 1e12, "int8": 0.0})


def run_of(*rows: Row, **overrides: Any) -> Run:
    return synthetic_run(rows=rows, **{"ceilings": CEILINGS, **overrides})


def case(name: str, times: dict[str, float], **fields: Any) -> list[Row]:
    """Return one case in which each contender took the given milliseconds in all of three rounds."""
    return [timed_row(name, contender, (ms / 1e3,) * 3, **fields) for contender, ms in times.items()]


def skipped(name: str, contender: str, reason: str, status: str = "skipped", **fields: Any) -> Row:
    return timed_row(name, contender, (), status=status, reason=reason, **fields)


def lines_with(text: str, part: str) -> list[str]:
    return [line for line in text.splitlines() if part in line]


def cells(line: str) -> list[str]:
    """Return the cells of a table's line, split as Markdown does."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def section(text: str, heading: str) -> str:
    """Return the text under a heading of the report."""
    _, _, rest = text.partition(f"### {heading}\n")
    return rest.partition("\n### ")[0]


# --- text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (12.345, "12.3 s"),
        (1.0, "1.00 s"),
        (0.9996, "1.00 s"),
        (0.9994, "999 ms"),
        (1.5e-3, "1.50 ms"),
        (9.996e-4, "1.00 ms"),
        (2.5e-5, "25.0 µs"),
        (3.14e-7, "314 ns"),
        (4e-10, "0.400 ns"),
        (1234.5, "1230 s"),
        (0.0, "0.00 ns"),
    ],
)
def test_durations_have_three_digits_and_a_unit_that_suits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_ratios_and_shares_for_people() -> None:
    assert [times(ratio) for ratio in (None, 0.012345, 0.8, 1.0, 12.345)] == [
        "–",
        "0.0123×",
        "0.80×",
        "1.00×",
        "12.35×",
    ]
    assert [report.percent(share) for share in (None, 0.0456, 0.5, 1.3)] == ["–", "4.6%", "50%", "130%"]


def test_a_cell_stays_one_cell() -> None:
    line = markdown_table(["a", "b"], [["x|y\nz", "1"]]).splitlines()[-1]
    assert line == r"| x\|y z | 1 |"
    assert cells(line) == [r"x\|y z", "1"]


# --- the report


def test_every_number_of_a_row() -> None:
    rows = case("c", {"pg_kernels native": 1, "eager": 2}, bytes=1_000_000)
    rows[0] = replace(rows[0], error=0.123, overhead_s=4.5e-6, peak_bytes=3 << 19)
    ours, baseline = lines_with(section(report.markdown([run_of(*rows)]), "rms_norm"), "| c |")
    assert cells(ours) == [
        *("c", "forward", "bfloat16", "pg_kernels native", "1.00 ms", "1.00 ms–1.00 ms", "**2.00×**", "50%"),
        *("1.00 GB/s", "4.50 µs", "1.5 MiB", "0.12"),
    ]
    assert cells(baseline)[3:] == [
        *("eager", "2.00 ms", "2.00 ms–2.00 ms", "1.00×", "25%", "0.500 GB/s", "", "", ""),
    ]


def test_what_arithmetic_bounds_is_measured_in_arithmetic() -> None:
    # 10 GFLOP take at least 10 ms, the bytes half a millisecond.
    fields = {"bytes": 1_000_000, "flops": 10**10, "arithmetic": "bfloat16"}
    run = run_of(*case("c", {"eager": 20}, **fields))
    (line,) = lines_with(section(report.markdown([run]), "rms_norm"), "| c |")
    assert cells(line)[7:9] == ["50%", "500 GFLOP/s"]
    # A dtype of unknown rate is bounded by its bytes.
    run = run_of(*case("c", {"eager": 20}, **{**fields, "arithmetic": "int8"}))
    (line,) = lines_with(section(report.markdown([run]), "rms_norm"), "| c |")
    assert cells(line)[7:9] == ["2.5%", "0.0500 GB/s"]
    # Without counts there is no bound.
    (line,) = lines_with(section(report.markdown([run_of(*case("c", {"eager": 20}))]), "rms_norm"), "| c |")
    assert cells(line)[7:9] == ["–", "–"]


def test_speed_ups_are_medians_over_shared_rounds_and_the_fastest_is_bold() -> None:
    run = run_of(
        timed_row("c", "pg_kernels native", (1.0, 2.0, 4.0)),
        timed_row("c", "eager", (4.0, 6.0, 4.0)),  # 4, 3 and 1 times as slow; the ratio of medians would be 2
        timed_row("c", "SDPA", (0.5, 1.0, 4.0)),
    )
    table = section(report.markdown([run]), "rms_norm")
    assert [cells(line)[6] for line in lines_with(table, "| c |")] == ["3.00×", "1.00×", "**6.00×**"]


def test_without_a_timed_baseline_there_is_no_speed_up() -> None:
    run = run_of(timed_row("c", "pg_kernels native", (1.0,)), skipped("c", "eager", "out of memory", "failed"))
    ours, baseline = lines_with(section(report.markdown([run]), "rms_norm"), "| c |")
    assert cells(ours)[6] == "–"
    assert cells(baseline)[4] == "failed: out of memory"


def test_the_summary_is_of_what_runs_by_default() -> None:
    run = run_of(
        *case("a", {"pg_kernels native": 1, "pg_kernels reference": 0.1, "eager": 2, "SDPA": 0.5}, bytes=1_000_000),
        *case("b", {"pg_kernels native": 1, "pg_kernels reference": 9, "eager": 8, "SDPA": 18}, bytes=200_000),
        skipped("d", "pg_kernels native", "its output is 2 times as far off as allowed", "wrong"),
        *case("d", {"eager": 1}),
    )
    (line,) = lines_with(section(report.markdown([run]), "Summary"), "| rms_norm |")
    # Speed-ups over the baseline are 2 and 8, over the best other 0.5 and 8. The roofline shares are 50 % and 10 %.
    assert cells(line) == ["rms_norm", "forward", "2 of 3", "4.00×", "2.00×", "1", "1", "30%"]


def test_the_first_timed_backend_is_the_default() -> None:
    rows = [skipped("a", "pg_kernels triton", "needs a CUDA GPU"), *case("a", {"pg_kernels native": 1, "eager": 3})]
    (line,) = lines_with(section(report.markdown([run_of(*rows)]), "Summary"), "| rms_norm |")
    assert cells(line)[2:4] == ["1", "3.00×"]


def test_a_summary_of_nothing_timed_has_no_numbers() -> None:
    text = report.markdown([run_of(skipped("a", "pg_kernels native", "no memory", "failed"))])
    (line,) = lines_with(section(text, "Summary"), "| rms_norm |")
    assert cells(line) == ["rms_norm", "forward", "0 of 1", "–", "–", "0", "0", "–"]


def test_losing_rows_stay() -> None:
    run = run_of(*case("c", {"pg_kernels native": 40, "eager": 2, "SDPA": 1}))
    (ours,) = lines_with(section(report.markdown([run]), "rms_norm"), "pg_kernels native")
    assert cells(ours)[6] == "0.0500×"


def test_repeated_reasons_are_said_once_but_wrong_and_failed_always() -> None:
    rows: list[Row] = []
    for name in "abc":
        rows += case(name, {"eager": 1})
        rows.append(skipped(name, "bitsandbytes", "bitsandbytes is not installed"))
        rows.append(skipped(name, "torchao", "out of | memory", "failed"))
        rows.append(skipped(name, "SDPA", "its output is 7 times as far off as allowed", "wrong", error=7.0))
    rows += [skipped(name, "FlexAttention", "has no softcap") for name in "ab"]
    text = report.markdown([run_of(*rows)])
    table = section(text, "rms_norm")
    assert not lines_with(table, "bitsandbytes")
    (line,) = lines_with(section(text, "Not timed"), "bitsandbytes")
    assert cells(line) == ["bitsandbytes", "bitsandbytes is not installed", "rms_norm", "3"]
    assert len(lines_with(section(text, "Not timed"), "|")) == 3  # a header and one line
    assert [cells(line)[4] for line in lines_with(table, "torchao")] == [r"failed: out of \| memory"] * 3
    wrong = [cells(line) for line in lines_with(table, "SDPA")]
    assert [line[4] for line in wrong] == ["**wrong**: its output is 7 times as far off as allowed"] * 3
    assert [line[-1] for line in wrong] == ["7"] * 3
    assert [cells(line)[4] for line in lines_with(table, "FlexAttention")] == ["skipped: has no softcap"] * 2


def test_a_case_that_was_skipped_as_a_whole_is_one_line() -> None:
    reason = "needs about 99.0 GiB of memory, 5.0 are free"
    run = run_of(*(skipped("c", name, reason) for name in ("pg_kernels native", "eager", "SDPA")))
    (line,) = lines_with(section(report.markdown([run]), "rms_norm"), "| c |")
    assert cells(line)[3:5] == ["all", f"skipped: {reason}"]


def test_every_line_of_a_table_has_its_headers_cells() -> None:
    run = synthetic_run()
    odd = replace(run.rows[0], shape="a | b", contender="x|y")
    text = report.markdown([replace(run, rows=(*run.rows, odd))])
    width = 0
    for line in text.splitlines():
        if line.startswith("| "):
            width = width or len(cells(line))
            assert len(cells(line)) == width, line
        else:
            width = 0
    assert r"| x\|y |" in text


def test_the_head_of_a_run_says_where_it_comes_from() -> None:
    text = report.markdown([synthetic_run()], {"Speed-up": "a plot.png"})
    assert "## NVIDIA H100 80GB HBM3\n" in text
    assert "2026-01-02 03:04, commit 0123456789ab; python 3.11.9, torch 2.13.0, triton 3.6.0." in text
    assert "`pytest -q benchmarks/suite --on cuda`" in text
    assert (
        "copy 2600 GB/s, read 2900 GB/s; matrix products: float32 50.0 TFLOP/s, bfloat16 700 TFLOP/s, float16" in text
    )
    assert "int8 0" not in text
    assert "- [Speed-up](a%20plot.png)" in text
    assert "matrix products: none." in report.markdown([run_of(ceilings=Ceilings(1e9, 1e9, {}))])


def test_several_runs_follow_each_other() -> None:
    text = report.markdown([synthetic_run(device="one"), synthetic_run(device="two")])
    assert text.index("## one\n") < text.index("## two\n")
    assert text.count("### Summary\n") == text.count("### Growth\n") == 2
    assert text.count("### ") == 2 * report.markdown([synthetic_run()]).count("### ")


def test_the_report_is_written_with_its_plots(tmp_path: Path) -> None:
    run = run_of(*case("c", {"pg_kernels native": 1, "eager": 2}, bytes=10**6))
    paths = report.write([run], tmp_path / "new")
    assert [path.name for path in paths] == ["report.md", "speedup.png", "roofline.png"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in paths)
    links = re.findall(r"\]\((.*?\.png)\)", paths[0].read_text(encoding="utf-8"))
    assert links == ["speedup.png", "roofline.png"]
    assert paths == report.write([run], tmp_path / "new")


def test_plots_of_several_runs_do_not_replace_each_other(tmp_path: Path) -> None:
    rows = case("c", {"pg_kernels native": 1, "eager": 2}, bytes=10**6)
    runs = [run_of(*rows, device="one"), run_of(*rows, device="two")]
    paths = report.write(runs, tmp_path)
    assert len(set(paths)) == 5 and all(path.is_file() for path in paths)
    text = paths[0].read_text(encoding="utf-8")
    for device, folder in (("one", "run-1"), ("two", "run-2")):
        assert f"- [{device}, 2026-01-02 03:04: Roofline]({folder}/roofline.png)" in text


def test_without_matplotlib_the_report_has_no_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.write([synthetic_run()], tmp_path) == [tmp_path / "report.md"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]
    assert "matplotlib is not installed" in capsys.readouterr().err


def test_plots_need_matplotlib_only_to_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] or ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    loaded = [name for name in sys.modules if name.startswith(plots.__name__)]
    assert len(loaded) == 5
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)
    importlib.import_module(plots.__name__)


# --- growth


def sweep(power: float, values: Sequence[int], axis: str = "tokens", **fields: Any) -> list[Row]:
    """Return rows whose times follow a power of one size and whose bytes are proportional to it."""
    sizes = fields.pop("sizes", {"width": 64})
    return [
        timed_row(
            f"{power}-{value}",
            fields.get("contender", "pg_kernels native"),
            (1e-6 * value**power,) * 3,
            sizes={**sizes, axis: value},
            bytes=1000 * value,
            **{name: field for name, field in fields.items() if name != "contender"},
        )
        for value in values
    ]


@pytest.mark.parametrize("axis", growth.AXES)
@pytest.mark.parametrize("power", [1, 2])
def test_exponents_are_recovered(axis: str, power: int) -> None:
    (found,) = growth.series(run_of(*sweep(power, (256, 512, 3000), axis)))
    assert (found.axis, found.op, found.mode, found.dtype) == (axis, "rms_norm", "forward", "bfloat16")
    assert found.contender == "pg_kernels native" and found.fixed == {"width": 64}
    assert [value for value, _ in found.points] == [256, 512, 3000]
    assert found.exponent == pytest.approx(power) and found.last_exponent == pytest.approx(power)


def test_the_last_exponent_is_that_of_the_largest_values() -> None:
    rows = [
        timed_row(f"{value}", "eager", (seconds,), sizes={"tokens": value})
        # Unordered; the exponents are 1.5, then 2.5.
        for value, seconds in ((400, 16.0), (100, 1.0), (200, 4.0 / 2**0.5))
    ]
    (found,) = growth.series(run_of(*rows))
    assert found.last_exponent == pytest.approx(2.5)
    assert found.exponent == pytest.approx(2.0)


def test_a_series_differs_in_one_size_only() -> None:
    rows = sweep(1, (1, 2, 4))
    assert len(growth.series(run_of(*rows))) == 1
    assert not growth.series(run_of(*rows[:2]))
    assert not growth.series(run_of(*rows[:2], replace(rows[2], status="failed", samples=())))
    for change in ({"sizes": {"width": 65, "tokens": 4}}, {"mode": "both"}, {"dtype": "float32"}, {"op": "geglu"}):
        assert not growth.series(run_of(*rows[:2], replace(rows[2], **change)))
    assert not growth.series(run_of(*rows[:2], replace(rows[2], contender="eager")))
    assert not growth.series(run_of(*sweep(1, (1, 2, 4), "width", sizes={})))


def test_two_axes_give_two_series() -> None:
    rows = [
        timed_row(f"{batch} {tokens}", "eager", (batch * tokens**2 / 1e9,), sizes={"batch": batch, "tokens": tokens})
        for batch, tokens in ((1, 128), (1, 256), (1, 512), (2, 128), (4, 128))
    ]
    found = {series.axis: series for series in growth.series(run_of(*rows))}
    assert found["tokens"].exponent == pytest.approx(2) and found["tokens"].fixed == {"batch": 1}
    assert found["batch"].exponent == pytest.approx(1) and found["batch"].fixed == {"tokens": 128}


def test_sizes_that_grow_with_the_axis_belong_to_it() -> None:
    def attention(tokens: int, prefix: int) -> Row:
        sizes = {"queries": tokens, "tokens": tokens, "prefix": prefix}
        return timed_row(f"{tokens} {prefix}", "eager", (tokens**2 / 1e9,), sizes=sizes)

    # The shortest causal case consists of its prefix only, so it is also the first bidirectional one.
    rows = [attention(tokens, 256) for tokens in (256, 512, 1024)] + [
        attention(tokens, tokens) for tokens in (272, 1040)
    ]
    causal, bidirectional = sorted(growth.series(run_of(*rows)), key=lambda series: str(series.fixed["prefix"]))
    assert causal.fixed == {"queries": "tokens", "prefix": 256}
    assert [value for value, _ in causal.points] == [256, 512, 1024]
    assert bidirectional.fixed == {"queries": "tokens", "prefix": "tokens"}
    assert [value for value, _ in bidirectional.points] == [256, 272, 1040]
    assert growth.fixed_sizes(causal) == "prefix 256, queries = tokens"


def test_the_growth_table_shows_the_bound_beside_the_time() -> None:
    rows = sweep(2, (256, 512, 1024), sizes={"model": "paligemma-3b", "batch": 1})
    *_, line = growth.table(run_of(*rows)).splitlines()
    assert cells(line) == [
        *("rms_norm", "forward", "bfloat16", "pg_kernels native", "tokens 256–1,024", "paligemma-3b, batch 1"),
        *("256: 65.5 ms, 512: 262 ms, 1,024: 1.05 s", "2.00", "1.00", "2.00", "1.00"),
    ]
    *_, line = growth.table(run_of(*(replace(row, bytes=0) for row in rows))).splitlines()
    assert cells(line)[7:] == ["2.00", "–", "2.00", "–"]
    assert growth.table(run_of(*rows[:2])) == ""
    assert "### Growth" not in report.markdown([run_of(*rows[:2])])


# --- plots


def colors_of(path: Path) -> set[str]:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and image.width == style.WIDTH * style.DPI
        assert 300 < image.height < 6000
        assert round(image.info["dpi"][0]) == style.DPI
        found = image.convert("RGB").getcolors(1 << 24)
    assert found is not None
    return {"#{:02X}{:02X}{:02X}".format(*color) for _, color in found}


@pytest.mark.filterwarnings("error")
def test_a_run_is_drawn(tmp_path: Path) -> None:
    run = synthetic_run()
    names = plots.draw(run, tmp_path)
    ops = dict.fromkeys(row.op for row in run.rows)
    assert names == {
        **{f"Speed-up over the baseline: {op}": f"speedup-{op}.png" for op in ops},
        "Roofline": "roofline.png",
        "Scaling": "scaling.png",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names.values())
    look = style.styles(run)
    for name in names.values():
        found = colors_of(tmp_path / name)
        assert look["pg_kernels triton"].color in found, name
        assert (look["Liger-Kernel"].color in found) == (name in ("speedup-rms_norm.png", "scaling.png")), name


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([], []),
        ([skipped("c", "eager", "no memory")], []),
        (case("c", {"pg_kernels native": 1}), []),
        (case("c", {"pg_kernels native": 1, "eager": 2}), ["speedup.png"]),
        (case("c", {"eager": 2}, bytes=1), ["roofline.png"]),
        (case("c", {"eager": 2}, bytes=1, flops=1, arithmetic="int8"), ["roofline.png"]),
        (sweep(1, (1, 2, 3)), ["roofline.png", "scaling.png"]),
        (case("c", {"pg_kernels native": 1e6, "eager": 1, "SDPA": 1e-6}), ["speedup.png"]),
    ],
)
def test_only_what_has_data_is_drawn(tmp_path: Path, rows: list[Row], names: list[str]) -> None:
    assert list(plots.draw(run_of(*rows), tmp_path / "plots").values()) == names
    for name in names:
        assert len(colors_of(tmp_path / "plots" / name)) > 2


@pytest.mark.filterwarnings("error")
def test_many_cases_make_several_figures(tmp_path: Path) -> None:
    times = {"pg_kernels native": 1, "eager": 2}
    rows = [row for index in range(speedup.MOST_CASES) for row in case(f"norm {index}", times)]
    assert list(plots.draw(run_of(*rows), tmp_path).values()) == ["speedup.png"]
    rows += [row for index in range(3) for row in case(f"other {index}", times, op="geglu")]
    assert list(plots.draw(run_of(*rows), tmp_path).values()) == ["speedup-rms_norm.png", "speedup-geglu.png"]
    rows += case("one more", times)
    assert plots.draw(run_of(*rows), tmp_path) == {
        "Speed-up over the baseline: rms_norm, 1 of 2": "speedup-rms_norm-1.png",
        "Speed-up over the baseline: rms_norm, 2 of 2": "speedup-rms_norm-2.png",
        "Speed-up over the baseline: geglu": "speedup-geglu.png",
    }


def test_many_series_make_several_figures(tmp_path: Path) -> None:
    rows = [row for op in range(13) for row in sweep(1, (1, 2, 4), op=f"op {op}")] + sweep(1, (1, 2, 4), "batch")
    names = plots.draw(run_of(*(replace(row, case=f"{row.op} {row.case}", bytes=0) for row in rows)), tmp_path)
    assert list(names.values()) == ["scaling-tokens-1.png", "scaling-tokens-2.png", "scaling-batch.png"]


def test_bars_end_at_the_median_ratio_and_whiskers_at_its_percentiles() -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    baseline = timed_row("c", "eager", (1.0, 2.0, 3.0, 4.0, 5.0, 6.0))
    ours = timed_row("c", "pg_kernels native", (1.0,) * 6)
    ends = speedup._bar(axes, 0.0, ours, baseline, style.styles(run_of(ours))["pg_kernels native"])
    bar: Any = axes.patches[0]
    assert len(axes.patches) == 1
    assert (bar.get_x(), bar.get_x() + bar.get_width()) == pytest.approx((1.0, 3.5))
    assert ends == pytest.approx((2.0, 5.0))
    assert tuple(axes.lines[0].get_xdata()) == pytest.approx((2.0, 5.0))
    assert [text.get_text() for text in axes.texts] == ["3.50×"]


def test_contenders_look_different_and_the_same_in_every_figure() -> None:
    names = ["eager", *(f"pg_kernels {index}" for index in range(6)), *(f"other {index}" for index in range(20))]
    rows = [row for index in range(2) for row in case(f"c{index}", dict.fromkeys(names, 1.0))]
    look = style.styles(run_of(*rows))
    assert list(look) == names
    assert len({(style.color, style.hatch) for style in look.values()}) == len(names)
    assert look["eager"].color == style.BASELINE
    # Contenders that were not timed keep their colours.
    failed = replace(rows[7], status="failed", samples=())
    assert style.styles(run_of(*rows[:7], failed, *rows[8:])) == look


def test_multiples_are_written_as_people_do() -> None:
    ratios = [1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 16]
    assert [speedup.multiple(ratio) for ratio in ratios] == ["1/64×", "1/16×", "⅛×", "¼×", "½×", "1×", "2×", "16×"]


def test_labels_of_crowded_values_are_left_out() -> None:
    assert scaling._apart([256, 512, 1024, 2048, 4096, 8192]) == [256, 512, 1024, 2048, 4096, 8192]
    assert scaling._apart([1, 4, 8]) == [1, 4, 8]
    assert scaling._apart([16, 64, 128, 256, 272, 512, 1040, 4112, 8192]) == [16, 64, 272, 1040, 8192]


# --- README


TEXT = f"# Title\r\n\r\nBefore.\n\n{readme.BEGIN}\nold\n{readme.END}\n\nAfter.\n"


def test_the_readme_is_rewritten_between_its_markers(tmp_path: Path) -> None:
    file, run = tmp_path / "README.md", synthetic_run(path=tmp_path / "docs/runs/h 100/run.json")
    file.write_bytes(TEXT.encode())
    section = readme.tables([run], tmp_path)
    assert readme.update(file, section)
    written = file.read_bytes().decode()
    assert written == TEXT.replace("old\n", section)
    assert section.endswith("\nStored run: [docs/runs/h 100/run.json](docs/runs/h%20100/run.json)\n")
    assert section.startswith(
        "Measured on NVIDIA H100 80GB HBM3 (python 3.11.9, torch 2.13.0, triton 3.6.0, commit 0123456789ab, "
        "2026-01-02 03:04); `pytest -q benchmarks/suite --on cuda`:\n"
    )
    assert not readme.update(file, section)
    assert file.read_bytes().decode() == written
    assert readme.update(file, readme.tables([run, replace(run, device="another")], tmp_path))
    assert file.read_text(encoding="utf-8").count("Measured on") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        (TEXT.replace(readme.BEGIN, ""), readme.BEGIN),
        (TEXT.replace(readme.END, ""), readme.END),
        (f"{readme.END}\n{readme.BEGIN}\n", readme.END),
    ],
)
def test_a_readme_without_markers_is_refused_and_named(tmp_path: Path, text: str, missing: str) -> None:
    file = tmp_path / "README.md"
    file.write_bytes(text.encode())
    with pytest.raises(ValueError, match=f"README.md lacks the marker {missing}"):
        readme.update(file, "new\n")
    assert file.read_bytes() == text.encode()


def readme_lines(*rows: Row) -> list[list[str]]:
    return [cells(line) for line in readme.tables([run_of(*rows)], Path()).splitlines() if line.startswith("| ")][2:]


def test_a_line_of_the_readme() -> None:
    rows = case("a", {"pg_kernels native": 2, "pg_kernels reference": 1, "eager": 8, "SDPA": 4}, bytes=2_000_000)
    assert readme_lines(*rows) == [
        ["rms_norm", "forward", "a", "2.00 ms", "eager, 8.00 ms", "SDPA, 4.00 ms", "2.00×", "50%"]
    ]


def test_the_summary_leaves_out_other_ops_modes_and_int8_dynamic() -> None:
    model = {"pg_kernels": 4, "pg_kernels int8": 2, "pg_kernels int8-dynamic": 1, "transformers sdpa": 8}
    rows = [
        *case("a", {"pg_kernels native": 2, "eager": 1}),
        *case("b", {"pg_kernels native": 2, "eager": 1}, mode="both"),
        *case("c", {"pg_kernels native": 2, "eager": 1}, op="geglu"),
        *case("d", model, op="prefill"),
    ]
    text = readme.summary(replace(run_of(*rows), versions={"torch": "2"}), Path())
    assert [cells(line) for line in text.splitlines() if line.startswith("| ")][2:] == [
        ["rms_norm", "a", "2.00 ms", "eager, 1.00 ms", "0.50×"],
        ["prefill", "d", "4.00 ms", "transformers sdpa, 8.00 ms", "2.00×"],
        ["prefill", "d", "int8, 2.00 ms", "transformers sdpa, 8.00 ms", "4.00×"],
    ]


def test_the_readme_shows_where_we_lose_or_fail() -> None:
    lost = case("a", {"pg_kernels native": 8, "eager": 2})
    failed = [skipped("b", "pg_kernels native", "x", "failed", op="geglu"), *case("b", {"eager": 1}, op="geglu")]
    assert [line[3:] for line in readme_lines(*lost, *failed)] == [
        ["8.00 ms", "eager, 2.00 ms", "eager, 2.00 ms", "0.25×", "–"],
        ["failed", "eager, 1.00 ms", "eager, 1.00 ms", "–", "–"],
    ]


def test_the_readme_shows_the_largest_case_of_each_op_and_mode() -> None:
    three = {"pg_kernels native": 1, "eager": 2, "torch.compile": 3}
    two = {"pg_kernels native": 1, "eager": 2}
    rows = [
        *case("small", three, bytes=10, sizes={"model": "paligemma-3b"}),
        *case("large", three, bytes=10, flops=10, arithmetic="bfloat16", sizes={"model": "paligemma-3b"}),
        *case("fast but smaller", {**three, "pg_kernels native": 0.01}, bytes=19),
        *case("other model", three, bytes=99, sizes={"model": "paligemma2-28b"}),
        *case("only its baseline beside it", two, bytes=99),
        *(skipped("too large", name, "no memory", bytes=999) for name in three),
        *case("backward", two, bytes=1, mode="backward", dtype="float32"),
        *case("geglu", three, bytes=1, op="geglu"),
    ]
    assert [line[:3] for line in readme_lines(*rows)] == [
        ["rms_norm", "forward", "large"],
        ["rms_norm", "backward", "backward, float32"],
        ["geglu", "forward", "geglu"],
    ]
    assert [line[2] for line in readme_lines(*reversed(rows))] == ["geglu", "backward, float32", "large"]
