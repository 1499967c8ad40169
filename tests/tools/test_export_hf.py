"""`tools/export_hf.py`: what transformers loads from the directory is the run's model, or there is no directory."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Indexer
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer

from tests.models import random_model, random_tokens, tiny_config
from tests.parity.peers import DENSE, PLAIN, lower_index_wins_ties
from tests.untrained import GPT_OSS, LLAMA, V3, V32, untrained_run
from tools import export_hf as program
from v4train.data import Tokenizer
from v4train.errors import ConfigError
from v4train.generation import GenerationConfig, generate
from v4train.hf import export as export_module
from v4train.hf import to_hf
from v4train.hf.compare import compare
from v4train.train.checkpoint import load_model, manifest_bytes, read_manifest
from v4train.train.run_directory import find_checkpoint

pytestmark = pytest.mark.parity

ROOT = Path(__file__).parents[2]
WARM = ["train.attention_mode=indexer_warmup"]
RUNS = {
    "flash": ("deepseek_v4", []),
    "v3": ("deepseek_v3", V3),
    "v32": ("deepseek_v32", V32),
    "gpt_oss": ("gpt_oss", GPT_OSS),
    "llama": ("llama", LLAMA),
    "tied": ("llama", [*LLAMA, "model.tie_embedding=true"]),
    "mistral": ("mistral", [*LLAMA, "model.attention.gqa.window=16"]),
    "qwen3": ("qwen3", [*LLAMA, "model.attention.gqa.qk_norm=true"]),
    "dense": ("deepseek_v4", ["train.attention_mode=dense"]),
    "warm": ("deepseek_v32", [*V32, *WARM]),
    "odd widths": ("deepseek_v4", ["model.moe.intermediate_size=15"]),
}
TEXTS = ["def wrap(text):\n    return text\n", "naïve 東京 🙂\t\r\n  x", "<eos> and <bos> are names here"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def exported(base):
    """The run and what was exported from it, made when first asked for."""

    def get(name: str) -> tuple[Path, Path]:
        out = base / "out" / name
        if not out.exists():
            untrained_run(base, name.replace(" ", "_"), *RUNS[name][1])
            program.main([f"run={base / name.replace(' ', '_')}", f"out={out}"])
        return base / name.replace(" ", "_"), out

    return get


def ours_of(run: Path):
    directory, path = find_checkpoint(str(run))
    return load_model(path), Tokenizer.load(directory.tokenizer)


SAMPLE = ("flash", "v32", "gpt_oss", "llama")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.exhaustive) for name in RUNS]
)
def test_transformers_loads_the_model_and_computes_and_writes_the_same(name, exported, monkeypatch):
    run, out = exported(name)
    for indexer in (DeepseekV4Indexer, DeepseekV32Indexer):
        lower_index_wins_ties(monkeypatch, indexer)
    model, tokenizer = ours_of(run)
    peer = AutoModelForCausalLM.from_pretrained(out)
    assert peer.config.model_type == RUNS[name][0] and peer.dtype == torch.float32
    tokens = random_tokens(2, 90, 320)
    with torch.no_grad():
        torch.testing.assert_close(peer(tokens).logits, model(tokens).logits, atol=2e-5, rtol=0)
    inputs = AutoTokenizer.from_pretrained(out)(TEXTS[0], return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    written = peer.generate(**inputs, max_new_tokens=20)[0, length:].tolist()
    prompt = [tokenizer.bos_id, *tokenizer.encode(TEXTS[0]).tolist()]
    options = GenerationConfig(max_new_tokens=20, temperature=0, top_p=1, seed=0, prefill_chunk=512)
    ids = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
    steps = generate(model, [prompt], options, **ids, cache=model.new_cache(1, length + 20))
    assert written == [token for (token,) in steps]


@pytest.mark.parametrize("name", ["flash", "qwen3", "mistral"])  # the classes that transformers would choose differ
def test_the_tokenizer_is_the_run_s(name, exported):
    run, out = exported(name)
    _, ours = ours_of(run)
    theirs = AutoTokenizer.from_pretrained(out)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == [ours.bos_id, *ours.encode(text)]
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text).tolist()
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.convert_tokens_to_ids(["<bos>", "<eos>", "<pad>"]) == [ours.bos_id, ours.eos_id, ours.pad_id]
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<bos>", "<eos>", "<pad>")
    assert theirs.model_max_length == 96  # what it was trained on
    assert theirs("a<fim_hole>b", split_special_tokens=False)["input_ids"][2] == ours.fim_ids.hole


def test_another_s_tokenizer_comes_out_as_the_run_used_it(exported, tmp_path):
    """One token for BOS, EOS and PAD, as GPT-2 has, a role that isn't marked special, as in DeepSeek's, truncation."""
    run, _ = exported("llama")
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    content = json.loads((copy / "tokenizer.json").read_text())
    content["added_tokens"] = [
        {**content["added_tokens"][i], "content": name, "special": i == 0}
        for i, name in enumerate(["<|endoftext|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"])
    ]
    content["model"]["vocab"] = {
        {
            "<bos>": "<|endoftext|>",
            "<eos>": "<|fim_prefix|>",
            "<pad>": "<|fim_suffix|>",
            "<fim_begin>": "<|fim_middle|>",
        }.get(token, token): i
        for token, i in content["model"]["vocab"].items()
    }
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (copy / "tokenizer.json").write_text(json.dumps(content))
    program.main([f"run={copy}", f"out={tmp_path / 'out'}"])
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), Tokenizer.load(copy / "tokenizer.json")
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<|endoftext|>",) * 3
    text = "some text <|fim_suffix|> and more"
    assert theirs(text)["input_ids"] == [0, *ours.encode(text)] and len(ours.encode(text)) > 12


def test_configuration_and_card_say_what_it_is(exported):
    _, out = exported("flash")
    for name in ("config.json", "generation_config.json"):
        ids = json.loads((out / name).read_text())
        assert [ids[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [0, 1, 2]
    card = (out / "README.md").read_text()
    for words in (
        "library_name: transformers",
        "`swa csa hca`",
        "| tokens | 2,688 |",
        "text: 2,600 tokens (`corpus`)",
        "| validation loss, nats/token, at step 7 | 5.4321 |",
        "| parameters | 96,283, of which",
        "multi-token-prediction block stays behind",
        "No licence",
    ):
        assert words in card, words
    assert str(out.parent.parent) not in "".join(path.read_text() for path in out.glob("*.[jm]*[nd]"))


def test_ids_without_text_are_never_generated(base):
    """The corpus fills fewer entries than the model embeds."""
    run = untrained_run(base, "roomy", *LLAMA, "model.vocab_size=2000")
    out = base / "out" / "roomy"
    program.main([f"run={run}", f"out={out}"])
    suppressed = json.loads((out / "generation_config.json").read_text())["suppress_tokens"]
    assert suppressed == list(range(Tokenizer.load(run / "tokenizer.json").vocab_size, 2000)) != []


def test_shards_and_bf16_hold_the_same_model(exported, tmp_path, capsys):
    run, whole = exported("flash")
    out = tmp_path / "new" / "out"
    out.mkdir(parents=True)  # empty: it may be there
    program.main([f"run={run}", f"out={out}", "dtype=bf16", "max_shard_size=50KB"])
    assert re.search(r"\d safetensors files", capsys.readouterr().out)
    assert len(list(out.glob("*.safetensors"))) > 3 and (out / "model.safetensors.index.json").is_file()
    peer, full = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, whole))
    assert peer.dtype == torch.bfloat16
    for (name, half), exact in zip(peer.state_dict().items(), full.state_dict().values(), strict=True):
        assert torch.equal(half, exact.to(half.dtype))
        assert half.dtype != torch.bfloat16 or not re.search(r"norm|sinks|_hc\.|e_score", name), name


def test_dense_attention_is_exported_as_such(exported):
    _, out = exported("dense")
    config = json.loads((out / "config.json").read_text())
    assert config["index_topk"] == config["max_position_embeddings"] // 4
    assert "`index_topk` holds them all" in (out / "README.md").read_text()
    assert json.loads((exported("flash")[1] / "config.json").read_text())["index_topk"] == 5


def test_any_layout_s_checkpoint_gives_the_same_files(exported, tmp_path):
    """Two ranks of a pipeline have written it."""
    run, out = exported("flash")
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    step = copy / "checkpoints" / "step_00000007"
    manifest = read_manifest(step)
    for kind in ("weight", "buffers"):
        tensors = load_file(step / f"{kind}-00000.safetensors")
        for rank in range(2):
            path = step / f"{kind}-{rank:05d}.safetensors"
            save_file({name: tensors[name] for name in sorted(tensors)[rank::2]}, path)
            manifest["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (step / "manifest.json").write_bytes(manifest_bytes(manifest))
    program.main([f"run={step}", f"out={tmp_path / 'out'}"])
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes()


CASES = {
    "swa csa hca": {},
    "dsa dsa": PLAIN | {"moe__scoring": "sigmoid", "moe__swiglu_limit": None},
    "gqa gqa": DENSE,
}


@pytest.mark.parametrize("mix", CASES)
def test_the_comparison_notices_any_tensor_that_differs(mix):
    model = random_model(tiny_config(mix, **CASES[mix]), seed=1).eval()
    peer, tokens = to_hf(model), random_tokens(2, 50)
    found = compare(model, peer, tokens)
    assert found.alike == found.choices and found.difference < found.bound
    generator = torch.Generator().manual_seed(0)
    for name, tensor in peer.state_dict().items():
        before = tensor.clone()
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(tensor + noise if tensor.is_floating_point() else (tensor + 1) % 8)
        with pytest.raises(ConfigError, match="^logits=different"):
            compare(model, peer, tokens)
            pytest.fail(name)
        tensor.copy_(before)


def test_the_comparison_bears_ties():
    """An indexer that scores all entries equally: transformers' choice is as good as ours, and ours is used."""
    model = random_model(tiny_config("swa csa csa"), seed=1).eval()
    for block in model.blocks[1:]:
        block.attention.indexer.head_weight.weight.data.zero_()
    found = compare(model, to_hf(model), random_tokens(2, 75))
    assert found.alike == found.choices > 0


