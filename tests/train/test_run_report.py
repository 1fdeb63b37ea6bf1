"""Runs read back and shown: every line counted, extremes kept, nothing in a file that the page would obey."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import statistics
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs as small

from elm_mlx.errors import ElmError, InputError
from elm_mlx.train import metrics, run_report

TEMPLATE = resources.files("elm_mlx.train").joinpath("report.html").read_text("utf-8")
NODE = shutil.which("node")


def update(step: int, loss: float = 2.0, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "loss": loss, "learning_rate": 1e-3, "tokens": 100, "seconds": 0.5, "tokens_per_second": 200.0,
        "memory": 10**9, "skipped": False,
    } | more  # fmt: skip


def write(path: Path, *lines: Any, about: Any = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text)
    if about is not None:
        (path / "run.json").write_text(about if isinstance(about, str) else json.dumps(about))
    return path


def content(page: str) -> Any:
    """What the page's script gets, found as a browser would find it."""
    found = re.search(r'<script type="application/json" id="content">(.*?)</script', page, re.S | re.I)
    assert found
    return json.loads(found[1], parse_constant=pytest.fail)


def pairs(column: metrics.Column) -> list[tuple[int, float]]:
    return list(zip(column.steps, column.values, strict=True))


# ---- Reading ----


def test_samples_of_the_first_and_the_last_validation_are_shown(tmp_path: Path) -> None:
    def asked(step: int, answer: str) -> dict[str, Any]:
        samples = [{"prompt": "2 + 3?\n", "answer": answer, "verdict": "right"}]
        return {"step": step, "valid_loss": 0.5, "samples": samples}

    path = write(tmp_path / "run", asked(0, "</script>"), update(1), asked(1, "?"), asked(2, "5"))
    found = content(run_report.page(metrics.read([path])))
    assert found["samples"] == [
        ["run", "0", "right", "2 + 3?\n", "</script>"], ["run", "2", "right", "2 + 3?\n", "5"],
    ]  # fmt: skip
    write(tmp_path / "bad", update(1), {"step": 1, "valid_loss": 0.5, "samples": [7]}, update(2))
    (damaged,) = metrics.read([tmp_path / "bad"])
    assert damaged.samples == [] and "1 damaged line" in damaged.notes[0]


def test_a_real_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    result = small.run(tmp_path / "run", small.settings(8))
    (run,) = metrics.read([tmp_path / "run"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "loss" in line]
    for key in ("loss", "learning_rate", "grad_norm", "memory", "tokens_per_second"):
        assert pairs(run.column(key)) == [(line["step"], line[key]) for line in updates]
    assert pairs(run.column("valid_loss")) == [
        (line["step"], line["valid_loss"]) for line in lines if "valid_loss" in line
    ]
    assert run.steps == 8 and run.name == "run" and not run.notes and not run.about
    assert run.tokens.values[-1] == result.progress.tokens
    assert run.seconds.values[-1] == pytest.approx(result.progress.seconds)  # validations are not in it
    assert "tokens" not in run.columns and "seconds" not in run.columns


def test_a_run_that_is_under_way_lacks_only_its_half_line(tmp_path: Path) -> None:
    half = json.dumps(update(3))[:25]
    (run,) = metrics.read([write(tmp_path / "a", update(1), update(2), half)])
    assert list(run.column("loss").steps) == [1, 2] and not run.notes
    (run,) = metrics.read([write(tmp_path / "b", update(1), json.dumps(update(2)))])
    assert list(run.column("loss").steps) == [1, 2]


@pytest.mark.parametrize(
    "damage",
    ["{", "[1]", "7", '"step"', "{}", '{"step": "1"}', '{"step": true}', '{"step": 1.5}', '{"step": -1}', "[" * 100_000,
     f'{{"step": 2, "loss": 1{"0" * 400}}}', f'{{"step": {10**30}, "loss": 1}}', "\x00\x00"],
)  # fmt: skip
def test_damaged_lines_are_counted_and_told(tmp_path: Path, damage: str) -> None:
    (run,) = metrics.read([write(tmp_path, update(1), damage + "\n", "\n", update(3))])
    assert list(run.column("loss").steps) == [1, 3]
    assert run.notes == ["1 damaged line in metrics.jsonl left out"]
    assert run.notes[0] in content(run_report.page([run]))["runs"][0]["notes"]


def test_bytes_that_are_no_text_are_damage(tmp_path: Path) -> None:
    write(tmp_path, update(1))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "\xff": 1}\n')
    (run,) = metrics.read([tmp_path])
    assert run.steps == 1 and len(run.notes) == 1


