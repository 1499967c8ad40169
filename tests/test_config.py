"""Bad input ends in one line that names the key; good input in typed settings."""

import re
from itertools import product

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from v4train.analysis.parameters import parameter_counts
from v4train.config import load, settings
from v4train.errors import ConfigError
from v4train.overrides import config_dir, default_run_name

GROUPS = ("model", "data", "tokenizer", "optimizer", "schedule", "parallelism", "checkpoint", "tracking")

BAD = [
    # overrides, key in the message, words of the rule or the remedy
    (["model=nope"], "model", ["nope", "flash_small", "flash", "pro"]),
    (["optimizer=sgd"], "optimizer", ["muon", "adamw"]),
    (["train.max_stepz=3"], "train.max_stepz", ["train.max_steps"]),
    (["model=flsh"], "model", ["did you mean flash?"]),
    (["modle=flash"], "modle", ["model"]),
    (["train.max_steps=1,2"], "train.max_steps", ["train.max_steps=[1,2]", "-m"]),
    (["launcher.nproc=2"], "launcher.nproc", ["did you mean hydra.launcher.nproc?"]),
    (["hydra.launcher.partitoin=gpu"], "hydra.launcher.partitoin", ["did you mean hydra.launcher.partition?"]),
    (["hydra/launcher=slrum"], "hydra/launcher", ["did you mean slurm?"]),
    (["+foo=1"], "foo", ["unknown"]),
    (["+train.foo=1"], "train.foo", ["unknown"]),
    (["model.moe.topk=2"], "model.moe.topk", ["model.moe.top_k"]),
    (["train.max_steps=abc"], "train.max_steps", ["abc"]),
    (["train.max_steps=0"], "train.max_steps", ["at least 1"]),
    (["train.max_steps=null"], "train.max_steps", ["train.max_tokens"]),
    (["train.attention_mode=full"], "train.attention_mode", ["dense, indexer_warmup, sparse"]),
    (
        ["train.attention_mode=indexer_warmup", "model.attention_mix=swa*5 hca"],
        "train.attention_mode",
        ["no layer of swa swa swa swa swa hca", "csa or dsa"],
    ),
    (["train.log_every=0"], "train.log_every", ["at least 1"]),
    (["train.recompute=all"], "train.recompute", ["none, block, attention"]),
    (["train.profile=[5,5]"], "train.profile", ["start < stop"]),
    (["train.profile=[0,5]"], "train.profile", ["1 <= start"]),
    (["train.profile=[5]"], "train.profile", ["[start,stop]"]),
    (["train.profile=[200,201]"], "train.profile", ["ends at step 140"]),
    (["train.profile=3"], "train.profile", ["3"]),
    (["train.validate_every=-1"], "train.validate_every", ["negative"]),
    (["train.global_batch_size=3", "train.micro_batch_size=2"], "train.global_batch_size", ["multiple", "2"]),
    (["model.attention.o_groups=3"], "model.attention.o_groups", ["num_heads=8"]),
    (["model.attention_mix=[swa,csa]"], "model.attention_mix", ["num_layers"]),
    (["model.num_layers=4"], "model.attention_mix", ["4"]),
    (["model.attention_mix=[swa,swa,csa,hca,csa,foo]"], "model.attention_mix", ["foo", "swa, csa, hca"]),
    (["model.attention.rope_dim=7"], "model.attention.rope_dim", ["even"]),
    (["model.moe.top_k=17"], "model.moe.top_k", ["num_experts"]),
    (["model.residual.kind=foo"], "model.residual.kind", ["plain", "mhc"]),
    (["model.hidden_size=-1"], "model.hidden_size", ["at least 1"]),
    (["model.mtp.num_layers=2"], "model.mtp.num_layers", ["0 or 1"]),
    (["data=text", "data.path=/no/such/folder"], "data.path", ["/no/such/folder"]),
    (["data=text"], "data.path", ["data.path="]),
    (["data.validation_fraction=2"], "data.validation_fraction", ["2"]),
    (["tokenizer.vocab_size=8192"], "tokenizer.vocab_size", ["model.vocab_size=4096"]),
    (["parallelism.data=2"], "parallelism.data", ["data 2", "torchrun"]),
    (["parallelism.tensor=2"], "parallelism.tensor", ["parallelism.tensor=1"]),
    (["parallelism.zero_stage=4"], "parallelism.zero_stage", ["0, 1, 2 or 3"]),
    (["parallelism=nope"], "parallelism", ["zero1"]),
    (["precision=fp8"], "precision", ["fp32, bf16"]),
    (["device=tpu"], "device", ["cpu"]),
    (["seed=-1"], "seed", ["0"]),
    (["schedule.kind=foo"], "schedule.kind", ["cosine"]),
    (["optimizer.name=sgd"], "optimizer.name", ["muon"]),
    (["optimizer.betas=3"], "optimizer.betas", ["3"]),
    (["tracking.mode=loud"], "tracking.mode", ["offline"]),
    (["checkpoint.resume=/no/such"], "checkpoint.resume", ["auto"]),
    (["checkpoint.keep=-1"], "checkpoint.keep", ["negative"]),
    (["train.max_steps"], "override", ["key=value"]),
    (["model.attention_mix=5"], "model.attention_mix", ["pattern"]),
    (["train=3"], "train", ["group of keys"]),
    (["model=3"], "model", ["no such option", "flash_small"]),
    (["guard=null"], "guard", ["no such option", "default"]),
    (["parallelism=[2]"], "parallelism", ["no such option", "auto"]),
    (["~model"], "model", ["missing", "flash_small"]),
    (["~train"], "train", ["missing", "~train"]),
    (["~seed"], "seed", ["missing"]),
    (["schedule=v4_small", "~schedule.phases.1"], "schedule.phases.1", ["whole list"]),
    (["schedule=v4_small", "schedule.phases.9.tokens=5"], "schedule.phases.9.tokens", ["no such entry"]),
    (["schedule=v4_small", "schedule.phases.x=3"], "schedule.phases.x", ["numbered"]),
    (["model.attention_mix.7=csa"], "model.attention_mix.7", ["whole"]),
    (["optimizer.per_head=3"], "optimizer.per_head", ["true or false"]),
    (["optimizer.betas=[0.9]"], "optimizer.betas", ["two"]),
    (["optimizer.weight_decay=-1"], "optimizer.weight_decay", ["negative"]),
    (["schedule.learning_rate=-1"], "schedule.learning_rate", ["negative"]),
    (["train.grad_clip=nan"], "train.grad_clip", ["negative"]),
    (["optimizer.weight_decay=inf"], "optimizer.weight_decay", ["finite"]),
    (["optimizer.update_rms=inf"], "optimizer.update_rms", ["finite"]),
    (["schedule.mtp_weight_in_decay=inf"], "schedule.mtp_weight_in_decay", ["finite"]),
    (["schedule=v4_small", "schedule.phases=5"], "schedule.phases", ["list of phases"]),
    (["schedule=v4_small", "schedule.phases=hello"], "schedule.phases", ["list of phases"]),
    (["experiment=dense_to_sparse", "model.name=foo"], "schedule.phases", ["foo"]),
    (["evaluation.recall_pairs=0"], "evaluation.recall_pairs", ["at least 1"]),
    (["evaluation.recall_distances=[0]"], "evaluation.recall_distances", ["at least 1"]),
    (["evaluation.tokens=-1"], "evaluation.tokens", ["negative"]),
    (["model.norm_eps=-1"], "model.norm_eps", ["above 0"]),
    (["model.attention.rope.theta=0"], "model.attention.rope.theta", ["exceed 1"]),
    (["tokenizer.vocab_size=10"], "tokenizer.vocab_size", ["262"]),
    (["tokenizer.cache_dir=runs/a/cache", "run.name=a"], "tokenizer.cache_dir", ["run's folder"]),
    (["run.name=a/b"], "run.name", ["one folder"]),
    (["run.name=.."], "run.name", ["one folder"]),
    (["parallelism.deepspeed.wall_clock_breakdown=true"], "parallelism.deepspeed.wall_clock_breakdown", ["+"]),
    (["+parallelism.deepspeed.zero_optimization=3"], "parallelism.deepspeed.zero_optimization", ["group"]),
]


