"""What a user may hand through to DeepSpeed."""

import pytest

from v4train.errors import ConfigError
from v4train.parallel.deepspeed_config import check_zero_options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"typo": 1}, "typo=1: DeepSpeed: Extra inputs are not permitted; "),
        ({"reduce_bucket_size": "x"}, "reduce_bucket_size=x: DeepSpeed: Input should be a valid integer"),
        ({"reduce_bucket_size": -1}, "reduce_bucket_size=-1: DeepSpeed: Input should be greater than 0"),
    ],
)
def test_what_deepspeed_refuses_is_one_line(options, says):
    with pytest.raises(ConfigError) as caught:
        check_zero_options({"zero_optimization": options}, 1)
    assert str(caught.value).startswith(f"parallelism.deepspeed.zero_optimization.{says}")


@pytest.mark.parametrize(
    "extra", [{}, {"zero_optimization": None}, {"comms_logger": {}}, {"zero_optimization": {"overlap_comm": True}}]
)
def test_what_it_takes_passes(extra):
    for stage in range(4):
        check_zero_options(extra, stage)