def test_a_run_that_went_back_shows_each_step_once(tmp_path: Path) -> None:
    lines = [update(1, 5.0), update(2, 4.0), {"step": 2, "valid_loss": 4.5}, update(3, 9.0, skipped=True)]
    again = [update(2, 3.0), {"step": 2, "valid_loss": 3.5}, update(3, 2.0)]
    (run,) = metrics.read([write(tmp_path, *lines, *again)])
    assert pairs(run.column("loss")) == [(1, 5.0), (2, 3.0), (3, 2.0)]
    assert pairs(run.column("valid_loss")) == [(2, 3.5)]
    assert run.tokens.values.tolist() == [100, 200, 300] and sum(run.column("skipped").values) == 0
    assert run.notes == ["the run went back once; of each step, the last is shown"]


def test_the_mark_of_the_best_validation_is_no_curve(tmp_path: Path) -> None:
    (run,) = metrics.read([write(tmp_path / "run", update(1), {"step": 1, "valid_loss": 2.0, "best": True})])
    assert "best" not in run.columns and "valid_loss" in run.columns


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such directory"):
        metrics.read([tmp_path / "nowhere"])
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"none/metrics\.jsonl: no such file"):
        metrics.read([tmp_path / "none"])
    with pytest.raises(InputError, match="holds no line that can be read yet"):
        metrics.read([write(tmp_path / "empty")])
    with pytest.raises(InputError, match=r"holds no line that can be read$"):
        metrics.read([write(tmp_path / "rubbish", "a\n", "b\n")])
    (tmp_path / "odd" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(InputError, match=r"metrics\.jsonl: cannot be read: Is a directory"):
        metrics.read([tmp_path / "odd"])


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, update(1)) for name in ("x/lora", "y/lora", "z/a/dora", "rank8")]
    assert [run.name for run in metrics.read(paths)] == ["x/lora", "y/lora", "dora", "rank8"]
    assert len(metrics.read([paths[0], paths[1], paths[0] / ".." / "lora", paths[0]])) == 2


def test_here_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path / "mine", update(1)))
    assert [run.name for run in metrics.read([Path()])] == ["mine"]


def test_settings_are_flat_and_differences_marked(tmp_path: Path) -> None:
    about = {"command": "lora", "settings": {"rank": 8, "schedule": {"rate": 0.1}, "targets": ["a", "b"], "x": {}}}
    found = metrics.read(
        [
            write(tmp_path / "a", update(1), about=about),
            write(tmp_path / "b", update(1), about=about | {"settings": {"rank": 16}}),
            write(tmp_path / "c", update(1)),
            write(tmp_path / "d", update(1), about="{"),
        ]
    )
    assert found[3].notes == ["run.json cannot be read"]
    assert run_report.about(found) == [
        ("settings.rank", ["8", "16", "", ""], True),
        ("settings.schedule.rate", ["0.1", "", "", ""], True),
        ("settings.targets", ['["a", "b"]', "", "", ""], True),
        ("settings.x", ["{}", "", "", ""], True),
        ("command", ["lora", "lora", "", ""], False),
    ]


# ---- Figures ----


def test_the_figures(tmp_path: Path) -> None:
    lines = [{"step": 0, "valid_loss": 5.0, "seconds": 99}]
    for step in range(1, 41):
        skipped = step == 7
        lines.append(
            update(
                step,
                math.nan if skipped else 4 - step / 20,
                skipped=skipped,
                tokens_per_second=step,
                matmul_share=step / 100,
            )
        )
    lines += [{"step": 30, "valid_loss": 2.5}, {"step": 40, "valid_loss": 2.75}]
    found = metrics.read([write(tmp_path / "a", *lines), write(tmp_path / "b", {"step": 3, "valid_loss": 1.0})])
    figures = dict(run_report.summary(found))
    assert figures == {
        "steps": ["40", "3"],
        "tokens": ["4,000", ""],
        "training loss at the end": [f"{statistics.fmean(4 - step / 20 for step in range(21, 41)):.4f}", ""],
        "validation, first": ["5.0000", "1.0000"],
        "validation, last": ["2.7500", "1.0000"],
        "validation, best": ["2.5000", "1.0000"],
        "best at step": ["30", "3"],
        "tokens/s, median": ["20", ""],
        "share of matmul speed, median": ["20.5%", ""],
        "peak memory": ["1.00 GB", ""],
        "time in updates": ["20.0 s", ""],
        "skipped updates": ["1", ""],
        "NaN or infinite losses": ["1", ""],
    }


