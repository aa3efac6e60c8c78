"""Reinforcement learning on two problems of control, and two networks that play against each other."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import count
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Normal

from flatopt.evaluate.compare import Problem
from flatopt.tasks import Batch

from . import SEED_OF_DATA, generator, made, pretrain
from .numbers import perceptron
from .pictures import classification, pixels

LENGTH = 200
"""Steps after which an episode ends."""


class World(NamedTuple):
    """A problem of control, for many copies at once: ``n`` rows of states."""

    start: Callable[[int, torch.Generator], Tensor]
    """Draw the first states of so many copies, ``[n, s]``."""
    move: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    """Return of states and actions ``[n]`` the next states, the rewards, and which copies failed, ``[n]`` each."""
    see: Callable[[Tensor], Tensor]
    """Return what a network sees of states, ``[n, num_inputs]``."""
    num_inputs: int
    policy: Callable[[Tensor], Distribution]
    """Return the distribution of the action, of two outputs of a network ``[n, 2]``."""
    best: float
    """A bound of the return."""


def _push(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Push a cart that balances a pole to the left or right (Barto, Sutton and Anderson, 1983), for 0.02 s."""
    place, speed, angle, turn = state.unbind(-1)
    force = (20 * action - 10 + 0.05 * turn.square() * angle.sin()) / 1.1
    bend = (9.8 * angle.sin() - angle.cos() * force) / (0.5 * (4 / 3 - 0.1 * angle.cos().square() / 1.1))
    pull = force - 0.05 * bend * angle.cos() / 1.1
    state = state + 0.02 * torch.stack([speed, pull, turn, bend], -1)
    return state, torch.ones(len(state)), (state[:, 0].abs() > 2.4) | (state[:, 2].abs() > math.radians(12))


