"""Flags: the recipe's dicts are defaults, a flag may swap other defaults in, and what is typed always wins."""

import re
import shlex
import warnings
from dataclasses import dataclass, field, fields

import pytest
from conftest import ROOT
from transformers import HfArgumentParser, TrainingArguments

from common.arguments import SharedArguments, count_of, parse_flags
from common.command_line import launch_command
from common.console import InputError
from common.other_names import RENAMED
from common.trainer_fields import REFUSED


@dataclass
class Own:
    sample: bool = field(default=False, metadata={"help": "Swap in small values."})
    from_scratch: bool = field(default=False, metadata={"help": "Swap in others."})
    prompts: list[str] = field(default_factory=lambda: ["once"], metadata={"help": "What to continue."})


# As in a recipe: of the shared flags, and of TrainingArguments.
DEFAULTS = dict(context_length=256, output_dir="out", learning_rate=0.004, max_steps=70, use_cpu=True, report_to="none")
DEFAULTS |= dict(lr_scheduler_kwargs={"num_decay_steps": 0.3})
SAMPLE = dict(context_length=64, max_steps=5, data=["small.jsonl"])


def parse(*words: str, **more):
    return parse_flags(Own, list(words), DEFAULTS, **dict(sample=SAMPLE) | more)


def test_without_flags_the_dicts_count_then_the_flags_own_defaults():
    own, shared, training = parse()
    assert (own.sample, own.from_scratch, own.prompts) == (False, False, ["once"])
    assert (shared.context_length, shared.data, shared.packing) == (256, None, "cross")
    assert (training.output_dir, training.learning_rate, training.max_steps) == ("out", 0.004, 70)
    assert training.lr_scheduler_kwargs == {"num_decay_steps": 0.3} and training.weight_decay == 0.0


def test_a_flag_wins_over_the_dicts():
    own, shared, training = parse("--context_length", "128", "--learning_rate", "1e-3", "--prompts", "a", "b")
    assert (shared.context_length, training.learning_rate, own.prompts) == (128, 1e-3, ["a", "b"])


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("30M", 30_000_000),
        ("30m", 30_000_000),
        (" 30 M ", 30_000_000),
        ("1e7", 10_000_000),
        ("2.5E6", 2_500_000),
        ("3e+07", 30_000_000),
        ("1.5b", 1_500_000_000),
        (".5B", 500_000_000),
        ("300K", 300_000),
        ("30_000_000", 30_000_000),
        ("30000000", 30_000_000),
    ],
)
def test_a_count_is_read_as_people_write_it(text, count):
    assert count_of("--max_data_tokens", text) == count
    assert parse("--max_data_tokens", text)[1].max_data_tokens == count


@pytest.mark.parametrize(
    "text", ["", " ", "_", "30MB", "30 million", "1,5B", "1e7M", "1e-7", "1e400", "0x10", "nan", "inf", "M"]
)
def test_what_could_mean_something_else_is_refused_in_one_line(text):
    line = f"--max_data_tokens {shlex.quote(text)}: not a number. Write it as 30M, 1.5B, 30000000 or 3e7; K, M and B"
    with pytest.raises(InputError, match=re.escape(line)) as error:
        parse("--max_data_tokens", text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["-5M", "-1", "-.5B", "0", "0.4"])
def test_a_count_below_one_is_refused_also_where_it_looks_like_a_flag(text):
    with pytest.raises(InputError, match=f"--max_data_tokens {text}: must be at least 1"):
        parse("--max_data_tokens", text)


def test_a_flag_swaps_other_defaults_in():
    own, shared, training = parse("--sample")
    assert own.sample and (shared.context_length, shared.data, training.max_steps) == (64, ["small.jsonl"], 5)
    assert training.learning_rate == 0.004, "what the replacement does not name stays"


def test_a_flag_wins_over_a_replacement_even_with_the_value_of_the_default():
    _, shared, training = parse("--sample", "--context_length", "256", "--max_steps", "70")
    assert (shared.context_length, training.max_steps, shared.data) == (256, 70, ["small.jsonl"])


