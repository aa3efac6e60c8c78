import pytest
from small import assert_trees_equal, by_path
from toy_metatrain import toy_config, toy_estimator

from flatopt.metatrain import train
from flatopt.metatrain.checkpoint import latest
from flatopt.metatrain.curriculum import Verdict


def test_a_run_resumes_bit_for_bit_with_the_state_of_its_meta_optimizer(tmp_path):
    config = toy_config(validate_every=17)
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
