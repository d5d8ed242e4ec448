"""The report of a run: it needs no network, and no text of a document becomes markup."""

import json
import re
import shlex
import time
import warnings
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from conftest import load_recipe, small_run

from common.console import InputError
from common.run import compare
from common.run.labels import CHINESE, labels, system_language
from common.run.plots import Line, clock, line_plot, short, stacked_bar, ticks
from common.run.record import RunRecord, read_samples
from common.run.report import EXPLANATIONS, page, reproduce, write_report
from common.run.results import plot_loss_curve

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(1)> & \"quoted' \u202e"


class Elements(HTMLParser):
    """Every element of a page, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.text, self.texts = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data
        self.texts.append(data)


def history(steps: int = 5) -> list[dict]:
    """Return a log: a step of 100 tokens takes 2 s; an evaluation at every second step is logged after the step."""
    entries = []
    for step in range(1, steps + 1):
        entry = {"step": step, "loss": 10.0 - step, "tokens_seen": 100 * step, "train_seconds": 2.0 * step}
        entry |= {"learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second_per_device": 50.0}
        entries.append(entry | {"memory_peak_gib": 1.0, "memory_allocated_gib": 0.5})
        if step % 2 == 0:
            entries.append({"step": step, "eval_loss": 9.5 - step, "eval_bits_per_byte": 3.0, "eval_perplexity": 9.0})
    return entries


def svgs(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg .*?</svg>", text, flags=re.DOTALL)]


def test_hostile_text_is_shown_as_text_and_nothing_comes_from_elsewhere():
    ledger = {"tokens_read": 10, "tokens_train": 8, "tokens_held_out": 2, "documents": 1}
    run = RunRecord(
        name=HOSTILE,
        history=history(),
        results={"sources": {HOSTILE: ledger}},
        identity={"recipe": HOSTILE, "model": {HOSTILE: HOSTILE}, "data": {"packing": HOSTILE}},
        launches=[
            {"command": HOSTILE, "versions": {HOSTILE: HOSTILE}, "launcher": {HOSTILE: HOSTILE}, "commit": HOSTILE}
        ],
        samples=[{"step": 2, "prompt": HOSTILE, "text": HOSTILE}],
        status={"state": HOSTILE},
    )
    found = Elements(page(run))
    assert not {"script", "img", "link", "iframe", "object", "base"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name in ("src", "href") or name.startswith("on")]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in found.attributes
    assert found.text.count(HOSTILE) >= 9
    assert "://" not in page(run) and "@import" not in page(run) and "url(" not in page(run)


def test_a_curve_is_where_its_numbers_are():
    """All points of a straight line lie between its first and its last point."""
    [drawing] = svgs(line_plot("t", "x", [Line("a", [0.0, 50.0, 100.0], [4.0, 3.0, 2.0])]))
    [path] = [element.get("d") for element in drawing.iter() if element.get("class") == "line line0"]
    points = [tuple(map(float, point.split())) for point in re.findall(r"[\d.]+ [\d.]+", path)]
    assert len(points) == 3 and points[0][0] < points[1][0] < points[2][0] and points[0][1] < points[2][1]
    assert points[1] == pytest.approx([(points[0][i] + points[2][i]) / 2 for i in range(2)], abs=0.11)


def test_a_point_that_is_not_finite_leaves_a_gap_and_a_line_without_points_has_no_plot():
    lines = [Line("a", [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, float("nan"), 3.0, 4.0])]
    [drawing] = svgs(line_plot("t", "x", lines))
    [path] = [element.get("d") for element in drawing.iter() if element.get("class") == "line line0"]
    assert [letter for letter in path if letter.isalpha()] == ["M", "L", "M", "L"]
    assert line_plot("t", "x", [Line("a", [1.0], [float("inf")])]) == "" == stacked_bar("t", {"a": 0})
    assert svgs(line_plot("t", "x", [Line("a", [1.0], [2.0])])), "one point is a plot"


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (3.2036, 3.2472), (0, 62_500_000), (1e-5, 1e-3), (-5, 7), (0, 1e-12)]
)
def test_ticks_are_few_round_and_inside(low, high):
    marks = ticks(low, high)
    assert 3 <= len(marks) <= 7 and low <= marks[0] and marks[-1] <= high * (1 + 1e-9)
    assert all(len(f"{mark:.6e}".rstrip("0").split("e")[0].rstrip("0")) <= 6 for mark in marks)


@pytest.mark.parametrize("high", [7, 44, 52, 130, 3000, 5000, 20_000, 100_000, 400_000])
def test_a_time_axis_has_at_least_two_ticks(high):
    marks = ticks(0.02 * high, high, time=True)
    assert 2 <= len(marks) <= 6 and 0.02 * high <= marks[0] and marks[-1] <= high


def test_units():
    assert [short(number) for number in (0, 1500, 2_000_000, 2e-5, 0.001)] == ["0", "1.5k", "2M", "2e-05", "0.001"]
    assert [clock(seconds) for seconds in (90, 300, 9000, 259_200)] == ["90 s", "5 min", "2.5 h", "3 d"]


def test_an_evaluation_is_placed_by_the_tokens_and_seconds_of_its_step():
    run = RunRecord("r", history())
    assert run.series("eval_loss", "tokens_seen") == ([200.0, 400.0], [7.5, 5.5])
    assert run.series("eval_loss", "train_seconds") == ([4.0, 8.0], [7.5, 5.5])
    before = [{"step": 0, "eval_loss": 9.9}, *history()]
    assert RunRecord("r", before).series("eval_loss", "tokens_seen")[0][0] == 0.0


def test_the_report_of_a_long_run_does_not_hold_up_training():
    """A log of 20,000 entries took several minutes for each report while every evaluation was placed on its own."""
    began = time.monotonic()
    page(RunRecord("r", history(20_000)))
    assert time.monotonic() - began < 10


def test_a_ledger_bar_is_divided_as_its_tokens():
    [drawing] = svgs(stacked_bar("t", {"train": 75, "held_out": 20, "dropped": 5}))
    widths = [float(element.get("width")) for element in drawing.iter() if element.tag == "rect"]
    assert [width / sum(widths) for width in widths] == pytest.approx([0.75, 0.2, 0.05], abs=1e-3)


def test_the_files_that_a_killed_run_left_still_give_a_report(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text(json.dumps({"log_history": history(2)}))
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text(json.dumps({"log_history": history(10)}))
    (tmp_path / "all_results.json").write_text('{"half')
    damaged = '{}\n[]\n{"step": "1", "prompt": 2}\n'
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "prompt": "a", "text": "b"}\n' + damaged + '{"step": 2, "pro')
    assert read_samples(tmp_path) == [{"step": 1, "prompt": "a", "text": "b"}]
    (tmp_path / "launches.jsonl").write_text(damaged)
    (tmp_path / "eval_tasks.jsonl").write_text(damaged)
    (tmp_path / "run.json").write_text("{}")
    assert "1,000" in Elements(write_report(tmp_path).read_text(encoding="utf-8")).text, (
        "the log of the newest checkpoint"
    )
    assert not list(tmp_path.glob("*.partial"))


def test_the_commands_that_repeat_a_run():
    launch = {"commit": "abc-dirty", "versions": {"torch": "2.13.0+cpu", "numpy": "2.1.0"}, "command": "python x.py"}
    shown = reproduce(RunRecord("r", [], launches=[launch]))
    assert "<pre>git checkout abc\npip install torch==2.13.0 numpy==2.1.0\npython x.py</pre>" in shown
    shown = reproduce(RunRecord("r", [], launches=[launch | {"commit": None, "versions": {}}]))
    assert "<pre>python x.py</pre>" in shown and "had been changed" not in shown


def whole_run() -> RunRecord:
    """Return a run that fills every part of the report. Its values are numbers, or in capitals."""
    score = dict(task="TASK", metric="METRIC", score=0.5, stderr=0.1, chance=0.4, documents=9, shots=0, seconds=1.0)
    tasks = [score | {"step": step} for step in (2, 4)] + [score | {"step": 4, "part_of": "TASK"}]
    entries = [entry | {"eval_TASK_METRIC": 0.5} if "eval_loss" in entry else entry for entry in history()]
    logged = {"mfu": 0.4, "busiest_expert": 0.5, "idlest_expert": 0.1}
    entries = [entry | logged if "loss" in entry else entry for entry in entries]
    ledger = {f"tokens_{use}": 5 for use in ("read", "train", "held_out", "test", "duplicate", "dropped", "trained")}
    branch = dict(changed={"A": (1, 2)}, checkpoint="C", step=2, tokens=9, measured_from=2)
    figures = dict(eval_unigram_loss=9.0, eval_tokens=9, test_loss=9.0, effective_tokens_per_second=9.0)
    return RunRecord(
        name="RUN",
        history=entries,
        results={
            "sources": {"S": ledger},
            "parameters": {"total": 12345, "active": 678},
            "steps_left_out": 0,
            **figures,
        },
        identity={"recipe": "R", "model": {"M": 1}, "data": {"packing": "P", "optimizer": "O"}},
        branch=branch,
        launches=[{"command": "COMMAND", "versions": {"V": "1"}, "launcher": {"L": "1"}, "commit": "D-dirty"}],
        samples=[{"step": 2, "prompt": "X", "text": "Y"}],
        tasks=tasks,
        status={"state": "interrupted", "step": 4, "max_steps": 5, "time": "T"},
    )


def test_a_chinese_report_has_no_english_label():
    """What a page has in both languages are values, and names that Chinese has no other word for."""
    english, chinese = (Elements(page(whole_run(), labels(language))) for language in ("en", "zh"))
    assert ("lang", "zh-CN") in chinese.attributes and ("lang", "en") in english.attributes
    assert len(english.texts) == len(chinese.texts) > 100
    same = {text for text in set(english.texts) & set(chinese.texts) if re.search("[a-z]{2}", text)}
    assert all(text.startswith(("\n:root", "git checkout", "D-dirty")) for text in same), same
    for title in ("这次训练", "结果", "曲线", "任务", "每个 token 的去向", "生成的样例", "环境", "怎样重现"):
        assert title in chinese.texts
    assert "已中断，第 4 步，共 5 步, T" in chinese.texts


def test_every_translation_is_used_and_fills_in_what_the_english_one_does():
    fields = re.compile(r"{[\w:.%]+}")
    for english, chinese in CHINESE.items():
        assert sorted(fields.findall(english)) == sorted(fields.findall(chinese)), english
        assert re.search("[\u4e00-\u9fff]", chinese) or english == "python", english


@pytest.mark.parametrize(
    ("environment", "language"),
    [
        ({"LANG": "zh_CN.UTF-8"}, "zh"), ({"LANG": "en_US.UTF-8"}, "en"), ({"LANG": "C"}, "en"),
        ({"LC_ALL": "zh_TW.UTF-8", "LANG": "en_US.UTF-8"}, "zh"), ({"LC_ALL": "C", "LANG": "zh_CN.UTF-8"}, "en"),
        ({}, "en"), ({"windows": "Chinese (Simplified)_China"}, "zh"), ({"windows": "zh_CN"}, "zh"),
    ],
)  # fmt: skip
def test_the_systems_language(environment, language, monkeypatch):
    """The order of POSIX: LC_ALL, LC_MESSAGES, LANG. On Windows, none of them is set."""
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
        if name in environment:
            monkeypatch.setenv(name, environment[name])
    monkeypatch.setattr("locale.getlocale", lambda: (environment.get("windows"), None))
    assert system_language() == language
    assert labels("auto")("perplexity") == ("困惑度" if language == "zh" else "perplexity")


@pytest.mark.parametrize("installed", [True, False])
def test_the_picture_of_the_losses_is_in_the_language_if_a_font_has_its_letters(installed, tmp_path, monkeypatch):
    """Without one, the letters would be empty boxes. (A font that everybody has stands in for a Chinese one.)"""
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure.axes[0]))
    monkeypatch.setattr("common.run.results.CHINESE_FONTS", ("DejaVu Sans",) if installed else ("no such font",))
    plot_loss_curve(history(), tmp_path / "loss_curve.png", "zh")
    plot_loss_curve(history(), tmp_path / "loss_curve.png", "en")
    texts = [
        [axes.get_xlabel(), axes.get_ylabel(), *[text.get_text() for text in axes.get_legend().get_texts()]]
        for axes in drawn
    ]
    english = ["tokens seen", "loss, nats a token", "training", "held out"]
    assert texts == [[CHINESE[text] for text in english] if installed else english, english]


@pytest.mark.parametrize("language", ["zh", "en"])
def test_without_a_chinese_font_the_picture_has_no_boxes_and_nothing_is_printed(
    language, tmp_path, monkeypatch, capfd, caplog
):
    """A letter that no font has is a warning of matplotlib, as the last lines show. The run has a Chinese name."""
    (tmp_path / "中文试验").mkdir()
    picture = tmp_path / "中文试验" / "loss_curve.png"
    monkeypatch.setattr("common.run.results.CHINESE_FONTS", ("no such font",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_loss_curve(history(), picture, language)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capfd.readouterr() == ("", "") and caplog.records == []
    monkeypatch.setattr("common.run.results.CHINESE_FONTS", ("DejaVu Sans",))
    with pytest.warns(UserWarning, match="missing from font"):
        plot_loss_curve(history(), picture, "zh")


def test_units_are_explained_where_they_stand():
    shown = Elements(page(whole_run())).texts
    assert all(text in shown for text in EXPLANATIONS.values()) and len(EXPLANATIONS) == 3
    without = RunRecord("r", [entry for entry in history() if "loss" in entry])
    assert not {*EXPLANATIONS.values()} & {*Elements(page(without)).texts}


def test_parameters_are_in_the_report():
    shown = Elements(page(whole_run())).texts
    assert shown[shown.index("parameters") + 1] == "12,345"
    assert shown[shown.index("active parameters, met by a token") + 1] == "678"


@pytest.fixture(scope="module")
def two_runs(cache_dir, tmp_path_factory):
    """Two finished runs, and the report of the first as it was at its first evaluation."""
    folders, seen = [tmp_path_factory.mktemp(name) for name in ("first", "second")], []
    recipe = load_recipe("wiki_zh_scratch")

    class Watched(recipe.ReportCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            super().on_evaluate(args, state, control, **kwargs)
            seen.append((folders[0] / "report.html").read_text(encoding="utf-8"))

    recipe.ReportCallback = Watched
    recipe.main(small_run(cache_dir, folders[0], "--language", "en"))
    recipe.main(small_run(cache_dir, folders[1], "--language", "zh", "--seed", "7"))
    return folders, seen[0]


def test_the_report_of_a_run_has_its_figures_samples_and_curves(two_runs):
    (folder, _), midway = two_runs
    text = (folder / "report.html").read_text(encoding="utf-8")
    results = json.loads((folder / "all_results.json").read_text())
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    shown = Elements(text).text
    assert f"{results['eval_loss']:.4f}" in shown and f"{results['eval_bits_per_byte']:.4f}" in shown
    assert "finished, step 6 of 6" in shown and samples[-1]["text"] in shown
    assert f"{results['ledger']['tokens_read']:,} tokens read" in shown
    titles = [drawing.find("title").text for drawing in svgs(text)]
    for title in ("loss, nats a token", "held-out bits per byte", "learning rate", "device memory, GiB"):
        assert title in titles
    assert "running, step" in Elements(midway).text and svgs(midway), "there is a report during the run"
    assert "6 of 6" not in Elements(midway).text
    for text in (shown, Elements(midway).text):  # by hand: an embedding of 4096 x 256, 4 layers, 9 norms of 256
        layer = 256 * (256 + 128 + 128) + 512 + 256 * 256 + 3 * 256 * 768  # queries, keys, values; output; MLP
        assert f"parameters{4096 * 256 + 4 * layer + 9 * 256:,}" in text


def test_the_report_of_a_run_is_in_its_language(two_runs):
    (_, folder), _ = two_runs
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert '<html lang="zh-CN">' in text and "困惑度" in text and "perplexity" not in text


def test_the_end_of_a_run_names_the_comparison_and_it_runs(two_runs, tmp_path, capsys, monkeypatch):
    from common.run.results import where_to_look

    (folder, other), _ = two_runs
    *_, generate, last = where_to_look(str(folder)).splitlines()
    code = shlex.split(generate.partition(": ")[2])[2].replace("FIRST WORDS", "地球是")
    exec(code, {})
    assert "地球是" in capsys.readouterr().out
    words = shlex.split(last.partition("python -m ")[2].replace("OTHER", str(other)))
    assert words[0] == compare.__name__
    monkeypatch.chdir(tmp_path)
    compare.main(words[1:])
    assert (tmp_path / "compare.html").exists()
    generate, last = (shlex.split(line.partition("python ")[2]) for line in where_to_look("a 'b").splitlines()[1:])
    assert last[2] == "a 'b" and "'text-generation', \"a 'b\")" in generate[1]


def test_two_runs_are_compared(two_runs, tmp_path, capsys):
    folders, _ = two_runs
    compare.main([*map(str, folders), "--output", str(tmp_path / "c.html"), "--language", "en"])
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) > 10 and len({len(line) for line in lines}) == 1
    for folder in folders:
        assert f"{json.loads((folder / 'all_results.json').read_text())['eval_loss']:.4f}" in printed
    assert "training.seed" in printed
    drawings = svgs((tmp_path / "c.html").read_text(encoding="utf-8"))
    curves = [[e for e in drawing.iter() if (e.get("class") or "").startswith("line line")] for drawing in drawings]
    assert curves and all(len(found) == 2 for found in curves)
    with pytest.raises(InputError, match="give 2 to"):
        compare.main([str(folders[0])])
    with pytest.raises(InputError, match="no log of a run"):
        compare.main([str(folders[0]), str(tmp_path)])
    compare.main([*map(str, folders), "--output", str(tmp_path / "zh.html"), "--language", "zh"])
    printed = capsys.readouterr().out
    assert "影响损失且不同的设置：training.seed" in printed and "held-out" not in printed
    assert "held-out" not in (tmp_path / "zh.html").read_text(encoding="utf-8")


def test_a_flag_of_a_copied_recipe_that_differs_is_named():
    """Also where the recipe does not write it into run.json; launches of before the record have none."""
    launches = [{"arguments": {"recipe": {"z_loss": weight, "sample": True}}} for weight in (0.0, 0.1)]
    runs = [RunRecord(name="run", history=[], launches=[launch]) for launch in launches]
    named = "a flag of the recipe's own that differs: z_loss: 0.0, 0.1"
    assert compare.notes_on(runs, labels("en"))[1:] == [named]
    assert compare.notes_on([runs[0], RunRecord(name="old", history=[])], labels("en"))[1:] == []
    assert compare.notes_on([runs[0], runs[0]], labels("en"))[1:] == []


def test_columns_stand_below_each_other_in_a_terminal():
    """By hand: a Chinese character takes two columns."""
    assert compare.as_text([["", "run"], ["困惑度", "9"], ["ab", "10"]]).splitlines() == [
        "|        | run |",
        "|--------|-----|",
        "| 困惑度 | 9   |",
        "| ab     | 10  |",
    ]


def test_the_model_card_has_the_runs_metrics_and_an_edited_card_is_kept(two_runs):
    from huggingface_hub import ModelCard

    from common.run.model_card import CARD_FILE, MARK, language_of, write_card

    (folder, _), _ = two_runs
    results = json.loads((folder / "all_results.json").read_text())
    card = ModelCard.load(folder / CARD_FILE)
    data = card.data.to_dict()
    assert data["language"] == "zh" and data["library_name"] == "transformers" and "license" not in data
    assert "datasets" not in data  # these would be ids on the hub, and a source's name is not one
    metrics = {metric.metric_type: metric.metric_value for metric in card.data.eval_results}
    assert metrics["bits_per_byte"] == pytest.approx(results["eval_bits_per_byte"], rel=1e-5)
    text = (folder / CARD_FILE).read_text(encoding="utf-8")
    assert "# license: " in text and "# datasets: " in text, "the lines to fill in"
    write_card(folder, "r", results, [], "second")
    assert "second" in (folder / CARD_FILE).read_text() and MARK in (folder / CARD_FILE).read_text()
    (folder / CARD_FILE).write_text("mine")
    write_card(folder, "r", results, [], "third")
    assert (folder / CARD_FILE).read_text() == "mine"
    assert [language_of([text]) for text in ("地球 is", "The earth", "これはペンです", "Земля", "")] == [
        "zh", "en", "ja", None, None,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ['a: b "c" #d', "no", "2026-11-30", "地球"])
def test_the_hub_can_read_a_model_card_whatever_the_name_and_the_figures(tmp_path, name):
    from huggingface_hub import ModelCard

    from common.run.model_card import write_card

    folder = tmp_path / name
    folder.mkdir()
    results = {"steps": 1, "ledger": {"tokens_trained": 1}, "sources": {"s": {}}}
    # YAML takes 1e+06, without a dot, for text; the hub's JSON has no NaN.
    figures = {"eval_loss": float("nan"), "eval_perplexity": 1e6, "eval_bits_per_byte": 1e-5}
    write_card(folder, "r.py", results | figures, ["Земля"], "python r.py")
    data = ModelCard.load(folder / "README.md").data
    assert {found.metric_type: found.metric_value for found in data.eval_results} == {
        "perplexity": 1e6,
        "bits_per_byte": 1e-5,
    }
    assert data.model_name == name and data.metrics == ["perplexity", "bits_per_byte"] and data.language is None
    write_card(folder, "r.py", results, [], "python r.py")
    assert ModelCard.load(folder / "README.md").data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