def test_a_flag_at_its_default_swaps_nothing_in():
    own, _, training = parse("--sample", "false")
    assert own.sample is False and training.max_steps == 70


def test_what_is_true_by_default_can_be_switched_off_in_both_ways():
    assert parse()[2].log_on_each_node is True
    for words in (["--no_log_on_each_node"], ["--log_on_each_node", "false"]):
        assert parse(*words)[2].log_on_each_node is False


def test_a_replacement_may_depend_on_the_flags_value():
    def others(value):
        return {"max_steps": 10 * len(value)}

    assert parse("--prompts", "one", "two", "three", prompts=others)[2].max_steps == 30
    assert parse("--prompts", "one", "two", "--max_steps", "3", prompts=others)[2].max_steps == 3


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_a_flag_that_we_teach_gives_no_warning(name):
    """transformers 5.23 warns at the first name, and earlier versions do not know the second."""
    if name not in TrainingArguments.__dataclass_fields__:
        pytest.skip("not in this version of transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, _, training = parse(f"--{name}", "true", f"--{name}_kwargs", '{"every_n_layers": 2}', "--use_cpu", "true")
    assert training.gradient_checkpointing is True and training.gradient_checkpointing_kwargs == {"every_n_layers": 2}
    assert getattr(training, "activation_checkpointing", True) is True
    assert parse("--use_cpu", "true")[2].gradient_checkpointing is False


def test_of_two_replacements_the_later_wins():
    others = dict(max_steps=9, learning_rate=0.5)
    _, shared, training = parse("--from_scratch", "--sample", from_scratch=others)
    assert (training.max_steps, training.learning_rate, shared.context_length) == (9, 0.5, 64)
    _, shared, training = parse("--from_scratch", from_scratch=others)
    assert (training.max_steps, training.learning_rate, shared.context_length) == (9, 0.5, 256)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--no_such", "5"], "unknown flags: --no_such 5"),
        (["--context", "5"], "unknown flags: --context 5"),  # abbreviated
        (["--sampl"], "unknown flags: --sampl"),
        (["stray"], "unknown flags: stray"),
        (["--max_steps", "many"], "argument --max_steps.*invalid int value: 'many'"),
        (["--packing", "tight"], "argument --packing: invalid choice: 'tight'"),
    ],
)
def test_what_is_not_understood_is_refused(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*words)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, printed), printed


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (
            ["--warmup_ratio", "0.03"],
            "Instead of --warmup_ratio: --warmup_steps, which below 1 is a share",
        ),
        (["--evaluation_strategy=steps"], "Instead of --evaluation_strategy: --eval_strategy"),
        (["--overwrite_output_dir"], "the same command continues"),
        (["--no-cuda"], "Instead of --no_cuda: --use_cpu"),
        (["--learning_rat", "1"], r"Did you mean --learning_rate\?"),
        (["--max-step", "1"], r"Did you mean --max_steps\?"),
        (["--context", "5"], r"Did you mean --context_length\?"),
        (["--from_scrach"], r"Did you mean --from_scratch\?"),
        (["--input_dir", "data"], "Instead of --input_dir: --data"),
        (["llm/config/qwen/pretrain_argument_0p5b.json"], "Settings are the recipe's dicts and flags"),
    ],
)
def test_a_flag_that_was_renamed_or_mistyped_gets_its_name_in_one_line(words, hint, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*words)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and re.search(hint, printed)
    assert printed.count("\n") == 1, "no list of all flags above it"


def test_the_names_that_replace_old_ones_are_flags():
    parser = HfArgumentParser([Own, SharedArguments, TrainingArguments])
    known = {option for action in parser._actions for option in action.option_strings}
    of_recipes = {"--model", "--target_parameters", "--retain", "--pipeline_processes", "--stages_per_process"}
    of_the_launcher = {"--dynamo_backend", "--parallelism_config_tp_size"}
    for old, new in RENAMED.items():
        assert f"--{old}" not in known | of_recipes, f"transformers has --{old} again"
        named = {word.strip(",;.") for word in new.split() if word.startswith("--")}
        assert named <= known | of_recipes | of_the_launcher, named


