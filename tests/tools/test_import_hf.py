"""`tools/import_hf.py`: pretraining goes on from a directory with the loss that transformers computes."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Indexer

from tests.parity.peers import lower_index_wins_ties
from tests.runs import losses, tiny
from tests.untrained import LLAMA, V3, untrained_run
from tools import export_hf, import_hf
from v4train.config import settings
from v4train.data import BatchConfig, Loader, load_data
from v4train.errors import ConfigError
from v4train.train.checkpoint import Reader, load_model, newest, read_manifest
from v4train.train.run_directory import find_checkpoint

pytestmark = pytest.mark.parity

ROOT = Path(__file__).parents[2]
OF_MODEL = re.compile(r"model[./]|model=|run\.")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("import")


def training(base: Path) -> list[str]:
    """What `tests.runs.tiny` says of data and training, and nothing of the model."""
    return [override for override in tiny(base, "none") if not OF_MODEL.match(override)]


@pytest.fixture(scope="module")
def directory(base):
    """An exported model, made when first asked for."""
    runs = {
        "v3": [*V3, "model.mtp.num_layers=0"],
        "llama": [*LLAMA, "model.tie_embedding=true"],
        "flash": ["model.mtp.num_layers=0"],
    }

    def get(name: str) -> Path:
        out = base / "exported" / name
        if not out.exists():
            run = untrained_run(base, name, *runs[name])
            export_hf.main([f"run={run}", f"out={out}"])
        return out

    return get


def launch(command: list[str], cwd: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def loss_by_transformers(folder: Path, run: Path) -> float:
    """Of the first step of `run`: each document of its rows alone, as transformers knows no packed rows."""
    checked = settings(OmegaConf.create(read_manifest(newest(run / "checkpoints"))["state"]["config"]))
    tokenizer, data = load_data(checked.data, checked.tokenizer, checked.train.validation_tokens)
    sizes = BatchConfig(checked.train.global_batch_size, checked.train.global_batch_size, 0, 1)
    loader = Loader(data, checked.data, tokenizer, checked.train.sequence_length, sizes, checked.seed)
    (batch,) = loader.next_step()
    loader.close()
    peer, total, count = AutoModelForCausalLM.from_pretrained(folder), 0.0, 0
    with torch.no_grad():
        for row in zip(batch.input_ids, batch.document_ids, batch.targets, strict=True):
            for document in set(row[1].tolist()) - {-1}:
                ids, targets = (x[row[1] == document] for x in (row[0], row[2]))
                logits = peer(ids[None]).logits[0]
                total += F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
                count += int((targets != -100).sum())
    return total / count


@pytest.mark.distributed
@pytest.mark.slow
def test_pretraining_goes_on_from_an_exported_run(base, monkeypatch, capsys):
    """A trained run, exported, imported and trained on by the command that the import prints."""
    lower_index_wins_ties(monkeypatch, DeepseekV4Indexer)
    monkeypatch.chdir(base)
    pretrain = str(ROOT / "launch" / "pretrain.py")
    launch([sys.executable, pretrain, *tiny(base, "first", "train.max_steps=2", "model.vocab_size=384")], base)
    export_hf.main(["run=first", "out=given"])
    capsys.readouterr()
    import_hf.main(["model=given", "out=an imported/model", *training(base)])
    *_, command = capsys.readouterr().out.splitlines()
    torchrun, program, *arguments = shlex.split(command)
    assert (torchrun, program) == ("torchrun", "launch/pretrain.py")
    launch([sys.executable, pretrain, *arguments, "train.stop_at_step=2", "run.dir=second"], base)
    before, expected = losses(base, "first", "lm_loss"), loss_by_transformers(base / "given", base / "second")
    after = losses(base, "second", "lm_loss")
    assert len(after) == 2 and after[0] == pytest.approx(expected, abs=1e-5) and after[0] < before[0] - 0.01
    log = (base / "second" / "log.txt").read_text()
    assert "an imported/model/checkpoints/step_00000000" in log


@pytest.mark.parametrize("name", ["v3", "llama", "flash"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_checkpoint_holds_the_weights_and_a_fresh_optimizer(name, optimizer, directory, base):
    out = base / "imported" / f"{name}-{optimizer}"
    import_hf.main([f"model={directory(name)}", f"out={out}", *training(base), f"optimizer={optimizer}"])
    source = load_model(newest(base / name / "checkpoints"))
    run, path = find_checkpoint(str(out))
    reader, weights = Reader(path), dict(source.named_parameters())
    assert reader.weights().keys() == weights.keys() and reader.manifest["step"] == 0
    for parameter, weight in weights.items():
        state = reader.parameter(parameter)
        assert torch.equal(state.pop("weight"), weight)
        muon = optimizer == "muon" and weight.ndim > 1 and not re.search("embedding|lm_head|bias$", parameter)
        assert state.keys() == ({"momentum_buffer"} if muon else {"exp_avg", "exp_avg_sq", "step"}), parameter
        assert all(tensor.shape == weight.shape for key, tensor in state.items() if key != "step")
        assert not any(tensor.any() for tensor in state.values())
    for buffer, tensor in source.named_buffers():
        assert torch.equal(reader.buffers()[buffer], tensor)
    assert (run.path / "tokenizer.json").read_bytes() == (directory(name) / "tokenizer.json").read_bytes()


def test_an_imported_model_exports_to_the_same_files(directory, base):
    out = base / "imported" / "again"
    import_hf.main([f"model={directory('v3')}", f"out={out}", *training(base)])
    export_hf.main([f"run={out}", f"out={base / 'again'}"])
    first, second = (load_file(folder / "model.safetensors") for folder in (directory("v3"), base / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (base / "again" / name).read_bytes() == (directory("v3") / name).read_bytes()


def test_a_new_mtp_block_may_be_added(directory, base, capsys):
    out = base / "imported" / "mtp"
    import_hf.main([f"model={directory('v3')}", f"out={out}", *training(base), "model.mtp.num_layers=1"])
    new = int(re.search(r"([\d,]+) of them new", capsys.readouterr().out)[1].replace(",", ""))
    model = load_model(newest(out / "checkpoints"))
    assert new == sum(p.numel() for name, p in model.named_parameters() if name.startswith("mtp.")) > 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["out=o"], "model=missing"),
        (["model=here"], "out=: a folder to write"),
        (["model=nothing", "out=o"], "model=nothing: the folder holds no config.json"),
        (["model=gpt2", "out=o"], "model=gpt2: the folder holds no tokenizer.json"),
        (["model=gpt2", "out=o", "tokenizer.path=gpt2/t.json"], "model_type=gpt2: known architectures: llama"),
        (["model=here", "out=full"], "out=full: the folder is not empty"),
        (
            ["model=here", "out=o", "trian.max_steps=3"],
            r"trian.max_steps=\?: unknown key; did you mean train.max_steps",
        ),
        (["model=here", "out=o", "model.hidden_size=64"], r".*=\[.*32\].*: the directory has .*64"),
        (["model=here", "out=o", "model.num_layers=2"], "model.attention_mix=.*: it lists 3 layers"),
        (["model=here", "out=o", "data.path=nowhere"], "data.path=nowhere: "),
    ],
)
def test_bad_input_is_refused_by_key_and_leaves_nothing(bad, message, directory, base, tmp_path, monkeypatch):
    (tmp_path / "here").symlink_to(directory("llama"))
    for name, content in {"full/x": "", "gpt2/config.json": json.dumps({"model_type": "gpt2"})}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"^{message}"):
        import_hf.main([bad[0], *bad[1:2], *(training(base) if "model=here" in bad else []), *bad[2:]])
    assert {path.name for path in tmp_path.iterdir()} == {"here", "full", "gpt2"}
