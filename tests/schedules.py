"""The learning rate of a run whose steps are all alike, so that they serve as the unit of its decay."""

from v4train.optim.schedules import ScheduleConfig, decay, decayed, warmup, warmup_steps


def learning_rate(step: int, total_steps: int, config: ScheduleConfig) -> float:
    share = decayed(step + 1, total_steps, 1, config)
    return config.learning_rate * warmup(step, warmup_steps(total_steps, config)) * decay(share, config)