def test_every_flag_of_the_table_for_those_who_come_from_elsewhere_is_known_or_has_its_name_here():
    """docs/coming_from.md, the flags of PaddleNLP, happy-llm, run_clm.py, PaddleFormers and minimind."""
    page = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \|$", page.split("## Flags\n")[1].split("\n## ")[0], flags=re.MULTILINE)
    cells = [row.strip("| ").split(" | ") for row in rows if not row.startswith("| what")]
    theirs = [cell for row in cells for cell in (row[1:3] + row[5:6] if len(row) == 7 else row[1:3])]
    names = {name for cell in theirs for name in re.findall(r"`(?:--)?(\w+)(?:: [^`]*| 1)?`", cell)}
    assert {"input_dir", "block_size", "tensor_parallel_degree", "train_file", "max_seq_len", "hidden_size"} <= names
    parser = HfArgumentParser([SharedArguments, TrainingArguments])
    known = {option.removeprefix("--") for action in parser._actions for option in action.option_strings}
    assert names - known - set(RENAMED) == {"WarmupLR", "visualdl"}, "values, and no flags"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_number_is_nan_or_infinite(value):
    """All flags of numbers, of whatever part."""
    numbers = [
        each.name
        for kind in (SharedArguments, TrainingArguments)
        for each in fields(kind)
        if "float" in str(each.type) and each.name not in REFUSED
    ]
    assert {"learning_rate", "data_weights", "save_minutes", "plan_memory_gib", "warmup_steps"} <= set(numbers)
    for name in numbers:
        with pytest.raises(InputError, match=f"--{name} .*: must be a finite number"):
            parse("--plan", f"--{name}={value}")
    with pytest.raises(InputError, match="--lr_scheduler_kwargs .*: must be a finite number"):
        parse("--lr_scheduler_kwargs", '{"min_lr_rate": NaN}')


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learning_rate=-1e-3", "--learning_rate -0.001: must be at least 0"),
        ("--weight_decay -1", "must be at least 0"),
        ("--adam_beta1 1", "must be below 1"),
        ("--seed -1", "must be at least 0"),
        ("--seed 4294967296", "must be below 4294967296"),
        ("--max_steps 99999999999999999999", "must be below 2147483648"),
        ("--num_train_epochs 1e300", "must be below 1000000"),
        ("--tokens_per_step 0", "must be at least 1"),
        ("--plan --plan_memory_gib -1", "must be at least 0.01"),
        ("--save_steps -5", "must be at least 0"),
        ("--lr_scheduler_kwargs nonsense", "--lr_scheduler_kwargs nonsense: must be JSON"),
        ("--lr_scheduler_kwargs [1]", "must be JSON"),
        ("--logging_steps 2.5", "transformers refuses these flags: --logging_steps must be an integer"),
        ("--save_strategy best", "--save_strategy best: .*What works: steps or no"),
        ("--use_liger_kernel true", "--use_liger_kernel: not with these recipes"),
        ("--deepspeed z.json", "--deepspeed: .*accelerate_configs/zero2.yaml"),
        ("--torch_compile true", "--torch_compile: .*--dynamo_backend"),
        ("--bf16_full_eval true", "--bf16_full_eval: .*the model itself would be cast"),
    ],
)
def test_a_value_out_of_its_range_is_one_line(words, message):
    with pytest.raises(InputError, match=message) as stopped:
        parse(*words.split())
    assert "\n" not in str(stopped.value)


def test_a_recipes_dict_is_held_to_the_same_rules():
    with pytest.raises(InputError, match="--eval_strategy epoch"):
        parse_flags(Own, [], DEFAULTS | dict(eval_strategy="epoch"))