def test_every_numeric_key_has_a_chart(tmp_path: Path) -> None:
    line = update(1, rewards=0.5, accuracy=0.7, note="text", nothing=None)
    (run,) = metrics.read([write(tmp_path, line, {"step": 1, "valid_loss": 2, "valid_accuracy": 0.6, "valid_only": 1})])
    assert run_report.charts([run]) == [
        ["loss", "valid_loss"], ["learning_rate"], ["tokens_per_second"], ["memory"], ["rewards"],
        ["accuracy", "valid_accuracy"], ["valid_only"],
    ]  # fmt: skip
    assert content(run_report.page([run]))["charts"] == run_report.charts([run])


# ---- Thinning and smoothing ----


def noisy(count: int, seed: int = 0) -> metrics.Column:
    column, draw = metrics.Column(), np.random.default_rng(seed)
    for step, value in enumerate(draw.normal(2, 0.3, count), start=1):
        column.add(step, float(value))
    return column


def test_thinning_keeps_extremes_and_means() -> None:
    column = noisy(10_007)
    column.values[5_000], column.values[700] = 99.0, -7.0
    column.values[3_333] = column.values[3_334] = math.nan
    kept = run_report.thinned(column, 50)
    assert len(kept["step"]) <= 3 * 50 + 2 and kept["step"] == sorted(set(kept["step"]))
    assert kept["step"][0] == 1 and kept["step"][-1] == 10_007
    shown = dict(zip(kept["step"], kept["value"], strict=True))
    assert shown[5_001] == 99.0 and shown[701] == -7.0 and shown[3_334] is None
    for step, value in shown.items():
        assert value is None or value == pytest.approx(column.values[step - 1], rel=1e-4)
    # All in all the stretches hold every number, with its weight.
    assert sum(kept["count"]) == 10_005 and kept["at"][-1] == 10_007
    total = sum(mean * count for mean, count in zip(kept["mean"], kept["count"], strict=True))
    assert total / 10_005 == pytest.approx(statistics.fmean(column.finite()), rel=1e-4)


def test_few_values_stay_as_they_are() -> None:
    column = noisy(100)
    assert run_report.thinned(column, 50) == {
        "step": list(range(1, 101)),
        "value": [float(f"{value:.5g}") for value in column.values],
    }


def test_a_stretch_without_a_number_is_a_gap() -> None:
    column = metrics.Column()
    for step in range(1000):
        column.add(step, math.nan if 400 <= step < 600 else math.inf if step == 10 else 1.0)
    kept = run_report.thinned(column, 10)
    assert kept["mean"] == [1.0] * 4 + [None] * 2 + [1.0] * 4 and kept["count"][0] == 99
    assert {step for step, value in zip(kept["step"], kept["value"], strict=True) if value is None} == {10, 400, 500}


def test_smoothing_against_its_definition() -> None:
    values = [*noisy(60).values]
    means = run_report.smoothed(values, 8)
    for end in (1, 2, 30, 60):
        weights = [(1 - 1 / 8) ** (end - 1 - i) for i in range(end)]
        assert means[end - 1] == pytest.approx(np.average(values[:end], weights=weights))
    assert run_report.smoothed(values, 1) == pytest.approx(values)
    with_gap = run_report.smoothed([1.0, math.nan, 1.0], 4)
    assert with_gap[0] == with_gap[2] == 1 and math.isnan(with_gap[1])


# ---- The page ----


