"""The recipes work as they stand: their flags parse, and their stages run one after the other, shrunken to a
toy model and local rows with the columns of the real data. The README's commands have flags that exist."""
import json
import math
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import countdown
import eval as evaluation
import grpo
import rewards
import sft
import toys
from extras import report

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path for path in (ROOT / "recipes").iterdir() if path.is_dir())
FILES = sorted((ROOT / "recipes").glob("*/*.txt"))
SCRIPTS = {"countdown": countdown, "sft": sft, "grpo": grpo, "eval": evaluation}  # in the order of the stages

ROWS = {  # columns of the data sets that a source stands for
    "gsm8k": [row for row in toys.GSM8K if row["answer"][0] != "#"],    # with worked steps, as sft.py needs
    "math": [{"problem": f"Double ${a}$.", "solution": f"It is $\\boxed{{{2 * a}}}$.", "answer": str(2 * a),
              "subject": "Algebra", "level": 1} for a in (2, 3, 5, 8)],
    "numina": [{"problem": f"Halve ${2 * a}$.", "solution": f"So $\\boxed{{{a}}}$."} for a in (2, 3, 5, 8)],
    "code": [{"text": f"Add {i}.", "code": f"def add(x):\r\n  return x + {i}", "test_setup_code": "",
              "test_list": [f"assert add(1) == {1 + i}"]} for i in range(4)],
}
SMALL = {  # numbers that a toy run lowers to these; every other flag stays as the recipe has it
    "countdown": {"train": 24, "val": 4, "test": 4, "traces": 2},
    "sft": {"steps": 2, "batch_size": 4, "micro_batch_size": 2, "max_length": 512, "warmup": 1},
    "grpo": {"steps": 2, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 8, "micro_batch_size": 4,
             "max_resample": 1, "eval_every": 2, "save_every": 2},
    "eval": {"max_new_tokens": 8, "limit": 2},
}


def stage(file):
    """The name of the script that a flag file is for: a recipe may make data twice."""
    return file.stem if file.stem in SCRIPTS else "countdown"


def named(file):
    """What a flag file says: {flag: its values}."""
    flags = {}
    for line in file.read_text().splitlines():
        for word in shlex.split(line, comments=True):
            if word.startswith("--"):
                flags[word[2:]] = []
            else:
                flags[list(flags)[-1]].append(word)
    return flags


def name_of(path):
    return str(path.relative_to(ROOT / "recipes"))


# ---------------------------------------------------------------------------------- the flag files
@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_flag_file_opens_with_what_it_is_and_parses_to_what_it_says(file):
    assert re.match(r"# \w.{20}", file.read_text())
    args, said = vars(SCRIPTS[stage(file)].parse_args([f"@{file}"])), named(file)
    assert said
    for flag, values in said.items():                           # exact names, no abbreviations
        got = args[flag] if isinstance(args[flag], list) else [args[flag]]
        assert got == [type(x)(v) for x, v in zip(got, values, strict=True)] if values else got == [True]


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_a_recipe_trains_and_evaluates_what_it_trained(recipe):
    files = {file.stem: named(file) for file in recipe.iterdir()}
    trained, before = files["grpo"]["output_dir"][0], files["grpo"]["model"][0]
    *others, last = files["eval"]["model"]
    assert last == trained + "/merged" * ("merge" in files["grpo"]) and before in others
    styles = [files[name].get("style") for name in ("sft", "grpo", "eval") if name in files]
    assert styles == [styles[0]] * len(styles)
    assert int(files["eval"]["max_new_tokens"][0]) >= int(files["grpo"]["max_new_tokens"][0])
    tasks = [{re.split("[=:]", source)[0] for source in files[name]["data"]} for name in ("grpo", "eval")]
    assert tasks[0] <= tasks[1]
    if "length_penalty" in files["grpo"]:                       # one that cannot be reached would be none
        assert int(files["grpo"]["length_penalty"][1]) <= int(files["grpo"]["max_new_tokens"][0])


def test_lm_evaluation_harness_has_the_tasks_and_flags_of_the_commands_in_the_recipes():
    text = "".join(file.read_text() for file in FILES).replace("\\\n#", " ")
    commands = [shlex.split(line) for line in re.findall(r"^# +(lm_eval --.*)", text, re.M)]
    assert len(commands) == 3
    if not find_spec("lm_eval"):
        pytest.skip("lm-evaluation-harness is not installed: its tasks were not looked up")
    package = Path(find_spec("lm_eval").origin).parent
    flags = set(re.findall(r'"(--\w+)"', (package / "_cli/run.py").read_text()))
    for command in commands:
        assert {word for word in command if word.startswith("--")} <= flags
        assert list((package / "tasks").glob(f"*/{command[command.index('--tasks') + 1]}.yaml"))


