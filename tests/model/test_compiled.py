"""torch.compile of the small pure parts: the same numbers up to rounding, the same names, or a clear refusal."""

import pytest
import torch

from tests.models import random_model, random_tokens, tiny_config
from v4train.config import load
from v4train.errors import ConfigError
from v4train.model.compiled import compile_model, cpp_compiler


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_losses_and_gradients_agree_and_names_stay(recompute):
    # Few iterations of Sinkhorn: each is unrolled, and compiled for seconds
    config = tiny_config("csa", residual__sinkhorn_iterations=2, mtp__num_layers=0)
    tokens = random_tokens(2, 24)
    plain, compiled = random_model(config), random_model(config)
    compile_model(compiled)
    compiled.recompute = recompute
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for _ in range(2):
        ours, theirs = compiled(tokens, targets=tokens), plain(tokens, targets=tokens)
        for name, value in theirs.losses.items():
            torch.testing.assert_close(ours.losses[name], value, atol=1e-5, rtol=0, msg=lambda m, n=name: n + m)
        for model, output in ((compiled, ours), (plain, theirs)):
            model.zero_grad()
            output.loss.backward()
        for (name, one), other in zip(compiled.named_parameters(), plain.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None), name
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: n + m)


def test_without_a_compiler_it_is_refused(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cpp_compiler() is None
    with pytest.raises(ConfigError, match=r"compile=True: .*C\+\+ compiler.*install g\+\+, set CXX"):
        load(["compile=true", "device=cpu"])
    assert load(["device=cpu"]).compile is False
    found = tmp_path / "my-compiler"
    found.touch(mode=0o755)
    monkeypatch.setenv("CXX", str(found))
    assert cpp_compiler() == str(found)
