"""Compare two or more runs by their output folders: print a table, and draw each figure of all runs in one plot.

    python benchmarks/compare.py outputs/wiki_zh_sample outputs/other --output compare.html

An unfinished run is compared up to its newest checkpoint. The table says which runs are unfinished.
"""

import common.console  # noqa: F401  # isort: skip  # before the libraries that it keeps quiet

import argparse
from html import escape
from pathlib import Path

from common.console import InputError, say
from common.run.identity import differences
from common.run.plots import line_plot
from common.run.record import RunRecord
from common.run.report import COLOURS, document, figures

PLOTS = [  # title, name in the log, x axis, whether to draw each point
    ("held-out bits per byte", "eval_bits_per_byte", "tokens_seen", True),
    ("held-out bits per byte", "eval_bits_per_byte", "train_seconds", True),
    ("held-out loss, nats a token", "eval_loss", "tokens_seen", True),
    ("training loss, nats a token", "loss", "tokens_seen", False),
    ("gradient norm before clipping", "grad_norm", "tokens_seen", False),
    ("tokens/s per device", "tokens_per_second_per_device", "tokens_seen", False),
]


def compared(runs: list[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """Return the figures of ``runs`` as a table: the header, and one row for each figure."""
    columns = [{"state": run.status.get("state", "unknown")} | figures(run) for run in runs]
    names = [*dict.fromkeys(name for column in columns for name in column)]
    header = ["", *(run.name for run in runs)]
    rows = [[name, *(column.get(name, "-") for column in columns)] for name in names]
    return header, rows


def comparison_page(runs: list[RunRecord], header: list[str], rows: list[list[str]], different: str) -> str:
    """Return an HTML page with the table of ``compared`` and each of PLOTS with one line for each run."""
    cells = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in [header, *rows])
    drawn = []
    for title, name, axis, dots in PLOTS:
        lines = [run.line(run.name, name, axis, dots) for run in runs]
        is_time = axis == "train_seconds"
        drawn.append(line_plot(title, "training time" if is_time else "tokens seen", lines, is_time))
    body = f"<h1>{escape(' and '.join(header[1:]))}</h1><div class=wide><table>{cells}</table></div>"
    body += f"<p>Settings that differ: {escape(different)}</p><div class=plots>{''.join(drawn)}</div>"
    return document("Comparison of runs", body)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="output folders of runs")
    parser.add_argument("--output", help="also write a page with the curves to this file")
    arguments = parser.parse_args(argv)
    if not 2 <= len(arguments.folders) <= COLOURS:
        raise InputError(f"{len(arguments.folders)} folders: give 2 to {COLOURS} to compare.")
    runs = [RunRecord.of(folder) for folder in arguments.folders]
    for folder, run in zip(arguments.folders, runs, strict=True):
        if not run.history:
            raise InputError(
                f"{folder}: no log of a run. Neither the folder nor a checkpoint in it has a trainer_state.json."
            )
    header, rows = compared(runs)
    say("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    say("\n".join("| " + " | ".join(row) + " |" for row in rows))
    unlike = [difference for run in runs[1:] for difference in differences(runs[0].identity, run.identity)]
    changed = [*dict.fromkeys(name for name, _, _ in unlike)]
    different = ", ".join(changed) if changed else "nothing"
    say(f"settings that affect the losses and differ: {different}")
    if any(len(set(counts)) > 1 for name, *counts in rows if name == "held-out tokens"):
        say("note: the runs were evaluated on different held-out tokens. Their held-out figures do not compare.")
    if arguments.output:
        page = comparison_page(runs, header, rows, different)
        Path(arguments.output).write_text(page, encoding="utf-8")
        say(f"curves: {arguments.output}")


if __name__ == "__main__":
    main()
