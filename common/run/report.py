"""``report.html``: a whole run on one page.

The page needs no network and is readable on a phone, in light and in dark mode. It is written at every evaluation and
at the end, from the files of the output folder and the log so far. Documents and samples may contain hostile text, so
all text is escaped, and the page's content security policy forbids scripts and anything from another address. Its
labels are English or Chinese, by ``--language``.
"""

from html import escape
from pathlib import Path

import numpy as np
from transformers import TrainerCallback

from common.run.folder import Run
from common.run.labels import Label, labels
from common.run.plots import Line, finite, line_plot, stacked_bar
from common.run.record import RunRecord, task_key

REPORT_FILE = "report.html"
SHOWN_SAMPLES = 12  # evaluations whose texts are shown: the first, the last, and evenly spaced ones between them
STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1b1f24;--dim:#59636e;--edge:#d1d9e0;
--c0:#0969da;--c1:#bc4c00;--c2:#1a7f37;--c3:#8250df;--c4:#bf3989;--c5:#6e7781}
@media(prefers-color-scheme:dark){:root{--back:#0d1117;--text:#e6edf3;--dim:#9198a1;--edge:#3d444d;
--c0:#4493f8;--c1:#f0883e;--c2:#3fb950;--c3:#ab7df8;--c4:#db61a2;--c5:#9198a1}}
body{margin:0 auto;padding:1rem;max-width:62rem;background:var(--back);color:var(--text);
font:16px/1.5 system-ui,"Noto Sans CJK SC","Microsoft YaHei",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}pre{white-space:pre-wrap;border:1px solid var(--edge);
padding:.6rem;font-size:.85rem}table{border-collapse:collapse;font-size:.9rem}
td,th{border-bottom:1px solid var(--edge);padding:.25rem 1rem .25rem 0;text-align:left;vertical-align:top}
th{overflow-wrap:normal;font-weight:600}.wide{overflow-x:auto;overflow-wrap:normal}.dim{color:var(--dim)}
.key{white-space:nowrap;margin-right:.7rem}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1rem}
svg{width:100%;height:auto;overflow:visible}svg text{fill:var(--dim);font-size:11px}
svg .title{fill:var(--text);font-size:13px}
.end{text-anchor:end}.middle{text-anchor:middle}.grid{stroke:var(--edge);stroke-width:.6}
.line{fill:none;stroke-width:1.6;stroke-linejoin:round}
"""
COLOURS = 6  # of lines and bars: --c0 to --c5
STYLE += "".join(
    f".line{n}{{stroke:var(--c{n})}}svg .fill{n}{{fill:var(--c{n})}}.key{n}{{color:var(--c{n})}}"
    for n in range(COLOURS)
)
# The units of the figures, by the name that a figure has in the log.
EXPLANATIONS = {
    "eval_loss": "nat: the unit of the loss. At 3 nats a token the model is as unsure of the next token as between 20 "
    "equally likely ones, its perplexity (e to the power of 3).",
    "eval_bits_per_byte": "bits per byte: the same loss in bits (1 nat = 1.44 bits), for each byte of the text. It "
    "compares models with different tokenizers. 8 is as good as guessing each byte; lower is better.",
    "mfu": "MFU (model FLOPs utilisation): the share of the device's peak FLOP/s that the model's own arithmetic "
    "takes. Recompute is not counted.",
}
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


class ReportCallback(TrainerCallback):
    """Write the page at every evaluation. Add it after the callback that writes samples, to show the newest ones."""

    def __init__(self, run: Run, ledgers: dict):
        """``ledgers``: source name -> its ``Ledger`` before training."""
        self.run = run
        self.sources = {name: vars(ledger) for name, ledger in ledgers.items()}

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if state.is_world_process_zero and "eval_loss" in metrics:
            with self.run.writing(REPORT_FILE):
                results = {"sources": self.sources, "parameters": self.run.parameters}
                write_report(args.output_dir, state.log_history, results, self.run.language)


def write_report(
    folder: str | Path, history: list[dict] | None = None, results: dict | None = None, language: str = "en"
) -> Path:
    """Write ``report.html`` into ``folder``, whole or not at all, and return its path.

    ``history`` and ``results`` are as in ``RunRecord.of``; ``language`` is as in ``labels``.

    Raises:
        OSError: the page cannot be written. An earlier page is still there.
    """
    path = Path(folder) / REPORT_FILE
    partial = path.with_name(f"{REPORT_FILE}.partial")
    try:
        partial.write_text(page(RunRecord.of(folder, history, results), labels(language)), encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return path


ENGLISH = labels("en")


def page(run: RunRecord, label: Label = ENGLISH) -> str:
    """Return the page of ``run`` as HTML."""
    progress = label("{state}, step {step} of {max_steps}").format(
        state=label(str(run.status.get("state", "unknown"))),
        step=run.status.get("step", "?"),
        max_steps=run.status.get("max_steps", "?"),
    )
    sections = {
        "Run": _table(description(run, label), label),
        "Results": _table(figures(run, label), label) + _explanations(run, label),
        "Curves": f"<div class=plots>{''.join(plots(run, label))}</div>",
        "Tasks": _tasks(run, label),
        "Where every token went": _ledgers(run.results.get("sources", {}), label),
        "Samples": _samples(run.samples, label),
        "Environment": _table(environment(run, label), label),
        "How to repeat it": reproduce(run, label),
    }
    head = f"<h1>{escape(run.name)}</h1><p class=dim>{escape(progress)}, {escape(str(run.status.get('time', '')))}</p>"
    blocks = [f"<h2>{escape(label(title))}</h2>{body}" for title, body in sections.items() if body]
    return document(run.name, head + "".join(blocks), label)


def document(title: str, body: str, label: Label = ENGLISH) -> str:
    """Return a whole HTML page. ``title`` is escaped here; ``body`` is HTML already."""
    language = "en" if label("Run") == "Run" else "zh-CN"
    return (
        f'<!doctype html><html lang="{language}"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def plots(run: RunRecord, label: Label = ENGLISH) -> list[str]:
    """Return the curves of ``run`` as SVG; what was not logged has no plot."""
    drawn = []
    for x_label, axis in (("tokens seen", "tokens_seen"), ("training time", "train_seconds")):
        is_time = axis == "train_seconds"
        losses = [run.line(label("training"), "loss", axis), run.line(label("held out"), "eval_loss", axis, dots=True)]
        drawn.append(line_plot(label("loss, nats a token"), label(x_label), losses, is_time))
        bits = run.line("", "eval_bits_per_byte", axis, dots=True)
        drawn.append(line_plot(label("held-out bits per byte"), label(x_label), [bits], is_time))
    for title, lines in (
        ("share of a layer's tokens that one expert gets", {"busiest": "busiest_expert", "idlest": "idlest_expert"}),
        ("learning rate", {"": "learning_rate"}),
        ("gradient norm before clipping", {"": "grad_norm"}),
        ("tokens/s per device", {"": "tokens_per_second_per_device"}),
        ("model FLOPs utilisation (MFU)", {"": "mfu"}),
        ("device memory, GiB", {"peak": "memory_peak_gib", "in use": "memory_allocated_gib"}),
    ):
        named = [run.line(label(name), logged) for name, logged in lines.items()]
        drawn.append(line_plot(label(title), label("tokens seen"), named))
    return [plot for plot in drawn if plot]


def description(run: RunRecord, label: Label = ENGLISH) -> dict[str, str]:
    """Return what is trained: recipe, model, data, rows and optimizer. The names are English, the values in words."""
    model = run.identity.get("model", {})
    data = run.identity.get("data", {})
    shape = ", ".join(f"{name} {value}" for name, value in model.items() if isinstance(value, int | float | str))
    training = run.identity.get("training", {})
    return {
        "recipe": str(run.identity.get("recipe", "unknown")),
        "branch": branched_off(run.branch, label),
        "model": shape,
        **parameters(run),
        "data": ", ".join(run.results.get("sources", {})),
        "context": label("{tokens} tokens, {packing} packing, {rows} rows a step").format(
            tokens=data.get("context_length", "?"),
            packing=data.get("packing", "?"),
            rows=data.get("rows_per_step", "?"),
        ),
        "optimizer": label("{optimizer}, learning rate {rate}, seed {seed}").format(
            optimizer=data.get("optimizer") or training.get("optim", "?"),
            rate=training.get("learning_rate", "?"),
            seed=training.get("seed", "?"),
        ),
    }


def parameters(run: RunRecord) -> dict[str, str]:
    """Return how many parameters the model of ``run`` has, and how many a token meets; {} if no file says so."""
    counts = run.results.get("parameters", {})  # earlier versions did not write them
    if not counts:
        return {}
    return {"parameters": f"{counts['total']:,}", "active parameters, met by a token": f"{counts['active']:,}"}


def branched_off(branch: dict, label: Label = ENGLISH) -> str:
    """Return where a run has left another one, and what differs from there on; "" if it has not."""
    if not branch:
        return ""
    changed = "; ".join(f"{name} {old} -> {new}" for name, (old, new) in branch["changed"].items())
    text = label("of {checkpoint}, after {steps} steps, {tokens} tokens").format(
        checkpoint=branch["checkpoint"], steps=f"{branch['step']:,}", tokens=f"{branch['tokens']:,}"
    )
    text += label(", with other {changed}").format(changed=changed) if changed else label(", with nothing changed")
    if branch["measured_from"]:
        text += label(". Held-out losses up to that step are of the other run's documents")
    return text


def figures(run: RunRecord, label: Label = ENGLISH) -> dict[str, str]:
    """Return the newest value of each figure; for a finished run, its final results. The names are English."""
    last = newest(run)
    formats = {
        "held-out loss, nats a token": ("eval_loss", "{:.4f}"),
        "by token frequency alone": ("eval_unigram_loss", "{:.4f}"),
        "bits per byte": ("eval_bits_per_byte", "{:.4f}"),
        "perplexity": ("eval_perplexity", "{:,.2f}"),
        "held-out tokens": ("eval_tokens", "{:,}"),
        "test loss": ("test_loss", "{:.4f}"),
        "tokens trained on": ("tokens_seen", "{:,}"),
        "training time, seconds": ("train_seconds", "{:,.0f}"),
        "tokens/s, evaluation and saving included": ("effective_tokens_per_second", "{:,.0f}"),
        "MFU, at the last log": ("mfu", "{:.1%}"),
        "bad steps left out": ("steps_left_out", "{}"),
        "busiest expert of a layer": ("busiest_expert", "{:.1%} of the tokens since the last log; none is dropped"),
        "idlest expert of a layer": ("idlest_expert", "{:.1%} of the tokens since the last log"),
    }
    known = {figure: each for figure, each in formats.items() if finite(last.get(each[0]))}
    return {figure: label(text).format(last[name]) for figure, (name, text) in known.items()}


def newest(run: RunRecord) -> dict:
    """Return the newest value under each name of the log and of the results."""
    last: dict = {}
    for entry in run.history:
        last |= entry
    return last | run.results


def _explanations(run: RunRecord, label: Label) -> str:
    """Return what the units of ``figures`` mean, a line for each that is among them, as HTML."""
    last = newest(run)
    lines = [text for name, text in EXPLANATIONS.items() if finite(last.get(name))]
    return "".join(f"<p class=dim>{escape(label(text))}</p>" for text in lines)


def environment(run: RunRecord, label: Label = ENGLISH) -> dict[str, str]:
    """Return device, versions, commit and launcher settings of the last launch."""
    launch = run.launches[-1] if run.launches else {}
    versions = launch.get("versions", {})
    return {
        "device": f"{launch.get('processes', '?')} x {launch.get('device', label('unknown'))}",
        "python": str(launch.get("python", "?")),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "commit": str(launch.get("commit") or "unknown"),
        "launcher": " ".join(f"{name}={value}" for name, value in launch.get("launcher", {}).items()),
        "launches": label("{launches} (launches.jsonl has the arguments of each)").format(launches=len(run.launches)),
    }


def reproduce(run: RunRecord, label: Label = ENGLISH) -> str:
    """Return the commands that repeat the last launch of ``run``, as HTML."""
    launch = run.launches[-1] if run.launches else {}
    commit = launch.get("commit") or ""
    # PyPI has no local versions. 2.13.0+cpu, for example, exists only in PyTorch's own index.
    versions = {name: version.partition("+")[0] for name, version in launch.get("versions", {}).items()}
    lines = [f"git checkout {commit.removesuffix('-dirty')}"] if commit else []
    lines += ["pip install " + " ".join(f"{name}=={version}" for name, version in versions.items())] if versions else []
    lines += [str(launch.get("command", "unknown command"))]
    changed = commit.endswith("-dirty")
    note = f"<p>{label('Some files had been changed since that commit.')}</p>" if changed else ""
    commands = escape("\n".join(lines))
    decides = label("run.json has every setting that decides the losses.")
    return f"<pre>{commands}</pre>{note}<p class=dim>{decides}</p>"


def _ledgers(sources: dict[str, dict], label: Label) -> str:
    """Return a bar and a sentence for each source, as HTML."""
    uses = {"train": "train", "held out": "held_out", "test": "test", "duplicate": "duplicate", "dropped": "dropped"}
    names = [label(use) for use in uses]
    keys = " ".join(f"<span class=key><span class=key{n}>&#9632;</span> {name}</span>" for n, name in enumerate(names))
    blocks = [f"<p>{keys}</p>"] if sources else []
    for source, ledger in sources.items():
        counts = [ledger.get(f"tokens_{use}", 0) for use in uses.values()]
        parts = dict(zip(names, counts, strict=True))
        sentence = label("{name}: {tokens} tokens read = {parts}").format(
            name=source,
            tokens=f"{ledger.get('tokens_read', 0):,}",
            parts=" + ".join(f"{count:,} {name}" for name, count in parts.items() if count),
        )
        if ledger.get("tokens_trained"):
            sentence += label("; {tokens} trained on").format(tokens=f"{ledger['tokens_trained']:,}")
        sentence += label("; {documents} documents").format(documents=f"{ledger.get('documents', 0):,}")
        blocks.append(f"{stacked_bar(source, parts)}<p>{escape(sentence)}</p>")
    return "".join(blocks)


def _tasks(run: RunRecord, label: Label) -> str:
    """Return the newest score of every task, and a plot of those that were measured more than once, as HTML."""
    # A step that was made twice, before and after an interruption, shows its later score.
    newest = {task_key(score): score for score in run.tasks if "part_of" not in score}
    heads = ["task", "metric", "score", "standard error", "chance", "documents", "examples", "step", "seconds"]
    rows = "".join(
        f"<tr><td>{escape(score['task'])}</td><td>{escape(score['metric'])}</td>"
        + "".join(
            f"<td>{'' if value is None else format(value, form)}</td>"
            for value, form in (
                (score["score"], ".4f"), (score["stderr"], ".4f"), (score["chance"], ".4f"), (score["documents"], ","),
                (score["shots"], ""), (score["step"], ","), (score["seconds"], ".1f"),
            )
        )
        + "</tr>"
        for score in newest.values()
    )  # fmt: skip
    if not rows:
        return ""
    drawn = []
    for key, score in newest.items():
        line = run.line(label("score"), key, dots=True)
        if len(line.xs) > 1:
            lines = [line]
            if score["chance"] is not None:
                lines.append(Line(label("chance"), line.xs, [score["chance"]] * len(line.xs)))
            drawn.append(line_plot(f"{score['task']}, {score['metric']}", label("tokens seen"), lines))
    parts = sum("part_of" in score for score in run.tasks)
    text = label("eval_tasks.jsonl has {parts} scores of parts, too.").format(parts=f"{parts:,}")
    note = f"<p class=dim>{text}</p>" if parts else ""
    head = "".join(f"<th>{label(name)}</th>" for name in heads)
    return f"<div class=wide><table><tr>{head}</tr>{rows}</table></div>{note}<div class=plots>{''.join(drawn)}</div>"


def _samples(samples: list[dict], label: Label) -> str:
    """Return a table of the texts of SHOWN_SAMPLES evaluations, as HTML."""
    if not samples:
        return ""
    steps = sorted({sample["step"] for sample in samples})
    shown = {steps[round(place)] for place in np.linspace(0, len(steps) - 1, SHOWN_SAMPLES)}
    # A step that was made twice, before and after an interruption, shows its later text.
    latest = {(sample["step"], sample["prompt"]): sample["text"] for sample in samples}
    rows = "".join(
        f"<tr><td>{step:,}</td><td><b>{escape(prompt)}</b>{escape(text)}</td></tr>"
        for (step, prompt), text in latest.items()
        if step in shown
    )
    text = label("texts of {shown} steps out of {all}; samples.jsonl has all of them.")
    note = f"<p class=dim>{text.format(shown=len(shown), all=len(steps))}</p>"
    head = f"<tr><th>{label('step')}</th><th>{label('prompt and continuation')}</th></tr>"
    return f"<table>{head}{rows}</table>{note}"


def _table(rows: dict[str, str], label: Label) -> str:
    cells = "".join(
        f"<tr><th>{escape(label(name))}</th><td>{escape(value)}</td></tr>" for name, value in rows.items() if value
    )
    return f"<table>{cells}</table>" if cells else ""