# ---------------------------------------------------------------------------------- the stages
@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = toys.save(tmp_path_factory.mktemp("toy"))
    for name, rows in ROWS.items():
        for split in ("train", "test"):
            toys.write(folder / name / f"{split}.jsonl", rows)
    return folder


def local(source, folder):
    """A source whose rows come from the folder instead of the hub: `math=AI-MO/NuminaMath-CoT:20000`."""
    task, path, count = re.fullmatch(r"(\w+)(?:=([^:]+))?(:\d+)?", source).groups()
    if task == "countdown":                                     # made by an earlier stage
        return source
    return f"{task}={folder / ('numina' if 'NuminaMath' in (path or '') else task)}{count or ''}"


def shrunken(file, toy):
    """-> what the flag file says, and the flags that make a toy run of it: {flag: values}."""
    name, said = stage(file), named(file)
    args = vars(SCRIPTS[name].parse_args([f"@{file}"]))
    flags = {flag: [min(low, args[flag] or low)] for flag, low in SMALL[name].items()
             if args[flag] != 0 or flag == "limit"}
    if "model" in said:
        on_hub = re.compile(r"(?!runs/)[\w-]+/[\w.-]+")
        flags["model"] = [str(toy / "model") if on_hub.fullmatch(model) else model for model in said["model"]]
    for flag in {"data", "eval_data"} & set(said):
        flags[flag] = [local(source, toy) for source in said[flag]]
    return args, flags


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_the_stages_of_a_recipe_run_one_after_the_other(recipe, toy, tmp_path, monkeypatch):
    if any("8bit" in file.read_text() for file in recipe.iterdir()):
        pytest.importorskip("bitsandbytes")
    if any("math" in named(file).get("data", []) for file in recipe.iterdir()):
        pytest.importorskip("math_verify")
    monkeypatch.chdir(tmp_path)                                 # where data/, runs/ and results/ are made
    order = list(SCRIPTS)
    for file in sorted(recipe.glob("*.txt"), key=lambda file: (order.index(stage(file)), file.name)):
        args, flags = shrunken(file, toy)
        more = [str(word) for flag, values in flags.items() for word in (f"--{flag}", *values)]
        SCRIPTS[stage(file)].main([f"@{file}", *more])
        if stage(file) == "countdown":
            for split in ("train", "val", "test"):
                if args[split]:
                    assert len(rewards.load_rows(f"countdown={args['out']}", split)) == flags[split][0]
        elif stage(file) == "eval":
            table = json.loads(Path(args["output"]).read_text())
            tasks = [re.split("[=:]", source)[0] for source in args["data"]]
            found = [(row["model"], row["task"], row["n"]) for row in table]
            assert found == [(model, task, 2) for model in flags["model"] for task in tasks]
        else:
            check_run(args, flags, Path(args["output_dir"]))


def check_run(args, flags, out):
    """A run of two steps with the recipe's flags, but for those that were lowered."""
    metrics = [m for m in toys.read(out / "metrics.jsonl") if "loss" in m]
    assert [m["step"] for m in metrics] == [1, 2] and all(math.isfinite(m["loss"]) for m in metrics)
    ran = json.loads((out / "args.json").read_text())
    assert ran.pop("data_crc")
    settled = {name for name in ("dtype", "optim", "activation_checkpointing") if args[name] is None}
    assert all(ran[name] is not None for name in settled)       # by the device
    assert {name: value for name, value in ran.items() if name not in flags.keys() | settled} == \
           {name: value for name, value in args.items() if name not in flags.keys() | settled}
    assert (out / "merged" / "config.json").exists() == args["merge"]


# ---------------------------------------------------------------------------------- their memory
@pytest.fixture(scope="module")
def bench():
    """tests/bench/bench_memory.py, which computes memory at true shapes without a GPU."""
    sys.path.insert(0, str(ROOT / "tests/bench"))
    import bench_memory
    return bench_memory


def test_the_default_command_fits_a_gpu_of_80_gb(bench):
    gb = bench.compute("grpo", *shlex.split(bench.DEFAULT)[1:])
    assert gb["gradients"] == gb["masters"] == 2 * gb["weights"] == 2 * gb["reference"] > 12
    assert gb["moments"] == gb["weights"] and min(gb["keys+values"], gb["activations"], gb["logits"]) > 1
    assert gb["total"] <= 64                                    # GB: leaves room for longer prompts


