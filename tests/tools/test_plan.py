"""`tools/plan.py`: layouts that fit, best first; the file it writes is one that a run takes."""

import importlib.util
import json
import re
import shlex
import sys

import pytest
from omegaconf import OmegaConf

from v4train.errors import ConfigError
from v4train.overrides import composed, config_dir
from v4train.parallel.sizes import ParallelismConfig, check_layout

SPEC = importlib.util.find_spec("tools.plan")
SMALL = ["train.sequence_length=512", "train.global_batch_size=8", "precision=fp32", "train.recompute=none"]
RUN = ["train.global_batch_size=2048", "train.sequence_length=4096", "precision=bf16"]


@pytest.fixture
def tool():
    module = importlib.util.module_from_spec(SPEC)
    sys.modules[SPEC.name] = module
    SPEC.loader.exec_module(module)
    yield module
    del sys.modules[SPEC.name]


def plans(tool, capsys, *arguments):
    tool.main([*arguments, "format=json", "show=100000"])
    return json.loads(capsys.readouterr().out)


def test_all_that_fit_best_first(tool, capsys):
    limits = ["max_pipeline=8", "max_tensor=2"]
    found = plans(tool, capsys, "model=flash", "gpus=64", "gpu_memory=141", "hardware=h200", *RUN, *limits)
    assert found
    for plan in found:
        layout = plan["layout"]
        assert layout["pipeline"] * layout["data"] * layout["context"] * layout["tensor"] == 64
        assert layout["data"] * layout["context"] % layout["expert"] == 0 and 256 % layout["expert"] == 0
        assert layout["rows"] * layout["accumulation"] * layout["data"] == 2048
        assert layout["pipeline"] <= 8 and layout["tensor"] <= 2
        assert plan["memory_gib"]["total"] <= 0.9 * 141
    seconds = [plan["seconds"]["total"] for plan in found]
    assert all(b >= a / tool.ALIKE for a, b in zip(seconds, seconds[1:], strict=False))


def test_published_layout_is_among_them(tool, capsys):
    """V4.md 5: Pro on 256 GB300."""
    fixed = ["parallelism.pipeline=4", "parallelism.expert=64"]
    found = plans(tool, capsys, "model=pro", "gpus=256", "hardware=gb300", *RUN, *fixed)
    assert all((plan["layout"]["pipeline"], plan["layout"]["expert"]) == (4, 64) for plan in found)
    assert {plan["layout"]["recompute"] for plan in found} >= {"block"}


def test_a_large_run_unless_told_otherwise(tool, capsys, tmp_path):
    """The command alone means no run of 4 rows of 512 tokens in fp32; what it assumes stands in the file."""
    path = tmp_path / "parallelism" / "mine.yaml"
    small = ["model=flash", "gpus=64", "hardware=gb300", "max_pipeline=4", "max_tensor=1", "train.recompute=block"]
    found = plans(tool, capsys, *small, f"write={path}")
    layout = found[0]["layout"]
    assert (layout["sequence_length"], layout["precision"]) == (4096, "bf16")
    assert layout["rows"] * layout["accumulation"] * layout["data"] == 1024
    for word in ("precision=bf16", "train.sequence_length=4096", "train.global_batch_size=1024"):
        assert word in path.read_text()
    given = plans(tool, capsys, *small, "precision=fp32", "train.global_batch_size=256")[0]["layout"]
    assert given["precision"] == "fp32" and given["rows"] * given["accumulation"] * given["data"] == 256


def test_no_layout_that_training_refuses(tool, capsys):
    """A pipeline of more than one stage goes with ZeRO 0 or 1 only."""
    found = plans(tool, capsys, "model=flash_small", "gpus=4", "hardware=cpu", *SMALL)
    assert {plan["layout"]["zero_stage"] for plan in found if plan["layout"]["pipeline"] > 1} == {0, 1}
    assert {plan["layout"]["zero_stage"] for plan in found if plan["layout"]["pipeline"] == 1} == {0, 1, 2, 3}
    assert {plan["layout"]["tensor"] for plan in found} == {1, 2}
    compiled = plans(tool, capsys, "model=flash_small", "gpus=4", "hardware=cpu", "compile=true", *SMALL)
    assert {plan["layout"]["tensor"] for plan in compiled} == {1}


def test_phases_say_what_steps_are(tool, capsys):
    """Every phase must fit and be shared out; the last one's time counts."""
    fixed = ["train.recompute=none", "max_tensor=1", "parallelism.pipeline=1", "parallelism.context=1"]
    given = ["model=flash_small", "gpus=4", "hardware=cpu", "precision=fp32", "schedule=v4_small", *fixed]
    found = plans(tool, capsys, *given)
    assert {plan["layout"]["sequence_length"] for plan in found} == {512}
    assert {plan["layout"]["rows"] * plan["layout"]["accumulation"] for plan in found} == {1}