@pytest.mark.parametrize(("overrides", "key", "words"), BAD, ids=lambda value: str(value)[:50])
def test_bad_input_is_one_line_with_key_value_rule_and_remedy(overrides, key, words):
    with pytest.raises(ConfigError) as caught:
        load(overrides)
    message = str(caught.value)
    assert message.startswith(f"{key}=")
    assert "\n" not in message
    for word in words:
        assert word in message


def every_option() -> list[str]:
    return sorted(f"{group}={path.stem}" for group in GROUPS for path in (config_dir() / group).glob("[!_]*.yaml"))


RANKS = {"tensor": 2, "context": 2, "pipeline": 2, "expert_pipeline": 4, "full4": 4, "flash": 32, "pro": 512}
NEEDED = {
    "flash": ["train.global_batch_size=8"],
    "pro": ["model.moe.num_experts=64", "train.global_batch_size=64"],
}


@pytest.mark.parametrize("override", every_option())
def test_every_shipped_option_composes(override, tmp_path, monkeypatch):
    """Most data need a path, some layouts need more ranks than the one process of this test."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "index.json").write_text("{}")
    group, _, name = override.partition("=")
    needed = [f"data.path={tmp_path}"] if name in ("text", "jsonl", "parquet", "arrow", "hub", "shards") else []
    needed += ["data.sources={code: {source: stdlib}}"] if name == "mixture" else []
    if group == "parallelism":
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(RANKS.get(name, 1)))
        needed = NEEDED.get(name, [])
    config = load([override, *needed])
    assert settings(config).plan.total_steps >= 1


def jobs_of(experiment: str) -> list[list[str]]:
    """Overrides of each job of the sweep that an experiment is."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("pretrain", [f"experiment={experiment}"], return_hydra_config=True)
    swept = [[f"{key}={value}" for value in str(of).split(",")] for key, of in config.hydra.sweeper.params.items()]
    return [[f"experiment={experiment}", *job] for job in product(*swept)]


