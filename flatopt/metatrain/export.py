"""From a checkpoint to a learned rule that says where it comes from."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

from .._cards import curve, rule_facts, without_paths, write_card
from .._version import __version__
from ..pretrained import LearnedRule
from ._log import loss_text, read_metrics
from .checkpoint import RunState
from .config import MetaTrainConfig


def export_rule(state: RunState, metrics: Path) -> LearnedRule:
    """Return a checkpoint as a learned rule, whose card shows the loss curve of the log ``metrics``."""
    rule, weights = state.config.build_rule(), state.shipped_weights
    facts = {**rule_facts(rule, weights), **_facts(state)}
    smoothed = [line.get("smoothed_loss") for line in read_metrics(metrics) if line["update"] <= state.update]
    losses = [loss for loss in smoothed if loss is not None]
    if losses:
        facts["Meta-loss, smoothed"] = f"{loss_text(losses[0])} `{curve(losses)}` {loss_text(state.smoothed_loss)}"
    card = write_card(
        state.config.recipe,
        purpose=_purpose(state.config),
        facts=facts,
        folded={"Sessions": _describe_sessions(_sessions(state))},
        has_training=True,
        averages=rule.average is not None,
    )
    return LearnedRule(rule, weights, card, _metadata(state), json.loads(state.config.to_json()))


def _metadata(state: RunState) -> dict[str, Any]:
    return {
        "recipe": state.config.recipe,
        "seed": state.config.seed,
        "num_updates": state.update,
        "seconds": round(state.seconds, 1),
        "num_dropped": state.num_dropped,
        "flatopt": __version__,
        "sessions": _sessions(state),
    }


def _sessions(state: RunState) -> list[dict[str, Any]]:
    """Return the sessions without the paths of this machine."""
    return [{**session, "command": without_paths(session["command"])} for session in state.sessions]


def _purpose(config: MetaTrainConfig) -> str:
    families = ", ".join(f"`{task.name}`" for task in config.tasks)
    lengths = config.curriculum.stages or [steps for task in config.tasks for steps in (task.min_steps, task.max_steps)]
    return (
        f"Training in place of Adam or SGD. The weights were learned on small problems (families {families}) in runs "
        f"of {min(lengths):,} to {max(lengths):,} steps: the more alike yours is, the surer the result. Compare it "
        "with a tuned Adam before relying on it."
    )


def _facts(state: RunState) -> dict[str, object]:
    config, best = state.config, state.best_validation
    kind = f"moving average, decay {config.ema_decay}" if state.average else "of the last update"
    if state.best and best is not None:
        average = "moving average" if state.average else "no average"
        kind = f"the best by validation, of update {best['update']} ({average})"
    facts: dict[str, object] = {
        "Which weights": kind,
        "Recipe": f"`{config.recipe}`, seed {config.seed}",
        "Meta-updates": f"{state.update} of {config.num_updates}",
        "Time": f"{timedelta(seconds=round(state.seconds))} (h:mm:ss)",
        "Meta-loss, smoothed": loss_text(state.smoothed_loss),
        "Meta-gradients dropped (not finite)": state.num_dropped,
    }
    if best is not None:
        length = f", runs of {best['num_steps']} steps" if "num_steps" in best else ""
        facts["Lowest validation loss"] = f"{loss_text(best['loss'])} at update {best['update']}{length}"
    commit = state.sessions[-1]["commit"] if state.sessions else None
    return {**facts, "Code": f"flatopt {__version__}, commit {commit or 'unknown (not a checkout)'}"}


def _describe_sessions(sessions: list[dict[str, Any]]) -> list[str]:
    lines = ["The run was computed in these sessions, each resumed from the one before."]
    for session in sessions:
        lines += ["", f"- `{session['command']}`"]
        lines += [f"  from update {session['first_update']}, started {session['started']}"]
        lines += [f"  on {session['device']}: {session['hardware']}"]
        lines += [f"  commit {session['commit'] or 'unknown (not a checkout)'}"]
        lines += [f"  Python {session['python']}, torch {session['torch']}"]
    return lines
