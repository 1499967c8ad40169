"""`tools/plan.py`: layouts that fit, best first; the file it writes is one that a run takes."""

import importlib.util
import json
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
    path = tmp_path / "mine.yaml"
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
    path = tmp_path / "mine.yaml"
    tool.main(["model=flash", "gpus=256", *RUN, "max_pipeline=8", "max_tensor=1", f"write={path}"])
    table, text = capsys.readouterr().out, path.read_text()
    assert "flash on 256 x h100" in table
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert values.pop("defaults") == ["auto", "_self_"]
    base = OmegaConf.to_container(OmegaConf.load(config_dir() / "parallelism" / "auto.yaml"))
    sizes = check_layout(ParallelismConfig(**(base | values)), 256)
    assert sizes.world == 256
    command = next(line for line in text.splitlines() if "launch/pretrain.py" in line)
    overrides = command.partition("launch/pretrain.py ")[2].split()
    assert "parallelism=mine" in overrides and "model=flash" in overrides
    composed("pretrain", [word for word in overrides if not word.startswith("parallelism=")])


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
        (["modl=flash"], "modl=.*: unknown key"),
    ],
)
def test_what_it_refuses(tool, arguments, message):
    with pytest.raises(ConfigError, match=message):
        tool.main(arguments)
