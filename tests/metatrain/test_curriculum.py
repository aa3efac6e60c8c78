import math

import pytest
from toy_metatrain import toy_config

from flatopt.metatrain import CurriculumConfig, ValidationConfig
from flatopt.metatrain.curriculum import Progress, decide, validation_steps

STAGES = CurriculumConfig(stages=(100, 200, 500))


def replay(config, losses):
    """Decide after each loss, as the trainer does; return decisions and stages."""
    progress, best, seen = Progress(), None, []
    for loss in losses:
        progress, decision = decide(config, progress, loss, best)
        best = loss if decision == "keep" else best
        seen.append((decision, progress.stage))
    return seen, progress


def test_validation_has_the_length_of_the_next_stage_and_the_last_stage_its_own():
    assert [validation_steps(STAGES, stage) for stage in range(3)] == [200, 500, 500]
    assert validation_steps(CurriculumConfig(stages=(100,)), 0) == 100
    assert validation_steps(CurriculumConfig(), 0) is None


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        # A worse loss before the third validation changes nothing; the first worse one after it advances.
        ([3, 4, 2, 2.5], [("keep", 0), ("go on", 0), ("keep", 0), ("advance", 1)]),
        # As long as every validation improves, the stage goes on.
        ([5, 4, 3, 2, 1], [("keep", 0)] * 5),
        # A stage needs three validations of its own, and ends the run if none of them improved.
        (
            [3, 4, 5, 4, 4, 4],
            [("keep", 0), ("go on", 0), ("advance", 1), ("go on", 1), ("go on", 1), ("stop", 1)],
        ),
        # Not a number is never the best; equal is not better.
        ([math.nan, 3, 3, 3], [("go on", 0), ("keep", 0), ("advance", 1), ("go on", 1)]),
        ([math.nan, math.inf, math.nan], [("go on", 0), ("go on", 0), ("stop", 0)]),
    ],
)
def test_the_rule_of_advancing_and_stopping(losses, expected):
    seen, progress = replay(toy_config(curriculum=STAGES, validate_every=1), losses)
    assert seen == expected
    assert progress.finished == (expected[-1][0] == "stop")


def test_the_last_stage_is_followed_by_itself():
    config = toy_config(curriculum=STAGES, validate_every=1)
    losses = [9, 9, 9, 8, 9, 9, 7, 9, 9, 6, 9, 9]
    stages = [stage for decision, stage in replay(config, losses)[0] if decision == "advance"]
    assert stages == [1, 2, 2, 2]


def test_min_num_eval_is_counted_per_stage():
    config = toy_config(curriculum=CurriculumConfig(stages=(20, 40), min_num_eval=1), validate_every=1)
    assert [decision for decision, _ in replay(config, [1, 2, 3])[0]] == ["keep", "advance", "stop"]


def test_without_stages_patience_ends_the_run():
    config = toy_config(validation=ValidationConfig(patience=2))
    seen, progress = replay(config, [3, 4, 2, 3, 2, 1])
    assert [decision for decision, _ in seen] == ["keep", "go on", "keep", "go on", "stop", "keep"]
    seen, progress = replay(toy_config(), [3, *[4] * 50])
    assert not progress.finished and progress.num_worse == 50
