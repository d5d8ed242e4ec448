"""The results of a run: .json files, a plot of the losses, report.html, the model card, and a summary."""

import shlex
from dataclasses import asdict
from pathlib import Path

from common.dataset.ledger import Ledger
from common.run.labels import labels
from common.run.model_card import write_card
from common.run.record import RunRecord, mean_logged_loss, score_text
from common.run.report import write_report
from common.run.tracking import finish_tracking

# Fonts that have Chinese letters: of Windows, macOS, Linux.
CHINESE_FONTS = (
    "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Heiti TC", "Noto Sans CJK SC", "Noto Sans CJK JP",
    "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback",
)  # fmt: skip


def save_results(trainer, ledgers: dict[str, Ledger], held_out: dict[str, float]) -> dict:
    """Write all result files of a run that has ended, and return the content of all_results.json.

    The files are train_results.json, eval_results.json, all_results.json, trainer_state.json, loss_curve.png,
    report.html and the model card.

    Args:
        ledgers: source name -> its ledger before training.
        held_out: what ``trainer.evaluate()`` returned, and any other figures of the held-out documents.
    """
    history = trainer.state.log_history
    seconds = max((entry["train_seconds"] for entry in history if "train_seconds" in entry), default=0.0)
    rows_trained = trainer.order.rows_by_source(trainer.position)  # one number for each source
    context_length = trainer.train_dataset.context_length
    packed = trainer.train_dataset.sources
    sources = {
        name: ledger.trained(rows, own.tokens_in(rows))
        for (name, ledger), rows, own in zip(ledgers.items(), rows_trained, packed, strict=True)
    }
    total = sum(sources.values(), Ledger())
    total.check()
    branch = trainer.run.branch
    train = {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "train_loss": mean_logged_loss(history),
        "train_seconds": seconds,
        # Wall-clock speed of the whole run: evaluation, saving and earlier sessions are included.
        "effective_tokens_per_second": trainer.tokens_seen / seconds if seconds else 0.0,
        "first_step_seconds": trainer.clock.first_step_seconds,  # of this launch
        "steps_left_out": trainer.guard.left_out,  # bad steps: loss or gradient not finite, or a spike
        "parameters": trainer.clock.parameters,
        "ledger": asdict(total),
        "sources": {name: asdict(ledger) for name, ledger in sources.items()},
    }
    if branch is not None:
        elsewhere = trainer.order.rows_elsewhere * context_length
        train["branch"] = asdict(branch) | {"tokens_elsewhere": elsewhere}
    with trainer.run.writing("the results", needed=True):
        trainer.save_state()
        if trainer.is_world_process_zero():
            plot_loss_curve(history, Path(trainer.args.output_dir) / "loss_curve.png", trainer.run.language)
        trainer.save_metrics("eval", held_out)
    trainer.run.write_status("finished")
    results = {**held_out, **train}
    if trainer.is_world_process_zero():
        with trainer.run.writing("report.html and the model card"):
            write_report(trainer.args.output_dir, history, results, trainer.run.language)
            _write_card(trainer, results)
    with trainer.run.writing("the results", needed=True):
        trainer.save_metrics("train", train)  # last, because the steps in all_results.json mark the run as finished
    trainer.interruption.release()
    if trainer.is_world_process_zero():
        finish_tracking(results, trainer.state.global_step)
    return results


def _write_card(trainer, results: dict) -> None:
    run = RunRecord.of(trainer.args.output_dir)
    command = run.launches[-1].get("command", "") if run.launches else ""
    prompts = [sample["prompt"] for sample in run.samples]  # the card's language is guessed from them
    write_card(trainer.args.output_dir, str(run.identity.get("recipe", "")), results, prompts, command)