def test_the_page_holds_whatever_names_are(tmp_path: Path) -> None:
    evil = "<script>alert(1)<!--\u2028&\"'"
    about = {"k</script>": "<img src=x onerror=alert(1)>"}
    path = write(tmp_path / evil, update(1, **{"</script><b>": 1.0}), about=about)
    page = run_report.page(metrics.read([path]))
    found = content(page)
    assert found["title"] == evil == found["runs"][0]["name"]
    assert ["</script><b>"] in found["charts"]
    assert found["about"] == [["k</script>", ["<img src=x onerror=alert(1)>"], False]]
    assert f"<title>{html.escape(evil)}</title>" in page
    # Nothing of theirs is markup: the page has as many tags as one with a tame name.
    tame = run_report.page(metrics.read([write(tmp_path / "tame", update(1, b=1.0), about={"k": "v"})]))
    assert page.count("<") == tame.count("<")
    assert "innerHTML" not in TEMPLATE and "insertAdjacentHTML" not in TEMPLATE


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "caf\udce9", update(1, **{"\ud800": 1.0}))
    run_report.write_page(metrics.read([path]), tmp_path / "page.html")
    found = content((tmp_path / "page.html").read_text("utf-8"))
    assert found["runs"][0]["name"] == "caf?" and ["?"] in found["charts"]


def test_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    """But for a page that follows its run, from where it came itself; a browser lets no other ask."""
    elsewhere = r"https?://(?!www\.w3\.org/2000/svg)|<link|@import|url\((?!#)|\ssrc=|fetch\((?!.content.,)|import\("
    assert not re.findall(elsewhere, TEMPLATE)
    (run,) = metrics.read([write(tmp_path, update(1))])
    for watched, policy in ((False, ""), (True, "; connect-src 'self'")):
        page = run_report.page([run], watched)
        assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'{policy}\">" in page
        assert (" data-watched" in page) == watched


def test_a_number_that_is_none_is_a_gap(tmp_path: Path) -> None:
    (run,) = metrics.read([write(tmp_path, update(1), update(2, math.nan), update(3, math.inf), update(4))])
    assert content(run_report.page([run]))["runs"][0]["series"]["loss"]["value"] == [2, None, None, 2]


def test_long_runs_make_a_small_page() -> None:
    found = []
    for seed in range(8):
        run = metrics.RunMetrics(f"run {seed}", Path(f"run {seed}"))
        columns = noisy(20_000, seed)
        run.columns = dict.fromkeys(("loss", "learning_rate", "tokens_per_second", "grad_norm", "memory"), columns)
        run.tokens, run.seconds = columns, columns
        found.append(run)
    assert len(run_report.page(found)) < 2_000_000
    assert len(run_report.page(found[:1])) < 500_000


def test_the_clock_can_be_read_between_its_points() -> None:
    run = metrics.RunMetrics("a", Path("a"))
    for step in range(1, 5001):
        run.tokens.add(step, 100.0 * step)
        run.seconds.add(step, 0.5 * step)
    run.columns["loss"] = noisy(5000)
    clock = content(run_report.page([run]))["runs"][0]["clock"]
    assert len(clock["step"]) < 2500 and clock["step"][-1] == 5000
    assert clock["tokens"] == [100 * step for step in clock["step"]]
    assert clock["seconds"] == [0.5 * step for step in clock["step"]]


