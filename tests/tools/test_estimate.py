"""`tools/estimate.py`: the published claims from the command line, without PyTorch; what it refuses."""

import importlib.util
import json
import re
import resource
import subprocess
import sys

import pytest

from v4train.analysis.flops import training_flops_per_token
from v4train.analysis.memory import GIB, peak_memory
from v4train.errors import ConfigError
from v4train.estimation import read_works
from v4train.model.config import model_config
from v4train.overrides import complete, composed, config_dir

COMPARE = ["estimate.compare=[v32,flash,pro]", "estimate.context=1048576"]
SPEC = importlib.util.find_spec("tools.estimate")


@pytest.fixture
def tool():
    module = importlib.util.module_from_spec(SPEC)
    sys.modules[SPEC.name] = module  # dataclasses look their module up
    SPEC.loader.exec_module(module)
    yield module
    del sys.modules[SPEC.name]


def printed(tool, capsys, *arguments):
    tool.main(list(arguments))
    return capsys.readouterr().out


def test_the_headline_without_pytorch():
    """As a user runs it: the four ratios to a tenth of a point, less than 3 s of computing, no PyTorch imported."""
    program = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__');"
    program += "print(*(name for name in ('torch', 'deepspeed') if name in sys.modules), file=sys.stderr)"
    command = [sys.executable, "-c", program, "tools/estimate.py", *COMPARE, "estimate.format=json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr.strip() == ""
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    models = json.loads(done.stdout)["models"]
    assert list(models) == ["v32", "flash", "pro"] and models["v32"]["flops_ratio"] == models["v32"]["kv_ratio"] == 1
    assert models["pro"]["flops_ratio"] == pytest.approx(0.267, abs=1e-3)
    assert models["flash"]["flops_ratio"] == pytest.approx(0.101, abs=1e-3)
    assert models["pro"]["kv_ratio"] == pytest.approx(0.105, abs=1e-3)
    assert models["flash"]["kv_ratio"] == pytest.approx(0.073, abs=1e-3)
    counts = {name: (of["parameters"]["total"], of["parameters"]["active"]) for name, of in models.items()}
    assert counts["flash"] == (pytest.approx(284.33e9, rel=1e-4), pytest.approx(13.27e9, rel=1e-4))
    assert counts["pro"] == (pytest.approx(1.573e12, rel=1e-4), pytest.approx(48.85e9, rel=1e-4))


def test_the_table_says_what_it_assumes(tool, capsys):
    text = printed(tool, capsys, *COMPARE)
    for figure in ("26.74%", "10.10%", "10.49%", "7.33%", "1,048,576"):
        assert figure in text
    assert "x0.5: index_csa" in text and "no elementwise work" in text


def test_one_model_on_its_layout(tool, capsys):
    arguments = ["model=pro", "parallelism=pro", "train.global_batch_size=1024", "train.sequence_length=4096"]
    result = json.loads(printed(tool, capsys, *arguments, "estimate.format=json"))
    layout = result["layout"]
    assert (layout["ranks"], layout["pipeline"], layout["expert"]) == (512, 8, 64)
    assert layout["tokens_per_step"] == 1024 * 4096
    assert sum(result["training_flops_by_part"].values()) == pytest.approx(result["training_flops_per_token"])
    memory = result["memory_gib"]
    assert memory.pop("total") == pytest.approx(sum(memory.values()))
    assert 0 < result["bubble"] < 1 and result["traffic_gib"]["expert"] > 0
    text = printed(tool, capsys, *arguments)
    assert "512 ranks: pipeline 8, data 64" in text and "GiB of the fullest rank" in text


def test_ranks_of_a_layout(tool, capsys):
    given = ["parallelism=tensor", "estimate.ranks=4", "estimate.format=json"]
    layout = json.loads(printed(tool, capsys, *given))["layout"]
    assert (layout["ranks"], layout["tensor"], layout["data"]) == (4, 2, 2)


def test_the_attention_mode(tool, capsys):
    """What a dry run of the same says; the trunk's products once instead of three times."""
    found = {}
    for mode in ("sparse", "indexer_warmup", "dense"):
        given = [f"train.attention_mode={mode}", "train.sequence_length=2048", "estimate.format=json"]
        found[mode] = json.loads(printed(tool, capsys, *given))
        model = model_config(composed("pretrain", []).model)
        per_token, parts = found[mode]["training_flops_per_token"], found[mode]["training_flops_by_part"]
        assert per_token == training_flops_per_token(model, 2048, mode) == pytest.approx(sum(parts.values()))
        assert found[mode]["layout"]["mode"] == mode
    sparse, warmup, dense = (of["training_flops_by_part"] for of in found.values())
    assert sparse["ffn"] == dense["ffn"] == 3 * warmup["ffn"]
    assert sparse["indexers"] == warmup["indexers"] > dense["indexers"] == 0


def test_stages_are_those_that_a_run_cuts_once(tool, capsys):
    """For the rows of the last phase, not for those of the phase that needs most."""
    phases = [f"+schedule.phases.{number}.micro_batch_size=1" for number in (1, 2)]
    given = ["schedule=v4_small", "parallelism=pipeline", *phases, "schedule.phases.2.sequence_length=128"]
    layout = json.loads(printed(tool, capsys, *given, "schedule.phases.2.tokens=2048", "estimate.format=json"))[
        "layout"
    ]
    assert layout["sequence_length"] > layout["stage_length"] == 128


@pytest.mark.parametrize("name", ["v4_flash", "v4_pro"])
def test_the_memory_in_the_head_of_a_schedule(name):
    """Of the command there, in the last phase and in the first."""
    text = (config_dir() / "schedule" / f"{name}.yaml").read_text().replace("\\\n#", "").replace("\n# ", " ")
    ranks, words = re.search(r"ntasks=(\d+) .* launch/pretrain.py (.*)", text).groups()
    overrides = words.split()
    config = composed("pretrain", overrides)
    complete(config, overrides)
    model = model_config(config.model)
    works = read_works(config, model, int(ranks))
    found = [round(peak_memory(model, work).total / GIB) for work in (works[-1], works[0])]
    assert found == [int(size) for size in re.search(r"(\d+) GiB a rank .*and (\d+) at 4K", text).groups()]


def test_the_phase_that_needs_most(tool, capsys):
    """v4_small's rows of 512 tokens, not the last phase's micro-batches of one."""
    given = ["model=flash_small", "schedule=v4_small", "+schedule.phases.2.micro_batch_size=1", "estimate.format=json"]
    layout = json.loads(printed(tool, capsys, *given))["layout"]
    assert (layout["sequence_length"], layout["rows"], layout["accumulation"]) == (512, 4, 1)


def test_json_has_the_curve_and_every_precision(tool, capsys):
    result = json.loads(printed(tool, capsys, "model=flash", "estimate.context=4096", "estimate.format=json"))
    assert [point["context"] for point in result["curve"]] == [2**power for power in range(12, 21)]
    first = result["curve"][0]
    assert first["decode_flops"] == result["decode_flops"] and first["kv_bytes"] == result["kv_bytes"]["deployed"]
    assert first["decode_fp8_flops"] == result["decode_fp8_flops"]
    growth = result["kv_bytes_per_token"]
    assert growth["fp32"] == 2 * growth["bf16"] > 2 * growth["deployed"]
    counts = result["parameters"]
    assert counts["total_with_mtp"] - counts["total"] == counts["by_part"]["mtp"]


def test_parts_of_compared_models_can_be_chosen(tool, capsys):
    given = ["estimate.compare=[v32_small,flash_small]", "estimate.format=json"]
    plain = [*given, "model/residual=plain"]
    counts = [
        json.loads(printed(tool, capsys, *words))["models"]["flash_small"]["parameters"] for words in (given, plain)
    ]
    assert "residual" in counts[0]["by_part"] and "residual" not in counts[1]["by_part"]


def test_the_plot(tool, capsys, tmp_path):
    printed(tool, capsys, "estimate.compare=[v32_small,flash_small]", f"estimate.plot={tmp_path / 'curves.png'}")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["estimate.format=xml"], "estimate.format=xml: unknown format"),
        (["estimate.context=0"], "estimate.context=0: it must be at least 1"),
        (["estimate.contxt=8"], "estimate.contxt=.*: unknown key; did you mean estimate.context"),
        (["estimate.precisions.ffn=int3"], "estimate.precisions.ffn=int3: unknown precision"),
        (["estimate.compare=pro"], "estimate.compare=pro: a list of models"),
        (["estimate.compare=[pro,nothing]"], "model=nothing: there is no such option"),
        (
            ["estimate.compare=[pro,pro]"],
            "estimate.compare=.*: each is an option of the group model, and stands there once",
        ),
        (["estimate.compare=[attention/v3]"], "estimate.compare=.*: each is an option of the group model"),
        (["estimate.plot=/proc/no/curves.png"], "estimate.plot=/proc/no/curves.png: it can't be written"),
        (["estimate.compare=[v32,3]"], "model=3: there is no such option"),
        (["parallelism=null"], "parallelism=null: there is no such option"),
        (["~parallelism"], "parallelism=missing: it can't be taken away; choose one of auto"),
        (["estimate.compare=[pro]", "model=flash"], "model=flash: estimate.compare names the models"),
        (["parallelism.tensor=3"], "parallelism.tensor=3: .* must be a multiple of it"),
        (["train.attention_mode=foo"], "train.attention_mode=foo: unknown mode; use one of dense"),
        (["model=dense_small", "train.attention_mode=indexer_warmup"], "train.attention_mode=.*: no layer of gqa"),
        (["device=tpu"], "device=tpu: unknown word; use one of auto, cpu, cuda"),
        (["compile=true", "parallelism.tensor=2"], "compile=True: what is compiled holds no collectives"),
        (["train.recompute=all"], "train.recompute=all: unknown level"),
        (["train.global_batch_size=0"], "train.global_batch_size=0: it must be at least 1"),
        (["estimate.rates.fp8=-1"], "estimate.rates.fp8=-1.0: it must be above 0"),
        (["estimate.plot=x.txt"], "estimate.plot=x.txt: unknown kind of file; use one of .png"),
        (["estimate.compare=[pro]", "estimate.ranks=4"], "estimate.ranks=4: estimate.compare looks at models"),
        (["estimate.compare=[pro]", "parallelism=pro"], "parallelism=pro: estimate.compare looks at models"),
        (["parallelism.expert=0"], "parallelism.expert=0: it must be at least 1"),
        (["parallelism.tensor=0"], "parallelism.tensor=0: it must be at least 1"),
        (["parallelism.zero_stage=9"], "parallelism.zero_stage=9: ZeRO has stages 0 to 3"),
        (
            ["+parallelism.deepspeed.zero_optimization.reduce_bucket_size=abc"],
            "reduce_bucket_size=abc: it must be a number of elements",
        ),
        (["schedule=v4_small", "train.sequence_length=64"], "train.sequence_length=.*: the phases of this schedule"),
        (["parallelism=zero1", "estimate.ranks=3"], "train.global_batch_size=4: it must be a multiple of"),
    ],
)
def test_what_it_refuses(tool, arguments, message):
    with pytest.raises(ConfigError, match=message):
        tool.main(arguments)