EXPERIMENTS = sorted(path.stem for path in (config_dir() / "experiment").glob("[!_]*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_job_of_every_experiment_is_a_run_of_its_own(experiment):
    jobs = jobs_of(experiment)
    assert len({load(job).run.name for job in jobs}) == len(jobs) > 1


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name.endswith("_tune")])
def test_what_is_tuned_is_reported_on_other_seeds(experiment):
    tuned, reported = jobs_of(experiment), jobs_of(experiment.removesuffix("_tune"))
    seeds = [{word for job in jobs for word in job if word.startswith("seed=")} for jobs in (tuned, reported)]
    assert seeds[0] == {"seed=1"} and "seed=1" not in seeds[1] and len(seeds[1]) > 1
    assert any(word.startswith("schedule.learning_rate=") for word in tuned[0])


def test_variants_of_the_recall_experiment_have_equal_parameters():
    counts = {job[-1]: parameter_counts(settings(load(job)).model)[0] for job in jobs_of("recall")}
    assert max(counts.values()) / min(counts.values()) < 1.01, counts


def test_a_value_by_the_name_of_another():
    table = "{muon: 1, adamw: [2, {a: 3}]}"
    config = OmegaConf.create({"of": "adamw", "value": f"${{by:${{of}},{table}}}"})
    OmegaConf.resolve(config)
    assert config.value == [2, {"a": 3}]
    with pytest.raises(ConfigError, match="^model.num_layers=.*nothing for x, only for muon, adamw"):
        load([f"model.num_layers='${{by:x,{table}}}'"])