BROKEN = {"interrupted": KeyboardInterrupt, "refused": ConfigError("logits", "different", "so", "so")}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_fails_leaves_nothing(kind, exported, tmp_path, monkeypatch):
    def fail(*_):
        assert list(tmp_path.iterdir())  # all is written
        raise BROKEN[kind]

    monkeypatch.setattr(export_module, "compare", fail)
    with pytest.raises((KeyboardInterrupt, ConfigError)):
        program.main([f"run={exported('llama')[0]}", f"out={tmp_path / 'out'}"])
    assert not list(tmp_path.iterdir())


def test_weights_that_changed_on_the_way_are_refused(exported, tmp_path, monkeypatch):
    def load(*arguments, **options):
        peer = AutoModelForCausalLM.from_pretrained(*arguments, **options)
        peer.lm_head.weight.data[0, 0] += 1e-3
        return peer

    monkeypatch.setattr("transformers.AutoModelForCausalLM", type("Changed", (), {"from_pretrained": load}))
    model, _ = ours_of(exported("llama")[0])
    with pytest.raises(ConfigError, match="^head.lm_head.weight=different"):
        export_module.verify(model, exported("llama")[1], "fp32", random_tokens(1, 9))


def test_a_diverged_model_is_refused(exported, monkeypatch, tmp_path):
    def broken(path):
        model = load_model(path)
        model.head.lm_head.weight.data.fill_(torch.nan)
        return model

    monkeypatch.setattr(export_module, "load_model", broken)
    with pytest.raises(ConfigError, match="diverged"):
        program.main([f"run={exported('llama')[0]}", f"out={tmp_path / 'out'}"])
    assert not list(tmp_path.iterdir())