@pytest.fixture(scope="module")
def in_node(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The page's own functions on numbers: an expression's value."""
    if NODE is None:
        pytest.skip("there is no node to run the page's script")
    script = TEMPLATE[TEMPLATE.rindex("<script>") + len("<script>") : TEMPLATE.rindex("</script>")]
    module = tmp_path_factory.mktemp("page") / "page.js"
    module.write_text(script)

    def value(expression: str, *arguments: Any) -> Any:
        program = f"const page = require({json.dumps(str(module))}); const a = {json.dumps(arguments)};"
        program += f"console.log(JSON.stringify({expression}))"
        ended = subprocess.run([str(NODE), "-e", program], capture_output=True, text=True, timeout=30, check=True)
        return json.loads(ended.stdout)

    return value


def test_the_page_smooths_as_python_does(in_node: Any) -> None:
    column = noisy(400)
    values = list(column.values)
    assert in_node("page.smoothed(a[0], undefined, 10)", values) == pytest.approx(run_report.smoothed(values, 10))
    assert in_node("page.smoothed([1, null, 3], undefined, 1)") == [1, None, 3]
    # Of a thinned column, the mean over much more than a stretch is that of all values.
    kept = run_report.thinned(noisy(20_000), 1000)
    thin = in_node("page.smoothed(a[0], a[1], 2000)", kept["mean"], kept["count"])
    full = run_report.smoothed(noisy(20_000).values, 2000)
    for mean, step in list(zip(thin, kept["at"], strict=True))[100:]:
        assert mean == pytest.approx(full[step - 1], abs=2e-3)


def test_the_pages_ticks(in_node: Any) -> None:
    got = in_node(
        "[page.ticks(0, 10, 5), page.ticks(-0.31, 0.32, 6), page.ticks(0, 3e-4, 3), page.ticks(0, 7200, 4, true),"
        " page.ticks(5, 5, 4), page.logTicks(0.01, 100, 9), page.logTicks(1e-9, 1, 4), page.logTicks(2, 5, 6)]"
    )
    assert got[0] == [0, 2, 4, 6, 8, 10] and got[1] == [-0.2, 0, 0.2] and got[2] == [0, 1e-4, 2e-4, 3e-4]
    assert got[3] == [0, 1800, 3600, 5400, 7200] and got[4] == [5]
    assert got[5] == [0.01, 0.1, 1, 10, 100]
    assert 2 <= len(got[6]) <= 5 and all(math.log10(tick) == pytest.approx(round(math.log10(tick))) for tick in got[6])
    assert got[7] == [2, 2.5, 3, 3.5, 4, 4.5, 5]


def test_the_page_writes_numbers_short(in_node: Any) -> None:
    numbers = [0, 2, 2.34567, 1500, 12_345, 350_000, 2.1e9, 3e-4, 2.5e-5, -0.5, 100, 1e20]
    shown = ["0", "2", "2.346", "1500", "12.35k", "350k", "2.1G", "3e-4", "2.5e-5", "-0.5", "100", "1e+20"]
    assert in_node("a[0].map((n) => page.short(n))", numbers) == shown
    assert in_node("[0, 9.25, 61, 3725].map(page.clock)") == ["0 s", "9.25 s", "1:01", "1:02:05"]


def test_the_page_finds_places(in_node: Any) -> None:
    assert in_node("[-1, 1, 2.4, 2.6, 9].map((x) => page.nearest([1, 2, 3, 5], x))") == [0, 0, 1, 2, 3]
    assert in_node("[0, 1, 2, 3, 9].map((x) => page.between([2, 4], [20, 60], x))") == [0, 10, 20, 40, 60]


# ---- The picture ----


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = [update(step, math.nan if step == 5 else 3 / step, extra=step) for step in range(1, 30)]
    paths = [
        write(tmp_path / "_$x^{$ 語", *lines, {"step": 29, "valid_loss": 1.0}),
        write(tmp_path / "b", update(1), {"step": 1, "valid_loss": math.nan}),
    ]
    found = metrics.read(paths)
    run_report.write_png(found, tmp_path / "all.png")
    image = (tmp_path / "all.png").read_bytes()
    assert image.startswith(b"\x89PNG\r\n") and image.rstrip().endswith(b"IEND\xaeB`\x82")
    width, height = (int.from_bytes(image[at : at + 4], "big") for at in (16, 20))
    assert width == 1210 and height > 600
    run_report.write_png(found[1:], tmp_path / "one.png")
    assert len((tmp_path / "one.png").read_bytes()) < len(image)


def test_without_matplotlib_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    found = metrics.read([write(tmp_path / "a", update(1))])
    with pytest.raises(ElmError, match=r"a PNG needs matplotlib: pip install 'elm-mlx\[plot\]'"):
        run_report.write_png(found, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_a_spike_does_not_flatten_a_chart(in_node: Any) -> None:
    curve = [5 - step / 100 for step in range(400)]
    low, high = in_node("page.robust(a[0])", [*curve[:120], 5000.0, *curve[121:]])
    assert low == pytest.approx(curve[-1]) and 5 <= high < 10
    low, high = in_node("page.robust(a[0])", [*curve[:120], -5000.0, None, *curve[122:]])
    assert -5 < low <= curve[-1] and high == pytest.approx(5)


def test_what_flattens_nothing_is_shown_whole(in_node: Any) -> None:
    for values in (
        [5 - step / 100 for step in range(400)],
        [1.0, 9.0, 5000.0],
        [3.0] * 50,
        [10.0, 6.0, *[4.0, 3.0] * 40],
    ):
        assert in_node("page.robust(a[0])", values) == [min(values), max(values)]
    assert in_node("page.robust(a[0])", [3.0] * 50 + [7.0]) == [3.0, 7.0], "of values that are all alike, none is far"
