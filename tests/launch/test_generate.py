"""`launch/generate.py` as a person starts it, on a tiny run."""

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch import generate as program
from tests.distributed.launch import ROOT
from tests.runs import tiny
from v4train.config import load
from v4train.errors import ConfigError
from v4train.model import build_model
from v4train.train.checkpoint import load_model

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

LIMIT = 120  # seconds a program may take
PROMPT = "import textwrap\n"
FIGURES = (
    r"step_00000002: prefill (\d+) tokens, [\d.]+ tokens/s; decode (\d+) tokens, [\d.]+ tokens/s; "
    r"cache (\d+) bytes for (\d+) tokens"
)


def start(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "launch" / name), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=LIMIT)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("generate")


@pytest.fixture(scope="module")
def run(base) -> Path:
    """Two steps, a checkpoint after each, and the trainer's own sample."""
    overrides = tiny(base, "run", "train.max_steps=2", "checkpoint.every=1", "checkpoint.keep=0")
    overrides += ["train.sample_tokens=12", "train.sample_temperature=0.7", "schedule.learning_rate=0.1"]
    result = start("pretrain.py", *overrides, cwd=base)
    assert result.returncode == 0, result.stderr
    return base / "run"


@pytest.fixture
def text(run, capfd):
    """Generate in this process: what stands on stdout."""

    def call(*arguments: str) -> str:
        capfd.readouterr()
        program.main([f"run={run}", "max_new_tokens=12", *arguments])
        return capfd.readouterr().out

    return call


def test_it_writes_the_text_to_stdout_and_the_figures_to_stderr_and_leaves_the_run_alone(run, base):
    before = {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]}
    arguments = ["prompt=import textwrap\\n", "max_new_tokens=12", "temperature=0"]
    result = start("generate.py", f"run={run}", *arguments, cwd=base)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(PROMPT) and len(result.stdout) > len(PROMPT) + 1
    (line,) = result.stderr.splitlines()
    prompt_tokens, decoded, size, length = map(int, re.fullmatch(FIGURES, line).groups())
    model = build_model(load(tiny(base, "run")).model)
    assert (decoded, length) == (11, prompt_tokens + 12)
    assert size == model.new_cache(1, length).nbytes()
    assert before == {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]}


def test_bad_input_is_one_line_and_code_2(run, base):
    result = start("generate.py", f"run={run}", "temperature=hot\n", cwd=base)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: temperature=hot.*; .*\n", result.stderr)


def test_what_it_imports_is_light():
    code = "import sys, launch.generate; print(*{'deepspeed', 'wandb', 'datasets', 'transformers'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert (result.stdout.strip(), result.stderr) == ("", "")


def test_the_same_seed_gives_the_same_text(text):
    sampled = ["prompt=import", "temperature=1"]
    assert text(*sampled) == text(*sampled, "seed=1") != text(*sampled, "seed=2")


def test_the_cache_changes_nothing(text):
    for choice in ("temperature=0", "temperature=1"):
        assert text(f"prompt={PROMPT}", choice) == text(f"prompt={PROMPT}", choice, "use_cache=false")


def test_it_gives_the_sample_that_the_trainer_took_without_a_cache(run, text):
    assert text("prompt=import os\\n", "temperature=0.7", "top_p=1") == (run / "samples.txt").read_bytes().decode()


def test_a_checkpoint_can_be_named(run, text):
    sampled = ["temperature=1", "max_new_tokens=64"]
    last = text(*sampled)
    assert text(f"run={run}/checkpoints/step_00000002", *sampled) == last
    assert text(f"run={run}/checkpoints/step_00000001", *sampled) != last


def test_bfloat16_and_contexts_longer_than_training(text):
    """The run was trained on 96 tokens."""
    assert text("prompt=" + "import os, sys; " * 40, "precision=bf16", "prefill_chunk=50").startswith("import os, sys")


def test_the_weights_are_those_of_the_checkpoint(run):
    path = run / "checkpoints" / "step_00000002"
    loaded = load_model(path)
    expected = build_model(load(tiny(run.parent, "run")).model).eval()
    weights = load_file(path / "weight-00000.safetensors") | load_file(path / "buffers-00000.safetensors")
    expected.load_state_dict(weights)
    ids = torch.arange(40)[None] + 3
    assert not loaded.training and torch.equal(loaded(ids).logits, expected(ids).logits)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


class Terminal(io.StringIO):
    """What a reader has seen, and when: `events` holds flushed texts among what others put there."""

    def __init__(self, events):
        super().__init__()
        self.events, self.shown = events, 0

    def flush(self):
        if new := self.getvalue()[self.shown :]:
            self.events.append(new)
        self.shown = len(self.getvalue())


def test_each_piece_is_shown_before_the_next_token_is_computed(run, monkeypatch):
    events = []

    def computed(model, inputs, output):
        events.append(None)
        output.logits[..., :3] = -100.0  # no token without text, no end
        return output

    def observed(path):
        model = load_model(path)
        model.register_forward_hook(computed)
        return model

    monkeypatch.setattr(program, "load_model", observed)
    monkeypatch.setattr(sys, "stdout", Terminal(events))
    program.main([f"run={run}", f"prompt={PROMPT}", "max_new_tokens=20"])
    assert events[0] == PROMPT and events.count(None) == 20
    between = [len(computations) for computations in "".join("ct"[event is not None] for event in events).split("t")]
    assert max(between) <= 4, events  # a character has at most 4 bytes


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("a=[b, {c}] \"d\" 'e' ${f} ??? null #g", "a=[b, {c}] \"d\" 'e' ${f} ??? null #g"),
        (r"x\ny\tz\\n\d\\", "x\ny\tz\\n\\d\\"),
        ("naïve 東京 🙂", "naïve 東京 🙂"),
        ("", ""),
    ],
)
def test_a_prompt_is_free_text(given, meant):
    assert program.read_arguments(["run=r", f"prompt={given}"])[1] == meant