def test_a_mix_that_no_class_holds_is_refused_by_name(base, tmp_path):
    """As a person sees it."""
    run = untrained_run(base, "mixed", "model.attention_mix='csa gqa hca'")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / "export_hf.py"), f"run={run}", "out=out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        "error: model.attention_mix=csa gqa hca: no architecture of transformers mixes these kinds; use one family"
    )
    assert not list(tmp_path.iterdir())


def test_an_option_that_its_class_lacks_is_refused_by_name(base, tmp_path):
    run = untrained_run(base, "narrow", "model.attention_mix='swa csa:window=4 hca'")
    with pytest.raises(ConfigError, match="^model.attention_mix=csa:window=4: transformers' deepseek_v4 has window=16"):
        program.main([f"run={run}", f"out={tmp_path / 'out'}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["out=o"], "run=missing"),
        (["run=r", "o=u"], r"o=u: unknown key; "),
        (["run=r", "dtyp=fp32"], r"dtyp=fp32: unknown key; did you mean dtype\?"),
        (["exported"], "argument=exported: it is not key=value"),
        (["run=r"], "out=: a folder to write"),
        (["run=r", "out=o", "dtype=fp8"], "dtype=fp8: .*fp32, bf16"),
        (["run=r", "out=o", "max_shard_size=5"], "max_shard_size=5: .*for example 5GB"),
        (["run=r", "out=."], "out=.: the folder is not empty"),
        (["run=r", "out=file"], "out=file: a folder to write"),
        (["run=r", "out=o"], "run=r: there is no such folder"),
    ],
)
def test_bad_arguments_are_refused_by_key(bad, message, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"^{message}"):
        program.main(bad)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_transformers_it_says_what_to_install(exported, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^transformers=missing: .*v4train\[hf\]"):
        program.main([f"run={exported('llama')[0]}", f"out={tmp_path / 'out'}"])
