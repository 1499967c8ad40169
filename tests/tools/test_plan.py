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


@pytest.mark.parametrize(
    ("arguments", "layout"),
    [
        # V4.md 5: 256 GB300 for Pro; 32 GPUs of GB200's size for Flash
        (["model=pro", "gpus=256", "gpu_memory=288", "hardware=gb300"], {"pipeline": 4, "expert": 64}),
        (["model=flash", "gpus=32", "gpu_memory=186", "hardware=gb300"], {"pipeline": 4, "expert": 8}),
    ],
)
def test_published_layouts_are_among_them(tool, capsys, arguments, layout):
    found = plans(tool, capsys, *arguments, *RUN, *(f"parallelism.{axis}={size}" for axis, size in layout.items()))
    assert all(plan["layout"][axis] == size for plan in found for axis, size in layout.items())
    assert {plan["layout"]["recompute"] for plan in found} >= {"block"}


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
        (["gpus=5", "max_pipeline=1"], "gpus=5: no layout of 5 GPUs shares out 4 rows of a step"),
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
