"""The recipes work as they stand: their flags parse, and each one's stages, at toy size on local rows with the columns of the
real data, run one after the other in the folders that the flag files name. The README's commands have flags that exist."""
import importlib.util
import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest

import countdown
import eval as evaluation
import grpo
import report
import rewards
import runs
import sft
import toys

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path for path in (ROOT / "recipes").iterdir() if path.is_dir())
FILES = sorted((ROOT / "recipes").glob("*/*.txt"))
PARSE = {"countdown": countdown.parse_args, "sft": sft.parse_args, "grpo": grpo.parse_args, "eval": evaluation.parse}
ORDER = list(PARSE)

ROWS = {  # columns of the data sets that a source stands for
    "gsm8k": toys.GSM8K,
    "math": [{"problem": f"What is ${a} + {b}$?", "solution": f"We add: $\\boxed{{{a + b}}}$.", "answer": str(a + b),
              "subject": "Algebra", "level": 1, "unique_id": f"test/algebra/{a}.json"} for a, b in ((1, 2), (3, 4), (5, 6), (7, 9))],
    "numina": [{"source": "cn_k12", "problem": f"Double ${a}$.", "solution": f"It is $\\boxed{{{2 * a}}}$.", "messages": []}
               for a in (2, 3, 5, 8)],
    "arc": [{"id": f"Mercury_{i}", "question": f"Which of these is {i}?", "answerKey": "B",
             "choices": {"text": ["none", str(i), "all"], "label": ["A", "B", "C"]}} for i in range(4)],
    "code": [{"task_id": i, "text": f"Write a function to add {i}.", "code": f"def add(x):\r\n  return x + {i}", "test_setup_code": "",
              "test_list": [f"assert add(1) == {1 + i}"], "challenge_test_list": []} for i in range(4)],
}
SMALL = {  # numbers that a toy run lowers to these; every other flag stays as the recipe has it
    "countdown": {"train": 24, "val": 4, "test": 4, "traces": 2},
    "sft": {"steps": 2, "batch_size": 4, "micro_batch_size": 2, "max_length": 512, "warmup": 1},
    "grpo": {"steps": 2, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 8, "micro_batch_size": 4, "max_resample": 1,
             "eval_every": 2, "save_every": 2},
    "eval": {"max_new_tokens": 8, "limit": 2},
}


def stage(file):
    """The script that a flag file is for: a recipe may make data twice."""
    return file.stem if file.stem in PARSE else "countdown"


def named(file):
    """What a flag file says, and not by default: {flag: its values}."""
    words, flags = [w for line in file.read_text().splitlines() for w in shlex.split(line, comments=True)], {}
    for word in words:
        if word.startswith("--"):
            flags[word[2:]] = []
        else:
            flags[list(flags)[-1]].append(word)
    return flags


def name_of(file):
    return f"{file.parent.name}/{file.name}"


# ------------------------------------------------------------------------------------------- the flag files
@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_flag_file_parses_to_what_it_says(file):
    args = vars(PARSE[stage(file)]([f"@{file}"]))
    said = named(file)
    assert said
    for flag, values in said.items():                           # exact names, no abbreviations
        got = args[flag]
        if isinstance(got, dict):                               # --weights
            assert {k: v for k, v in got.items() if v} == {k: float(v) for k, v in (x.split("=") for x in values)}
        elif values:
            assert list(map(str, got if isinstance(got, list) else [got])) == [str(type(x)(v)) for x, v in zip(
                got if isinstance(got, list) else [got], values, strict=True)]
        else:
            assert got is True


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_flag_file_opens_with_what_it_is(file):
    assert re.match(r"# \w.{20}", file.read_text())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_trains_and_evaluates_what_it_trained(recipe):
    files = {file.stem: named(file) for file in recipe.iterdir()}
    assert {"grpo", "eval"} <= set(files)
    trained, before = files["grpo"]["output_dir"][0], files["grpo"]["model"][0]
    *others, last = files["eval"]["model"]
    assert last == trained + "/merged" * ("merge" in files["grpo"]) and before in others
    assert files["eval"].get("style") == files["grpo"].get("style") == files.get("sft", files["grpo"]).get("style")
    assert int(files["eval"]["max_new_tokens"][0]) >= int(files["grpo"]["max_new_tokens"][0])
    tasks = [{re.split("[=:]", source)[0] for source in files[name]["data"]} for name in ("grpo", "eval")]
    assert tasks[0] <= tasks[1]
    if "length=" in " ".join(files["grpo"]["weights"]):         # a penalty that cannot be reached would be none
        assert int(files["grpo"]["length_penalty"][1]) <= int(files["grpo"]["max_new_tokens"][0])


def test_lm_evaluation_harness_knows_the_tasks_that_recipes_name(tmp_path):
    specs = [spec for file in FILES for spec in named(file).get("harness", [])]
    assert specs and all(re.fullmatch(r"\w+:[0-9]+", spec) for spec in specs)
    if not importlib.util.find_spec("lm_eval"):
        pytest.skip("lm-evaluation-harness is not installed: that it has these tasks was not looked up")
    evaluation.harness_tasks(specs, tmp_path)
    assert len(list(tmp_path.iterdir())) == len(specs)


# ------------------------------------------------------------------------------------------- the stages
def local(source, folder):
    """A source with its rows from the folder, where it would come from the hub: `math=AI-MO/NuminaMath-CoT:20000`."""
    task, path, count = re.fullmatch(r"(\w+)(?:=([^:]+))?(:\d+)?", source).groups()
    if task == "countdown":                                     # made by an earlier stage
        return source
    return f"{task}={folder / ('numina' if 'NuminaMath' in (path or '') else task)}{count or ''}"


