"""A schedule of three phases for the tiny runs of `tests.runs`: dense, the indexers alone, sparse."""

import json

PHASES = [
    {
        "name": "dense",
        "tokens": 1440,  # 2 steps of 192 tokens, then 3 of 384
        "sequence_length": 48,
        "global_batch_size": {"start": 4, "end": 8, "increment": 4, "tokens": 384},
        "attention_mode": "dense",
        "mtp_weight": 0.2,
    },
    {
        "name": "warmup",
        "tokens": 1152,  # 3 steps
        "sequence_length": 96,
        "global_batch_size": 4,
        "attention_mode": "indexer_warmup",
        "learning_rate": 0.002,
    },
    {
        "name": "sparse",
        "tokens": 1536,  # 4 steps
        "sequence_length": 96,
        "global_batch_size": 4,
        "attention_mode": "sparse",
        "balance_weight": 0.01,
        "bias_update_speed": 0.02,
    },
]
ENDS = {"dense": 5, "warmup": 8, "sparse": 12}  # the step after which each phase is over
STEPS = 12


def in_phases(overrides: list[str], *others: str) -> list[str]:
    """Overrides of a run in these phases: without what they decide."""
    decided = ("train.sequence_length=", "train.global_batch_size=", "train.max_steps=")
    kept = [override for override in overrides if not override.startswith(decided)]
    phases = json.dumps(PHASES).replace('"', "")
    return [
        *kept,
        f"schedule.phases={phases}",
        "schedule.mtp_weight_in_decay=0.05",
        "schedule.min_warmup_steps=2",
        *others,
    ]
