import pytest
import torch
from small import assert_trees_equal, by_path
from toy_metatrain import toy_config, toy_estimator

from flatopt.metatrain import train
from flatopt.metatrain.checkpoint import latest
from flatopt.metatrain.curriculum import Verdict
from flatopt.metatrain.meta_optimizer import TensorFlowRMSProp, build_meta_optimizer


def test_rmsprop_starts_its_mean_square_at_one_and_has_epsilon_in_the_root():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, generator=generator, dtype=torch.float64)
    expected, square = weight.clone(), torch.ones(5, dtype=torch.float64)
    optimizer = TensorFlowRMSProp([weight], lr=0.1, decay=0.8, eps=0.3)
    for _ in range(6):
        weight.grad = torch.randn(5, generator=generator, dtype=torch.float64)
        square = 0.8 * square + 0.2 * weight.grad**2
        expected = expected - 0.1 * weight.grad / (square + 0.3).sqrt()
        optimizer.step()
    torch.testing.assert_close(weight, expected)
    # 0.9^6 is what the checkpoint of the reference holds for a weight that never had a gradient.
    still = torch.zeros(1)
    optimizer = TensorFlowRMSProp([still])
    for _ in range(6):
        still.grad = torch.zeros(1)
        optimizer.step()
    torch.testing.assert_close(optimizer.state[still]["square_avg"], torch.tensor([0.9**6]))


def test_rmsprop_calls_a_closure_once_and_returns_its_loss():
    calls = []
    assert TensorFlowRMSProp([torch.zeros(1)]).step(lambda: calls.append(None) or 3.0) == 3.0
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["adam", "rmsprop-tf"])
def test_a_run_with_either_resumes_bit_for_bit(tmp_path, name):
    config = toy_config(meta_optimizer=name, validate_every=17)
    results = []
    for folder, dies in ((tmp_path / "whole", False), (tmp_path / "cut", True)):

        def validate(weights, num_steps, dies=dies):
            if dies:
                raise ArithmeticError
            return Verdict(1.0)

        if dies:
            with pytest.raises(ArithmeticError):
                train(config, folder, estimator=toy_estimator(), validate=validate)
        train(config, folder, estimator=toy_estimator(), resume=dies, validate=lambda weights, num_steps: Verdict(1.0))
        results.append(latest(folder / "checkpoints"))
    whole, cut = results
    assert len(cut.sessions) == 2 and cut.sessions[1]["first_update"] == 14
    for group in ("weights", "best", "optimizer"):
        assert_trees_equal(getattr(whole, group), getattr(cut, group))
        assert len(by_path(getattr(cut, group))) > 0


def test_names_give_the_optimizers():
    weights = {"w": torch.zeros(1)}
    assert type(build_meta_optimizer("adam", weights)) is torch.optim.Adam
    assert type(build_meta_optimizer("rmsprop-tf", weights)) is TensorFlowRMSProp