def test_an_option_of_parallelism_fixes_its_keys(tool, capsys):
    found = plans(tool, capsys, "model=pro", "gpus=512", "hardware=gb300", "parallelism=pro", "train.recompute=block")
    assert {(plan["layout"]["pipeline"], plan["layout"]["expert"]) for plan in found} == {(8, 64)}
    spread = plans(tool, capsys, "model=flash_small", "gpus=4", "hardware=cpu", "parallelism=expert", *SMALL)
    assert all(p["layout"]["expert"] == p["layout"]["data"] * p["layout"]["context"] for p in spread)


def test_the_file_it_writes(tool, capsys, tmp_path):
    path = tmp_path / "parallelism" / "mine.yaml"
    tool.main(["model=flash", "gpus=256", *RUN, "max_pipeline=8", "max_tensor=1", f"write={path}"])
    table, text = capsys.readouterr().out, path.read_text()
    assert "flash on 256 x h100" in table
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert values.pop("defaults") == ["auto", "_self_"]
    base = OmegaConf.to_container(OmegaConf.load(config_dir() / "parallelism" / "auto.yaml"))
    sizes = check_layout(ParallelismConfig(**(base | values)), 256)
    assert sizes.world == 256
    command = next(line for line in text.splitlines() if "launch/pretrain.py" in line)
    overrides = shlex.split(command.partition("launch/pretrain.py ")[2])
    assert "parallelism=mine" in overrides and "model=flash" in overrides
    config = composed("pretrain", overrides)  # and Hydra finds the file
    assert {key: config.parallelism[key] for key in values} == values
    tool.main(["model=flash", "gpus=64", "gpu_memory=300", *RUN, "max_pipeline=2", f"write={path}"])  # its own file
    assert "on 64 ranks" in path.read_text()


def test_the_command_it_writes_is_quoted_for_a_shell(tool, tmp_path):
    path = tmp_path / "parallelism" / "mine.yaml"
    words = ["schedule.kind=sqrt", "model.name='two words $HOME'", "model.attention_mix='swa*2 (csa hca)*1'"]
    fixed = ["model.num_layers=4", "parallelism.zero_stage=0", "+parallelism.deepspeed.wall_clock_breakdown=true"]
    tool.main(["gpus=2", "hardware=cpu", *SMALL, *words, *fixed, f"write={path}"])
    command = next(line for line in path.read_text().splitlines() if "launch/pretrain.py" in line)
    given = shlex.split(command.partition("launch/pretrain.py ")[2])
    assert set(words) < set(given) and fixed[2] in given and fixed[1] not in given
    assert composed("pretrain", given).model.name == "two words $HOME"


def test_the_commands_that_its_help_shows(tool, capsys):
    commands = [line.split("tools/plan.py ")[1].split() for line in tool.__doc__.splitlines() if "python tools" in line]
    assert len(commands) == 2
    for words in commands:
        tool.main([word for word in words if not word.startswith("write=")])
        assert "layouts fit" in capsys.readouterr().out


def test_what_an_experiment_says_is_not_assumed(tool, capsys):
    """Its layout holds, its rows are planned: 16 x 160 tokens, one data rank without ZeRO."""
    found = plans(tool, capsys, "experiment=recall", "gpus=2", "hardware=cpu", "train.recompute=none")
    layouts = [plan["layout"] for plan in found]
    assert {(of["sequence_length"], of["rows"] * of["accumulation"] * of["data"]) for of in layouts} == {(160, 16)}
    assert {(of["data"], of["zero_stage"], of["precision"]) for of in layouts} == {(1, 0, "bf16")}
    assert plans(tool, capsys, "gpus=2", "hardware=cpu", "parallelism='pipeline'", *SMALL)[0]["layout"]["pipeline"] == 2