def summary(results: dict) -> str:
    """Return the results of a run as a few lines for the terminal; ``results``: the content of all_results.json."""
    ledger = Ledger(**results["ledger"])
    sources = {name: Ledger(**entry) for name, entry in results["sources"].items()}
    test = [f"test loss        {results['test_loss']:.4f} nats a token"] if "test_loss" in results else []
    tasks = [
        f"task             {score['task']} failed: {score['failed']}"
        if "failed" in score
        else f"task             {score_text(score)}, {score['documents']:,} documents"
        for score in results.get("tasks", [])
    ]
    shares = [
        f"  {name}: {source.rows_trained / max(ledger.rows_trained, 1):.2%} of the rows trained on,"
        f" {source.rows_trained / max(source.rows_train, 1):.2f} passes; {source}"
        for name, source in sources.items()
        if len(sources) > 1
    ]
    return "\n".join(
        [
            "",
            f"held-out loss    {results['eval_loss']:.4f} nats a token"
            f" (by token frequency alone: {results['eval_unigram_loss']:.4f})",
            *test,
            f"perplexity       {results['eval_perplexity']:,.2f}",
            f"bits per byte    {results['eval_bits_per_byte']:.4f} over {results['eval_tokens']:,} held-out tokens",
            *tasks,
            *_branch_lines(results.get("branch")),
            f"steps            {results['steps']:,} = {ledger.tokens_trained:,} tokens"
            f" = {results['epochs']:.2f} passes over the training rows",
            f"speed            {results['effective_tokens_per_second']:,.0f} tokens/s, evaluation and saving included",
            f"ledger           {ledger}",
            *shares,
        ]
    )


def where_to_look(folder: str) -> str:
    """Return what the terminal says last: where the run's files are, how to try the model, how to compare the run."""
    code = f"from transformers import pipeline; print(pipeline('text-generation', {folder!r})('FIRST WORDS'))"
    in_quotes = shlex.quote(code) if set(folder) & set("\"'$`\\!") else f'"{code}"'  # the latter also on Windows
    compare = f"python -m common.run.compare {shlex.quote(folder)} OTHER --output compare.html"
    return (
        f"model, results and report.html are in {folder}\n"
        f"let it continue a text: python -c {in_quotes}\n"
        f"compare it with another run: {compare}"
    )


def _branch_lines(branch: dict | None) -> list[str]:
    """Return where the run has left another one: no line if it has not."""
    if branch is None:
        return []
    lines = [f"branch           of {branch['checkpoint']}, after {branch['step']:,} steps, {branch['tokens']:,} tokens"]
    if branch["tokens_elsewhere"]:
        lines.append(f"                 {branch['tokens_elsewhere']:,} of them of rows that are not counted below")
    return lines


def plot_loss_curve(log_history: list[dict], path: Path, language: str = "en") -> None:
    """Draw training and held-out loss (nats a token) over tokens seen into ``path``, a .png file.

    ``language``: as in ``labels``; Chinese needs one of CHINESE_FONTS on this machine, otherwise it is English.
    """
    # Imported here, because it takes time at startup. This canvas needs no display and no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import fontManager

    known = {font.name for font in fontManager.ttflist}
    fonts = [name for name in CHINESE_FONTS if name in known]
    label = labels(language if fonts else "en")
    family = ["sans-serif", *fonts]  # the Chinese ones for what the first does not have

    train = [(entry["tokens_seen"], entry["loss"]) for entry in log_history if "tokens_seen" in entry]
    tokens_at = {entry["step"]: entry["tokens_seen"] for entry in log_history if "tokens_seen" in entry}
    held_out = [
        (tokens_at[entry["step"]], entry["eval_loss"])
        for entry in log_history
        if "eval_loss" in entry and entry["step"] in tokens_at
    ]
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(label("tokens seen"), family=family)
    axes.set_ylabel(label("loss, nats a token"), family=family)
    if train:
        axes.plot(*zip(*train, strict=True), label=label("training"), linewidth=1)
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", label=label("held out"), markersize=4)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M")
    axes.grid(alpha=0.3)
    axes.legend(prop={"family": family})
    figure.savefig(path, dpi=120)
