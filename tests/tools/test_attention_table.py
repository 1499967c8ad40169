"""`tools/attention_table.py`: its formulas are the cache's, its caches are in the state of a real prefill."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import random_model, random_tokens, tiny_config
from tests.runs import tiny
from v4train.analysis.kv_cache import cache_bytes, cache_bytes_per_token
from v4train.analysis.parameters import parameter_counts
from v4train.config import load
from v4train.errors import ConfigError
from v4train.model import model_config
from v4train.model.attention.cache import BlockTail

SPEC = importlib.util.find_spec("tools.attention_table")
WORDS = ["mha", "mqa", "gqa", "gqa:window=5", "gqa:window=5:dilation=3", "mha:window=4:global_tokens=3", "mla"]
WORDS += ["mla:window=6:dilation=2:global_tokens=4", "dsa", "swa", "csa", "hca", "csa:window=3"]
DOCS = Path(__file__).parents[2] / "docs"
every_word = pytest.mark.parametrize("word", WORDS)


@pytest.fixture
def tool():
    module = importlib.util.module_from_spec(SPEC)
    SPEC.loader.exec_module(module)
    return module


@every_word
def test_printed_formulas(tool, word):
    config = tool.single(tiny_config(), word)
    layer = config.layers[0]
    per_token, once = (
        eval(text.replace("·", "*"), tool.symbols(config, layer))  # noqa: S307
        for text in tool.formula(layer)
    )
    assert 4 * per_token == cache_bytes_per_token(config, layer, 4) == tool.measured_bytes_per_token(config)
    for length in (64, 160):  # whole blocks, beyond every window
        assert (
            4 * (per_token * length + once) == cache_bytes(config, 1, length, 4) == tool.measured_bytes(config, length)
        )


def states(cache):
    """Everything of a layer's cache but the contents."""
    sizes = {
        name: (buffer.blocks, buffer.count) if isinstance(buffer, BlockTail) else buffer.length
        for name, buffer in cache.buffers.items()
    }
    return cache.length, sizes


@every_word
@pytest.mark.parametrize("length", [0, 1, 3, 4, 17, 50])
def test_set_length_is_the_state_after_a_prefill(tool, word, length):
    config = tool.single(tiny_config(), word)
    model = random_model(config).eval()
    filled, real = model.new_cache(2, 60), model.new_cache(2, 60)
    if length:
        model(random_tokens(2, length), cache=real)
    tool.set_length(filled.layers[0], length)
    assert states(filled.layers[0]) == states(real.layers[0])


def test_decoding_ends_at_the_context(tool):
    decoder = tool.Decoder(tool.single(tiny_config(), "csa"), [1, 9, 64])
    for context, cache in decoder.caches.items():
        assert decoder.seconds(context, 8) > 0
        assert states(cache)[0] == context
        assert cache["entries"].length == context // 4


def parsed(lines):
    """Cells of the rows of a Markdown table."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_it_prints_a_row_a_kind(tool, tmp_path, capsys):
    tool.main([*tiny(tmp_path, "none"), "contexts=16,200", "steps=2"])
    before, head, line, *rows, _, legend = capsys.readouterr().out.splitlines()[1:]
    assert before == "" and head.startswith("| kind |") and line == "|---" * 10 + "|"
    cells = parsed(rows)
    kinds = ["mha", "mqa", "gqa", "gqa:window=16", "gqa:window=16:dilation=4", "gqa:window=16:global_tokens=4"]
    assert [row[0].strip("`") for row in cells] == [*kinds, "mla", "dsa", "swa", "csa", "hca"]
    assert all(len(row) == 10 for row in cells)
    assert not any("formula" in cell for row in cells for cell in row)  # it never differs from what was measured
    assert cells[0][7] == "1.00 / 1.00"
    assert cells[0][3] == "2,048" and cells[3][3:5] == [
        "0",
        "8 / 8",
    ]  # flash_small's heads: 8 (2) x 32, keys and values
    assert "m=4 in csa and 16 in hca" in legend
    for row in cells:
        assert (DOCS / row[9].partition("(")[2].rstrip(")")).resolve().is_file()


def test_the_documented_table_is_up_to_date(tool):
    """All but its times."""
    config = model_config(load([]).model)
    contexts = [int(context) for context in tool.OWN["contexts"].split(",")]
    documented = parsed(line for line in (DOCS / "attention.md").read_text().splitlines() if line.startswith("| `"))
    expected = [[f"`{row.word}`", *tool.costs(tool.single(config, row.word), contexts)] for row in tool.rows(config)]
    assert [cells[:6] for cells in documented if len(cells) == 10] == expected


@pytest.mark.parametrize(
    "name",
    ["flash", "pro", "v3", "v32", "gpt_oss", "flash_small", "v3_small", "v32_small", "gpt_oss_small", "dense_small"],
)
def test_documented_parameter_counts(name):
    counts = parameter_counts(model_config(load([f"model={name}"]).model))
    unit, letter = (1e6, "M") if name.endswith("_small") else (1e9, "B")
    lines = (DOCS / "attention.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith((f"| `{name}`", f"| `{name.removesuffix('_small')}`")))
    assert ", ".join(f"{count / unit:,.2f} {letter}" for count in counts) in row


def test_a_difference_is_shown(tool):
    assert tool.agreed([1.0, 2.0], [1.0, 2.0]) == "1 / 2"
    assert tool.agreed([1.0, 2.0], [1.0, 3.5]) == "1 / 3.5 (formula: 1 / 2)"


@pytest.mark.parametrize("argument", ["contexts=", "contexts=1024,x", "contexts=0", "steps=-1", "model.hidden_sizes=3"])
def test_bad_arguments_end_in_one_line(tool, argument):
    with pytest.raises(ConfigError, match=f"^{argument.partition('=')[0]}="):
        tool.main([argument])


def test_exit_code():
    command = [sys.executable, SPEC.origin, "contexts=many"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: contexts=many: it must be whole numbers above 0; write e.g. contexts=1024,8192,65536"
    ]