def shrunken(file, here, toy):
    """A copy of the flag file without --harness, and the flags that make a toy run of it."""
    name, said = stage(file), named(file)
    copy = here / f"{file.stem}.txt"
    copy.write_text(re.sub("--harness.*", "", file.read_text()))
    args = vars(PARSE[name]([f"@{file}"]))
    flags = {k: [min(v, args[k] or v)] for k, v in SMALL[name].items() if args[k] != 0 or k == "limit"}
    if "model" in said:
        flags["model"] = [toy / "model" if re.fullmatch(r"[\w-]+/[\w.-]+", m) and not m.startswith("runs/") else m for m in said["model"]]
    for flag in ("data", "eval_data"):
        if flag in said:
            flags[flag] = [local(source, toy) for source in said[flag]]
    return args, flags, [f"@{copy}", *(str(x) for k, values in flags.items() for x in (f"--{k}", *values))]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = toys.save(tmp_path_factory.mktemp("toy"))
    for name, rows in ROWS.items():
        for split in ("train", "test"):
            toys.write(folder / name / f"{split}.jsonl", rows)
    return folder


def check_run(args, flags, out):
    """A run of two steps, with the recipe's flags but for those that were lowered."""
    metrics = [m for m in toys.read(out / "metrics.jsonl") if "loss" in m]
    assert [m["step"] for m in metrics] == [1, 2] and all(math.isfinite(m["loss"]) for m in metrics)
    ran = json.loads((out / "args.json").read_text())
    del ran["launcher"]
    assert {k: v for k, v in ran.items() if k not in flags} == {k: args[k] for k in ran if k not in flags}
    lowered = [k for k in ran if k in flags and k not in ("model", "data", "eval_data")]
    assert lowered and {k: ran[k] for k in lowered} == {k: flags[k][0] for k in lowered}
    assert (out / "merged" / "config.json").exists() == args["merge"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipes_stages_run_one_after_the_other(recipe, toy, tmp_path, monkeypatch, capsys):
    if "qlora" in recipe.name or any("adamw8bit" in file.read_text() for file in recipe.iterdir()):
        pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)                                 # data/, runs/ and results/ of the flag files lie here
    for file in sorted(recipe.glob("*.txt"), key=lambda file: (ORDER.index(stage(file)), file.name)):
        args, flags, argv = shrunken(file, tmp_path, toy)
        if stage(file) == "countdown":
            countdown.main(argv)
            for split in ("train", "val", "test"):
                if args[split]:
                    assert len(rewards.load_rows(f"countdown={args['out']}", split)) == flags[split][0]
        elif stage(file) == "eval":
            monkeypatch.setattr(evaluation, "REPORT", ["true"])  # the table in print has a process, and tests, of its own
            evaluation.main(argv)
            table = json.loads(Path(args["output"]).read_text())
            tasks = [re.split("[=:]", source)[0] for source in args["data"]]
            assert [(row["model"], row["task"]) for row in table] == [(str(m), task) for m in flags["model"] for task in tasks]
            assert all(row["n"] == 2 for row in table)
        else:
            {"sft": sft, "grpo": grpo}[stage(file)].main(argv)
            check_run(args, flags, Path(args["output_dir"]))
    capsys.readouterr()


# ------------------------------------------------------------------------------------------- the README
def readme():
    path = ROOT / "README.md"
    if not path.exists():
        pytest.skip("there is no README.md")
    return path.read_text()


def commands():
    """[(script, arguments, under torchrun)] of the README's bash blocks."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", readme(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for words in (shlex.split(part, comments=True) for part in re.split(r"&&|;", line)):
                at = [i for i, word in enumerate(words) if Path(word).name in [f"{name}.py" for name in (*PARSE, "report")]]
                if at:
                    found.append((Path(words[at[0]]).stem, [w for w in words[at[0] + 1:] if w != "..."], "torchrun" in words))
    return found


def options(main, capsys):
    """The flags that a script's --help names."""
    with pytest.raises(SystemExit):
        main(["--help"])
    return set(re.findall(r"--[a-z0-9_]+", capsys.readouterr().out))


def test_every_command_of_the_readme_parses(monkeypatch, capsys):
    known = options(report.main, capsys)
    monkeypatch.chdir(ROOT)                                     # @recipes/...
    monkeypatch.setattr(runs.importlib, "import_module", lambda name: None)         # wandb need not be here
    found = commands()
    assert {"countdown", "sft", "grpo", "eval"} <= {script for script, *_ in found}
    for script, argv, torchrun in found:
        for flag, file in zip(argv, argv[1:]):
            if flag == "--chat_template":                       # a file of the reader's own
                argv[argv.index(file)] = "README.md"
        with monkeypatch.context() as m:
            if torchrun:
                m.setattr(runs, "WORLD", 8)
            if script == "grpo" and "--model" not in argv and not any(word.startswith("@") for word in argv):
                argv = [*argv, "--model", "M"]                  # `grpo.py ...`, cut short
            try:
                if script == "report" or {"--report", "--curves"} & set(argv):
                    assert {w for w in argv if w.startswith("--")} <= known | {"--help"}
                elif "--help" not in argv:
                    PARSE[script](argv)
            except SystemExit:
                pytest.fail(f"{script}.py {shlex.join(argv)}: {capsys.readouterr().err}")


def test_every_flag_that_the_readme_names_exists(capsys):
    known = set.union(*(options(main, capsys) for main in (*PARSE.values(), report.main)))
    others = {"--nproc_per_node", "--nnodes", "--max_restarts", "--rdzv_backend", "--rdzv_endpoint",               # torchrun's
              "--index-url", "--write", "--threads", "--prompts", "--help",                 # pip's, the benchmarks'
              "--mean_length", "--shape", "--prompt_length"}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", readme())) - known - others == set()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