def test_a_flag_that_a_recipe_does_not_read_is_refused_unless_it_says_what_is_so_anyway(capsys):
    unread = dict(not_read=["save_minutes", "weight_decay"])
    parse(**unread)
    assert parse("--weight_decay", "0.0", **unread)[2].weight_decay == 0.0
    with pytest.raises(SystemExit):
        parse("--weight_decay", "0.1", **unread)
    assert "--weight_decay: this recipe does not read it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--save_minutes", "5", **unread)
    assert "--save_minutes: this recipe does not read it" in capsys.readouterr().err


def helped(*words: str, **more) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*words, **more)
    assert stopped.value.code == 0


def test_help_shows_the_recipes_own_flags_and_the_values_of_its_dicts(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    helped("--help")
    printed = capsys.readouterr().out
    assert "Swap in small values. (default: False)" in " ".join(printed.split()) and "_Default" not in printed
    for pair in (
        "--context_length 256",
        "--learning_rate 0.004",
        """--lr_scheduler_kwargs '{"num_decay_steps": 0.3}'""",
    ):
        assert pair in printed, "a flag and its value are on one line"
    assert "--use_cpu" not in printed, "it comes with the YAML"
    assert "--packing" not in printed and "--help all" in printed
    shared = {each.name for each in fields(SharedArguments) if each.init}
    trainers = {each.name for each in fields(TrainingArguments) if each.init} - REFUSED.keys()
    assert f"{len((shared | trainers) - DEFAULTS.keys())} more: --help all" in printed


def test_help_all_shows_every_flag_but_those_that_are_refused(capsys):
    helped("--help", "all", not_read=["packing"])
    printed = capsys.readouterr().out
    shown = set(re.findall(r"^  --(\w+)", printed, flags=re.MULTILINE))
    known = {each.name for kind in (Own, SharedArguments, TrainingArguments) for each in fields(kind) if each.init}
    assert {name for name in shown if not name.startswith("no_")} == known - REFUSED.keys() - {"packing"}
    shown = " ".join(printed.split())
    for flag, value in (("--context_length", "256"), ("--learning_rate", "0.004"), ("--max_steps", "70")):
        assert shown.split(f" {flag} ")[1].split("(default: ")[1].startswith(f"{value})"), flag
    assert "Swap in small values. (default: False)" in shown
    assert "_Default" not in shown


def test_an_unknown_flag_is_one_line_and_of_one_process(capsys, monkeypatch):
    for words in (["--help", "everything"], ["--no_such"]):
        with pytest.raises(SystemExit):
            parse(*words)
        assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        parse("--no_such")
    assert stopped.value.code == 2 and capsys.readouterr().err == ""


def test_the_flags_that_were_given_make_the_command_again():
    """Parsed again, it gives the same arguments: lists, JSON, spaces, switches, and a value equal to the default."""
    words = ["--sample", "--prompts", "two words", "b", "--lr_scheduler_kwargs", '{"num_decay_steps": 0.5}']
    words += ["--max_steps", "70", "--keep_duplicates", "false"]
    given = parse(*words)[1].given
    assert given["max_steps"] == 70 and "learning_rate" not in given
    command = launch_command("my configs/x.yaml", "mine.py", given, "--mixed_precision fp16")
    launcher, _, flags = command.partition(" recipes/mine.py ")
    assert launcher == "accelerate launch --config_file 'my configs/x.yaml' --mixed_precision fp16"
    again = parse(*shlex.split(flags))
    assert again[1].given == given and again[0] == parse(*words)[0] and again[2].max_steps == 70


@pytest.mark.parametrize("flag", ["--plan_config x.yaml", "--plan_processes 8", "--plan_memory_gib 80", "--plan_json"])
def test_what_only_a_plan_reads_is_refused_without_it(flag):
    with pytest.raises(InputError, match=f"{flag}.*: it would be ignored"):
        parse(*flag.split())
    parse("--plan", *flag.split())
