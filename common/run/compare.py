"""Compare two or more runs by their output folders: print a table, and draw each figure of all runs in one plot.

    python -m common.run.compare outputs/wiki_zh_sample outputs/other --output compare.html

An unfinished run is compared up to its newest checkpoint. The table says which runs are unfinished.
"""

import common.console  # noqa: F401  # isort: skip  # before the libraries that it keeps quiet

import argparse
import unicodedata
from html import escape
from pathlib import Path

from common.console import InputError, say
from common.run.identity import differences
from common.run.labels import Label, labels
from common.run.plots import line_plot
from common.run.record import RunRecord
from common.run.report import COLOURS, document, figures, parameters

PLOTS = [  # title, name in the log, x axis, whether to draw each point
    ("held-out bits per byte", "eval_bits_per_byte", "tokens_seen", True),
    ("held-out bits per byte", "eval_bits_per_byte", "train_seconds", True),
    ("held-out loss, nats a token", "eval_loss", "tokens_seen", True),
    ("training loss, nats a token", "loss", "tokens_seen", False),
    ("gradient norm before clipping", "grad_norm", "tokens_seen", False),
    ("tokens/s per device", "tokens_per_second_per_device", "tokens_seen", False),
]
DIFFERENT = "settings that affect the losses and differ: {names}"
OWN_FLAG = "a flag of the recipe's own that differs: {name}: {values}"


def compared(runs: list[RunRecord], label: Label) -> list[list[str]]:
    """Return the figures of ``runs`` as a table: the names of the runs, then one row for each figure."""
    columns = [
        {"state": label(run.status.get("state", "unknown"))} | parameters(run) | figures(run, label) for run in runs
    ]
    names = [*dict.fromkeys(name for column in columns for name in column)]
    rows = [[label(name), *(column.get(name, "-") for column in columns)] for name in names]
    return [["", *(run.name for run in runs)], *rows]


def as_text(table: list[list[str]]) -> str:
    """Return ``table`` in Markdown, with columns that stand below each other in a terminal."""
    widths = [max(map(columns_of, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [cell + " " * (width - columns_of(cell)) for cell, width in zip(row, widths, strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def columns_of(text: str) -> int:
    """Return how many columns of a terminal ``text`` takes: a Chinese character takes two."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def comparison_page(runs: list[RunRecord], table: list[list[str]], notes: list[str], label: Label) -> str:
    """Return an HTML page with the table of ``compared``, ``notes``, and each of PLOTS with one line for each run."""
    cells = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table)
    drawn = []
    for title, name, axis, dots in PLOTS:
        lines = [run.line(run.name, name, axis, dots) for run in runs]
        is_time = axis == "train_seconds"
        x_label = label("training time") if is_time else label("tokens seen")
        drawn.append(line_plot(label(title), x_label, lines, is_time))
    body = f"<h1>{escape(label(' and ').join(table[0][1:]))}</h1><div class=wide><table>{cells}</table></div>"
    body += "".join(f"<p>{escape(note)}</p>" for note in notes)
    return document(label("Comparison of runs"), f"{body}<div class=plots>{''.join(drawn)}</div>", label)


def notes_on(runs: list[RunRecord], label: Label) -> list[str]:
    """Return what to know of the comparison: which settings differ, and whether the held-out figures compare."""
    unlike = [difference for run in runs[1:] for difference in differences(runs[0].identity, run.identity)]
    changed = [*dict.fromkeys(name for name, _, _ in unlike)]
    notes = [label(DIFFERENT).format(names=", ".join(changed) if changed else label("nothing"))]
    flags = [run.launches[-1].get("arguments", {}).get("recipe", {}) if run.launches else {} for run in runs]
    for name in dict.fromkeys(name for each in flags for name in each) if all(flags) else []:
        values = [str(each.get(name, "-")) for each in flags]
        if len(set(values)) > 1:  # whether it decides the losses, only the recipe knows
            notes.append(label(OWN_FLAG).format(name=name, values=", ".join(values)))
    if len({figures(run).get("held-out tokens") for run in runs} - {None}) > 1:
        notes.append(
            label("note: the runs were evaluated on different held-out tokens. Their held-out figures do not compare.")
        )
    return notes


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m common.run.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", help="output folders of runs")
    parser.add_argument("--output", help="also write a page with the curves to this file")
    parser.add_argument(
        "--language", choices=["auto", "en", "zh"], default="auto", help="of the labels; auto: the system's"
    )
    arguments = parser.parse_args(argv)
    if not 2 <= len(arguments.folders) <= COLOURS:
        raise InputError(f"{len(arguments.folders)} folders: give 2 to {COLOURS} to compare.")
    label = labels(arguments.language)
    runs = [RunRecord.of(folder) for folder in arguments.folders]
    for folder, run in zip(arguments.folders, runs, strict=True):
        if not run.history:
            raise InputError(
                f"{folder}: no log of a run. Neither the folder nor a checkpoint in it has a trainer_state.json."
            )
    if len({run.name for run in runs}) < len(runs):  # a/run and b/run
        for folder, run in zip(arguments.folders, runs, strict=True):
            run.name = folder
    table = compared(runs, label)
    notes = notes_on(runs, label)
    say("\n".join([as_text(table), *notes]))
    if arguments.output:
        Path(arguments.output).write_text(comparison_page(runs, table, notes, label), encoding="utf-8")
        say(label("curves: {page}").format(page=arguments.output))


if __name__ == "__main__":
    main()