def test_a_prompt_comes_from_a_file_or_standard_input_unchanged(tmp_path, monkeypatch):
    content = "def é():\n    return '\\n'\n\n"
    (tmp_path / "prompt.txt").write_text(content)
    assert program.read_arguments(["run=r", f"prompt_file={tmp_path / 'prompt.txt'}"])[1] == content
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert program.read_arguments(["run=r", "prompt_file=-"])[1] == content


def test_values_are_typed_and_defaults_come_from_the_configuration():
    config, _ = program.read_arguments(["run=r", "max_new_tokens=7", "top_p=1", "use_cache=false", "device=cpu"])
    assert (config.max_new_tokens, config.top_p, config.use_cache, config.device) == (7, 1.0, False, "cpu")
    assert (config.run, config.seed, config.prompt_file) == ("r", 1, None)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["tempreature=1"], r"tempreature=1: unknown key; did you mean temperature\?"),
        (["nothing.like=it"], "nothing.like=it: unknown key; known keys: run, prompt, "),
        (["import os"], "argument=import os: it is not key=value"),
        (["max_new_tokens=6.5"], "max_new_tokens=6.5: .*Integer"),
        (["max_new_tokens=0"], "max_new_tokens=0: "),
        (["temperature=-1"], "temperature=-1.0: "),
        (["top_p=0"], "top_p=0.0: "),
        (["use_cache=perhaps"], "use_cache=perhaps: "),
        (["device=tpu"], "device=tpu: unknown device; use one of auto, cpu, cuda"),
        (["precision=fp8"], "precision=fp8: unknown precision"),
        (["prompt_file=/nope"], r"prompt_file=/nope: it can't be read \(No such file"),
        (["prompt_file=/dev/null", "prompt=x"], "prompt_file=/dev/null: "),
        (["prompt=\udcff"], "prompt=.*: it is not UTF-8"),
    ],
)
def test_bad_arguments_are_refused_by_key(bad, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        program.read_arguments(["run=r", *bad])


def test_without_a_run_it_says_so():
    with pytest.raises(ConfigError, match="^run=missing"):
        program.read_arguments(["prompt=x"])


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of the run, to harm."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def tear(copy: Path, step: int) -> Path:
    path = copy / "checkpoints" / f"step_{step:08d}"
    (path / "weight-00000.safetensors").write_bytes(b"torn")
    return path


def test_a_torn_checkpoint_is_named_and_the_one_before_is_used(copy, run, text, caplog):
    tear(copy, 2)
    assert text(f"run={copy}", "temperature=1") == text(f"run={run}/checkpoints/step_00000001", "temperature=1")
    assert "step_00000002" in caplog.text


def harm(copy: Path, kind: str) -> Path:
    """What `run=` names after it."""
    if kind == "torn checkpoint":
        return tear(copy, 2)
    if kind == "manifest gone":
        (copy / "checkpoints" / "step_00000001" / "manifest.json").unlink()
        return copy / "checkpoints" / "step_00000001"
    if kind == "all torn":
        tear(copy, 1)
        tear(copy, 2)
    if kind == "no checkpoint":
        shutil.rmtree(copy / "checkpoints")
    if kind == "no tokenizer":
        (copy / "tokenizer.json").unlink()
    return {"no run": copy.parent, "no folder": copy / "nope"}.get(kind, copy)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("torn checkpoint", "the checkpoint is damaged .weight-00000.safetensors does not match"),
        ("manifest gone", "the checkpoint is damaged .manifest.json"),
        ("all torn", "no whole checkpoint lies under"),
        ("no checkpoint", "no whole checkpoint lies under"),
        ("no tokenizer", ".*tokenizer.json is missing"),
        ("no run", "the folder holds no run"),
        ("no folder", "there is no such folder"),
    ],
)
def test_a_run_that_can_not_be_read_is_refused(copy, kind, message, capfd):
    named = harm(copy, kind)
    with pytest.raises(ConfigError, match=f"^run={re.escape(str(named))}: {message}"):
        program.main([f"run={named}"])
    assert capfd.readouterr().out == ""


def test_a_diverged_model_is_an_error_not_a_text(run, monkeypatch):
    def broken(path):
        model = load_model(path)
        model.head.lm_head.weight.data.fill_(torch.nan)
        return model

    monkeypatch.setattr(program, "load_model", broken)
    with pytest.raises(ConfigError, match="^run=.*diverged"):
        program.main([f"run={run}"])


def test_a_cache_beyond_memory_is_refused(run):
    for size in (10**15, 10**30):
        with pytest.raises(ConfigError, match=f"^max_new_tokens={size}: .*does not fit"):
            program.main([f"run={run}", f"max_new_tokens={size}"])


def test_the_manifest_alone_describes_the_model(run, copy):
    """config.yaml is the run's latest command; the checkpoint knows its own."""
    (copy / "config.yaml").write_text((run / "config.yaml").read_text().replace("hidden_size: 32", "hidden_size: 64"))
    path = copy / "checkpoints" / "step_00000002"
    assert load_model(path).config.hidden_size == 32