COMMANDS = {  # in the head of the file: sizes of the layout
    "schedule/v4_flash": "pipeline 4, data 2, context 64, tensor 1, expert 128",
    "schedule/v4_pro": "pipeline 8, data 2, context 128, tensor 1, expert 128",
    "parallelism/flash": "pipeline 4, data 8, context 1, tensor 1, expert 8",
    "parallelism/pro": "pipeline 8, data 64, context 1, tensor 1, expert 64",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_in_the_head_of_a_file_for_a_cluster_is_accepted(name, monkeypatch):
    text = (config_dir() / f"{name}.yaml").read_text().replace("\\\n#", "")
    srun, _, overrides = re.search(r"^#   srun (.*)$", text, re.MULTILINE)[1].partition("launch/pretrain.py ")
    ranks = re.search(r"--ntasks=(\d+)", srun)[1]
    monkeypatch.setenv("RANK", str(int(ranks) - 1))
    monkeypatch.setenv("WORLD_SIZE", ranks)
    assert name.replace("/", "=") in overrides.split()
    made = settings(load(overrides.split()))
    assert str(made.topology.sizes) == COMMANDS[name]
    for step in range(0, made.plan.total_steps, 1000):  # a pipeline at work, not one that waits most of the time
        stage = made.plan.at(step)
        micro_batches = stage.global_batch_size // (made.micro_batch(stage) * made.topology.sizes.data)
        assert micro_batches >= made.topology.sizes.pipeline, stage


def test_the_default_run_name_comes_from_model_and_overrides():
    assert load([]).run.name == "flash_small"
    assert load(["model=flash_small"]).run.dir == "runs/flash_small"
    one = load(["train.max_steps=5", "optimizer=adamw"])
    other = load(["optimizer=adamw", "train.max_steps=5"])
    assert one.run.name == other.run.name == "flash_small_optimizer=adamw_train.max_steps=5"
    # where and how, not what: the name that a continued run must find again
    how = [
        "train.stop_at_step=3",
        "train.recompute=block",
        "train.profile=[2,3]",
        "checkpoint.every=7",
        "tracking.mode=disabled",
        "guard.max_rollbacks=5",
    ]
    assert load(["guard.anticipate=always"]).run.name == "flash_small_guard.anticipate=always"  # that trains otherwise
    assert load(how).run.name == "flash_small"
    assert load(["run.name=mine"]).run.dir == "runs/mine"
    assert load(["model.name=full", "seed=2"]).run.name == "full_seed=2"  # said once


def test_a_spike_needs_a_checkpoint_to_go_back_to():
    with pytest.raises(ConfigError, match=r"^guard.snapshot=disk.*checkpoint.every=0"):
        load(["guard.snapshot=disk", "checkpoint.every=0"])
    load(["guard.snapshot=auto", "checkpoint.every=0"])


def test_long_names_are_cut_and_stay_distinct():
    names = {default_run_name("m", [f"train.sample_prompt={'x' * 300}{i}"]) for i in range(2)}
    assert len(names) == 2
    assert all(len(name) <= 120 for name in names)


def test_a_name_is_a_single_folder():
    name = default_run_name("m", ["data.path=/a/b c/*.txt", "model.attention_mix=[swa,csa]"])
    assert "/" not in name and " " not in name and "[" not in name


def test_max_tokens_shortens_a_run():
    config = load(["train.max_tokens=10000", "train.global_batch_size=4", "train.sequence_length=512"])
    assert settings(config).plan.total_steps == 5  # 2,048 tokens a step


def test_a_rank_takes_its_whole_share_at_once_unless_told(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    made = settings(load(["train.global_batch_size=8"]))
    assert (made.train.micro_batch_size, made.topology.index("data"), made.topology.sizes.data) == (4, 1, 2)
    with pytest.raises(ConfigError, match=r"global_batch_size=3: .*2 data ranks"):
        load(["train.global_batch_size=3"])


def test_a_loaded_configuration_is_complete_and_saves(tmp_path):
    config = load(["model=pro", "model.mtp.num_layers=0"])
    OmegaConf.save(config, tmp_path / "config.yaml", resolve=True)
    assert OmegaConf.load(tmp_path / "config.yaml").model.hidden_size == 7168