def test_the_least_need_is_that_of_a_layout(tool, capsys):
    """Whatever there is: with a little more than it says a layout fits, with a little less none does."""
    given = ["model=flash", "gpus=64", "max_pipeline=4", "max_tensor=1", *RUN, "headroom=0"]

    def need(memory):
        with pytest.raises(ConfigError) as caught:
            tool.main([*given, f"gpu_memory={memory}"])
        return float(re.search(r"the smallest layout tried needs ([\d.]+) GiB", str(caught.value))[1])

    least = need(20)
    assert need(least / 2) == need(least - 0.1) == least
    assert plans(tool, capsys, *given, f"gpu_memory={least + 0.1}")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("conf/parallelism/auto.yaml", "parallelism=auto exists, and isn't of this program; choose another name"),
        ("conf/parallelism/zero1.yaml", "parallelism=zero1 exists"),
        ("elsewhere/parallelism/zero1.yaml", "parallelism=zero1 exists"),  # Hydra would take the other
        ("conf/parallelism/noext", "it must be <name>.yaml"),
        ("conf/parallelism/3.yaml", "it must be <name>.yaml"),
        ("conf/parallelism/null.yaml", "it must be <name>.yaml"),
        ("conf/parallelism/a b.yaml", "it must be <name>.yaml"),
        ("elsewhere/mine.yaml", "an option lies in a folder .*; for example elsewhere/parallelism/mine.yaml"),
    ],
)
def test_no_file_that_hydra_would_not_find(tool, file, message):
    with pytest.raises(ConfigError, match=f"^write=.*: {message}"):
        tool.main(["gpus=2", "hardware=cpu", *SMALL, f"write='{file}'"])


def test_a_file_of_the_users_own_stays(tool, tmp_path):
    path = tmp_path / "parallelism" / "mine.yaml"
    path.parent.mkdir()
    path.write_text("tensor: 2\n")
    with pytest.raises(ConfigError, match="parallelism=mine exists"):
        tool.main(["gpus=2", "hardware=cpu", *SMALL, f"write={path}"])
    assert path.read_text() == "tensor: 2\n"


def test_plans_of_small_models_take_what_is_fixed(tool, capsys):
    given = ["model=flash_small", "gpus=4", "hardware=cpu", "gpu_memory=4", "train.global_batch_size=8"]
    fixed = ["parallelism.tensor=2", "parallelism.zero_stage=0", "train.recompute=none", "train.micro_batch_size=2"]
    found = plans(tool, capsys, *given, *fixed)
    kept = {
        (p["layout"]["tensor"], p["layout"]["zero_stage"], p["layout"]["recompute"], p["layout"]["rows"]) for p in found
    }
    assert kept == {(2, 0, "none", 2)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=pro", "gpus=8", *RUN], "gpu_memory=80.0: the smallest layout tried needs .* GiB a GPU"),
        (
            ["gpus=5", "max_pipeline=1", *SMALL],
            "gpus=5: no layout of 5 GPUs shares out 8 rows of a step; make train.global_batch_size a multiple",
        ),
        (["gpus=8", "parallelism.data=3"], "parallelism.data=3: it must divide 8 GPUs; for example 1"),
        (
            ["gpus=8", "parallelism.tensor=2", "parallelism.data=8"],
            "parallelism.tensor=2: it must divide 8 GPUs over data 8; for example 1",
        ),
        (["gpus=8", "parallelism.expert=16"], "parallelism.expert=16: it must divide 8 GPUs"),
        (["parallelism=pro", "gpus=64", "gpu_memory=1000"], "parallelism.expert=64: it must divide 64 GPUs"),
        (["parallelism.expert=0"], "parallelism.expert=0: it must be at least 1"),
        (["parallelism.zero_stage=9"], "parallelism.zero_stage=9: ZeRO has stages 0 to 3"),
        (["parallelism.pipeline=2", "parallelism.zero_stage=2"], "parallelism.zero_stage=2: DeepSpeed's pipeline"),
        (["train.attention_mode=foo"], "train.attention_mode=foo: unknown mode; use one of dense"),
        (["device=tpu"], "device=tpu: unknown word; use one of auto, cpu, cuda"),
        (["compile=true", "parallelism.tensor=2"], "compile=True: what is compiled holds no collectives"),
        (["devices.h100.bandwidth=0"], "devices.h100.bandwidth=0.0: it must be above 0"),
        (["devices.h100.flops_bf16=-1"], "devices.h100.flops_bf16=-1.0: it must be above 0"),
        (["hardware=abacus"], "hardware=abacus: there is no such device; use one of h100"),
        (["format=xml"], "format=xml: unknown format"),
        (["gpus=0"], "gpus=0: it must be at least 1"),
        (["efficiency=2"], "efficiency=2.0: it must lie above 0"),
        (["headroom=1"], "headroom=1.0: it must lie in"),
        (["train=3"], "train=3: a group of keys is expected"),
        (["~train.sequence_length"], "train.sequence_length=missing: it has no value"),
        (["~parallelism"], "parallelism=missing: it can't be taken away"),
        (["parallelism=2"], "parallelism=2: there is no such option"),
        (["~assumed.train"], "assumed.train=missing: it has no value"),
        (["~hardware"], "hardware=missing: it can't be taken away"),
        (["modl=flash"], "modl=.*: unknown key"),
    ],
)
def test_what_it_refuses(tool, arguments, message):
    with pytest.raises(ConfigError, match=message):
        tool.main(arguments)