@pytest.mark.parametrize("flags", [
    "--model Qwen/Qwen2.5-3B-Instruct", "@recipes/smollm2-135m-gsm8k/grpo.txt",
    "--model Qwen/Qwen2.5-3B-Instruct --micro_batch_size 4 --no-activation_checkpointing",
    "--model Qwen/Qwen2.5-0.5B-Instruct --lora_rank 32 --optim adamw"])
def test_what_grpo_says_about_its_memory_is_about_what_is_computed(flags, bench, monkeypatch):
    if "lora" in flags:
        pytest.importorskip("peft")
    monkeypatch.chdir(ROOT)                                     # @recipes/...
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 80e9))
    said, args = [], grpo.parse_args(flags.split())
    monkeypatch.setattr(grpo, "note", said.append)
    args.optim, args.dtype = args.optim or "adamw8bit", "bfloat16"              # as on a GPU
    args.activation_checkpointing = args.activation_checkpointing is not False
    shape = bench.shape_of(args.model)
    lm = bench.make(shape, bench.shapes.SHAPES[shape][2], torch.bfloat16, args.lora_rank)
    trained = {name: (p, p) for name, p in lm.named_parameters() if p.requires_grad}
    data = [{"prompt_ids": [0] * bench.LENGTHS[bench.tasks_of(args)[0]][0]}]
    grpo.describe(args, lm, trained, data, torch.device("cuda"), ends=[1])
    gb = float(re.search(r"([\d.]+) of 80 GB", said[0])[1])
    assert gb == pytest.approx(bench.compute("grpo", *flags.split())["total"], rel=0.15)


def test_the_readme_has_the_flags_that_are_computed_to_fit(bench):
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (\d+) GB.* \| ([\d.]+B) \| (.*) \| \d+ \|$", readme, re.M)
    assert rows == [(str(card), model, f"`{flags}`" if flags else "none") for card, model, flags in bench.FITS]
    for recipe, card in bench.CARDS.items():
        if recipe != "tiny":
            assert re.search(rf"^\| `{recipe}` .*\(for {card}\) \|$", readme, re.M)


# ---------------------------------------------------------------------------------- the README
def readme_commands():
    """[(script, its arguments, is it under torchrun)] of the README's bash blocks."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        for line in re.split(r"\n|&&|;", block.replace("\\\n", " ")):
            words = shlex.split(line, comments=True)
            names = [Path(word).name for word in words]
            for name in (*SCRIPTS, "report"):
                if f"{name}.py" in names:
                    argv = [word for word in words[names.index(f"{name}.py") + 1:] if word != "..."]
                    found.append((name, argv, "torchrun" in words))
    return found


def flags_of(main, capsys):
    """The flags that a script's --help names."""
    with pytest.raises(SystemExit):
        main(["--help"])
    return set(re.findall(r"--[a-z][a-z0-9_-]*", capsys.readouterr().out))


def test_every_command_of_the_readme_parses(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)                                     # @recipes/...
    found = readme_commands()
    assert {"countdown", "sft", "grpo", "eval"} <= {script for script, *_ in found}
    known = flags_of(report.main, capsys)
    for script, argv, torchrun in found:
        if script == "report":
            assert {word for word in argv if word.startswith("--")} <= known
        elif "--help" not in argv:
            with monkeypatch.context() as patched:
                if torchrun:
                    patched.setattr(SCRIPTS[script], "WORLD", 8)
                if script == "grpo" and "--model" not in argv and not any(word[0] == "@" for word in argv):
                    argv = [*argv, "--model", "M"]              # `grpo.py ...`, cut short
                SCRIPTS[script].parse_args(argv)                # exits where a flag is wrong


def test_every_flag_that_the_readme_names_exists(capsys):
    known = set.union(*(flags_of(script.main, capsys) for script in (*SCRIPTS.values(), report)))
    others = {"--help", "--nproc_per_node", "--nnodes", "--max_restarts", "--rdzv_backend", "--rdzv_endpoint",
              "--index-url"}
    for file in (*ROOT.glob("tests/bench/*.py"), ROOT / "recipes/qwen2.5-7b-r1/eval.txt"):      # lm_eval's
        others |= set(re.findall(r"--\w+", file.read_text()))
    named_there = re.findall(r"(?<![\w-])--[a-z][\w-]*", (ROOT / "README.md").read_text())
    assert set(named_there) - known - others == set()