def _swing(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn a pendulum, whose motor is too weak to lift it at once, for 0.05 s; it never fails."""
    angle, turn = state.unbind(-1)
    torque = action.clamp(-2, 2)
    off = (angle + math.pi) % (2 * math.pi) - math.pi
    cost = off.square() + 0.1 * turn.square() + 0.001 * torque.square()
    turn = (turn + 0.05 * (15 * angle.sin() + 3 * torque)).clamp(-8, 8)
    return torch.stack([angle + 0.05 * turn, turn], -1), -cost / 8, torch.zeros(len(state), dtype=torch.bool)


CART = World(
    lambda number, random: 0.1 * torch.rand(number, 4, generator=random) - 0.05,
    _push,
    lambda state: state,
    4,
    lambda outputs: Categorical(logits=outputs),
    LENGTH,
)
PENDULUM = World(
    lambda number, random: (2 * torch.rand(number, 2, generator=random) - 1) * torch.tensor([math.pi, 1.0]),
    _swing,
    lambda state: torch.stack([state[:, 0].cos(), state[:, 0].sin(), state[:, 1] / 8], -1),
    3,
    lambda outputs: Normal(2 * outputs[:, 0], F.softplus(outputs[:, 1]) + 0.05),
    0.0,
)


def lost(world: World, choose: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
    """Return by how much the return of an episode falls short of its bound, in the mean over copies."""
    alive, total = torch.ones(len(state)), torch.zeros(len(state))
    for _ in range(LENGTH):
        state, reward, failed = world.move(state, choose(world.see(state)))
        total += alive * reward
        alive = alive * ~failed
    return world.best - total.mean()


def episodes(world: World, split: str) -> list[Batch]:
    """Return the first states that results are measured on: others for each split."""
    state = world.start(100, generator(SEED_OF_DATA + (split == "test")))
    return [Batch(state, torch.zeros(len(state)))]


class ActorCritic(nn.Module):
    """A network for the action and one for the value."""

    def __init__(self, num_inputs: int, width: int = 64) -> None:
        super().__init__()
        self.actor = perceptron(num_inputs, width, width, 2, activation=nn.Tanh)
        self.critic = perceptron(num_inputs, width, width, 1, activation=nn.Tanh)


def rollouts(model: ActorCritic, world: World, seed: int, num_copies: int = 16, length: int = 64) -> Iterator[Batch]:
    """Play, and yield 4 epochs of what was seen in 4 batches each; again and again.

    Targets are action, its log probability then, generalised advantage (Schulman et al., 2016), and return.
    """
    random = generator(seed)
    torch.manual_seed(seed)  # of the actions
    state, age = world.start(num_copies, random), torch.randint(LENGTH, (num_copies,), generator=random)
    while True:
        seen, played, rewards, after, ends = [], [], [], [], []
        with torch.no_grad():
            for _ in range(length):
                seen.append(world.see(state))
                policy = world.policy(model.actor(seen[-1]))
                action = policy.sample()
                played.append(torch.stack([action.float(), policy.log_prob(action)], -1))
                state, reward, failed = world.move(state, action)
                age = age + 1
                rewards.append(reward)
                after.append(~failed * model.critic(world.see(state)).squeeze(-1))
                ends.append(failed | (age >= LENGTH))
                state = torch.where(ends[-1].unsqueeze(-1), world.start(num_copies, random), state)
                age = age * ~ends[-1]
            values = model.critic(torch.stack(seen)).squeeze(-1)
            advantage, advantages = torch.zeros(num_copies), []
            for index in reversed(range(length)):
                surprise = rewards[index] + 0.99 * after[index] - values[index]
                advantage = surprise + 0.99 * 0.95 * ~ends[index] * advantage
                advantages.insert(0, advantage)
        gained = torch.stack(advantages)
        targets = torch.cat([torch.stack(played), gained.unsqueeze(-1), (gained + values).unsqueeze(-1)], -1)
        inputs, targets = torch.stack(seen).flatten(0, 1), targets.flatten(0, 1)
        for _ in range(4):
            for rows in torch.randperm(len(inputs), generator=random).chunk(4):
                yield Batch(inputs[rows], targets[rows])


def _ppo(world: World, seed: int, split: str) -> Problem:
    torch.manual_seed(seed)
    model = ActorCritic(world.num_inputs)

    def choose(seen: Tensor) -> Tensor:
        return world.policy(model.actor(seen)).mode

    def loss_fn(model: ActorCritic, batch: Batch) -> Tensor:
        if not torch.is_grad_enabled():
            return lost(world, choose, batch.inputs)
        action, before, advantage, gained = batch.targets.unbind(-1)
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-6)
        policy = world.policy(model.actor(batch.inputs))
        ratio = (policy.log_prob(action) - before).exp()
        better = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        value = (model.critic(batch.inputs).squeeze(-1) - gained).square().mean()
        return 0.5 * value - better - 0.01 * policy.entropy().mean()

    return Problem(model, rollouts(model, world, seed), episodes(world, split), loss_fn)


def cart(seed: int, split: str = "test") -> Problem:
    """Return proximal policy optimization (Schulman et al., 2017) on the cart; how many of 200 steps it misses."""
    return _ppo(CART, seed, split)


def pendulum(seed: int, split: str = "test") -> Problem:
    """Return the same on the pendulum, and its costs."""
    return _ppo(PENDULUM, seed, split)


def q_learning(seed: int, split: str = "test") -> Problem:
    """Return deep Q-learning (Mnih et al., 2015; double, van Hasselt et al., 2016) on the cart; how much it misses."""
    torch.manual_seed(seed)
    model = perceptron(4, 64, 64, 2)

    def transitions() -> Iterator[Batch]:
        random, older = generator(seed), copy.deepcopy(model)
        memory: deque[Tensor] = deque(maxlen=1500)
        state, age = CART.start(8, random), torch.zeros(8, dtype=torch.long)
        for step in count():
            with torch.no_grad():
                blind = torch.rand(8, generator=random) < max(0.05, 1 - step / 500)
                action = torch.where(blind, torch.randint(2, (8,), generator=random), model(state).argmax(-1))
                after, reward, failed = CART.move(state, action)
                age = age + 1
                columns = [part.float().unsqueeze(-1) for part in (action, reward, failed)]
                memory.append(torch.cat([state, after, *columns], -1))
                ended = failed | (age >= LENGTH)
                state, age = torch.where(ended.unsqueeze(-1), CART.start(8, random), after), age * ~ended
                if step % 100 == 0:
                    older.load_state_dict(model.state_dict())
                chosen = torch.randint(len(memory) * 8, (64,), generator=random)
                rows = torch.stack([memory[int(row) // 8][int(row) % 8] for row in chosen])
                seen, after, action, reward, failed = rows.split([4, 4, 1, 1, 1], -1)
                later = older(after).gather(-1, model(after).argmax(-1, keepdim=True))
            yield Batch(seen, torch.cat([action, reward + 0.99 * (1 - failed) * later], -1))

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        if not torch.is_grad_enabled():
            return lost(CART, lambda seen: model(seen).argmax(-1), batch.inputs)
        action, wanted = batch.targets.unbind(-1)
        return F.smooth_l1_loss(model(batch.inputs).gather(-1, action.long().unsqueeze(-1)).squeeze(-1), wanted)

    return Problem(model, transitions(), episodes(CART, split), loss_fn)


@lru_cache(maxsize=1)
def _features() -> nn.Module:
    """Return a network up to its last hidden layer, trained to name the class."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), *perceptron(196, 128, 32, 10))
    model.load_state_dict(pretrain(classification(model, "meta", 0), 600))
    return model[:-1].requires_grad_(False)


def frechet_distance(one: Tensor, other: Tensor) -> Tensor:
    """Return the distance of two normal distributions, fitted to rows (Heusel et al., 2017)."""
    covariances = [part.double().T.cov() for part in (one, other)]
    both = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    between = (one.mean(0) - other.mean(0)).square().sum()
    return (between + sum(part.trace() for part in covariances) - 2 * both).float()


def adversarial(seed: int, split: str = "test", width: int = 128, code: int = 32) -> Problem:
    """Return a GAN (Goodfellow et al., 2014) on clothes, both networks in one step; the distance of features."""
    features = _features()
    torch.manual_seed(seed)
    images, low, high = pixels()
    leaky = partial(nn.LeakyReLU, 0.2)
    model = nn.ModuleDict(
        {
            "maker": nn.Sequential(*perceptron(code, width, width, 196, activation=leaky), nn.Sigmoid()),
            "judge": perceptron(196, width, width, 1, activation=leaky),
        }
    )

    def draw(name: str, number: int, random: torch.Generator) -> Batch:
        rows = torch.randint(len(images[name]), (number,), generator=random)
        return Batch(torch.randn(number, code, generator=random), (images[name][rows] - low) / (high - low))

    def loss_fn(model: nn.ModuleDict, batch: Batch) -> Tensor:
        made_up = model["maker"](batch.inputs)
        if not torch.is_grad_enabled():
            return frechet_distance(*(features(low + (high - low) * part) for part in (made_up, batch.targets)))
        judge = {name: param.detach() for name, param in model["judge"].named_parameters()}
        fooled = F.softplus(-torch.func.functional_call(model["judge"], judge, (made_up,))).mean()
        found = F.softplus(model["judge"](made_up.detach())) + F.softplus(-model["judge"](batch.targets))
        return fooled + found.mean()

    measured = [draw(split, 2000, generator(SEED_OF_DATA))]
    return Problem(model, made(lambda random: draw("train", 64, random), seed), measured, loss_fn)
