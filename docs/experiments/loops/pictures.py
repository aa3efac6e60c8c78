"""Networks on images of clothes: architectures, generative models, coordinates, a pretrained network."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatopt.evaluate.compare import Problem
from flatopt.evaluate.models import Residual, Transpose
from flatopt.tasks import Batch, load_images

from . import classify, endless, generator, made, of_split, pieces, pretrain, squared_error

NUM_CLASSES = 10


@lru_cache(maxsize=4)
def clothes(num_train: int = 12_000, num_eval: int = 2000, size: int = 14) -> dict[str, Batch]:
    """Return images ``[n, 1, size, size]`` with their labels, by split."""
    parts = zip(("train", "meta", "test"), load_images("fashion-mnist", size), strict=True)
    most = {"train": num_train, "meta": num_eval, "test": num_eval}
    return {name: Batch(part.inputs[: most[name], None], part.targets[: most[name]]) for name, part in parts}


def pixels() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return the images as rows, by split, and the least and the largest number that is trained on."""
    rows = {name: part.inputs.flatten(1) for name, part in clothes().items()}
    return rows, *rows["train"].aminmax()


def classification(model: nn.Module, split: str, seed: int, num_train: int = 12_000, num_eval: int = 2000) -> Problem:
    """Return the problem of naming the class of an image."""
    data = clothes(num_train, num_eval)
    return Problem(model, endless(data["train"], 64, seed), pieces(data[split]), classify)


def logistic(seed: int, split: str = "test") -> Problem:
    """Return logistic regression."""
    torch.manual_seed(seed)
    return classification(nn.Sequential(nn.Flatten(), nn.Linear(196, NUM_CLASSES)), split, seed)


class MeanOf(nn.Module):
    """Average over some axes."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the mean."""
        return inputs.mean(self.axes)


def mixer(seed: int, split: str = "test", width: int = 48) -> Problem:
    """Return an MLP-Mixer (Tolstikhin et al., 2021) of three layers on patches of 2 x 2 pixels."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for _ in range(3):
        tokens = nn.Sequential(nn.Linear(49, 64), nn.GELU(), nn.Linear(64, 49))
        channels = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        layers += [Residual(nn.Sequential(nn.LayerNorm(width), Transpose(), tokens, Transpose())), Residual(channels)]
    stem = nn.Unfold(2, stride=2), Transpose(), nn.Linear(4, width)
    return classification(nn.Sequential(*stem, *layers, MeanOf(1), nn.Linear(width, NUM_CLASSES)), split, seed, 5000)


def mobile(seed: int, split: str = "test") -> Problem:
    """Return a CNN of depthwise separable convolutions with BatchNorm, as in MobileNet (Howard et al., 2017)."""
    torch.manual_seed(seed)

    def normalised(*sizes: int, **options: int) -> list[nn.Module]:
        return [nn.Conv2d(*sizes, **options, bias=False), nn.BatchNorm2d(sizes[1]), nn.ReLU()]

    layers = normalised(1, 16, 3, padding=1)
    for num_inputs, num_outputs, stride in ((16, 32, 2), (32, 64, 2), (64, 64, 1)):
        layers += normalised(num_inputs, num_inputs, 3, stride=stride, padding=1, groups=num_inputs)
        layers += normalised(num_inputs, num_outputs, 1)
    return classification(nn.Sequential(*layers, MeanOf(2, 3), nn.Linear(64, NUM_CLASSES)), split, seed, 6000)


class ConvNeXtBlock(nn.Module):
    """A block of ConvNeXt (Liu et al., 2022), whose branch starts a hundredth of its size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.branch = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.scale = nn.Parameter(torch.full((width,), 1e-2))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``[batch, width, size, size]`` of the same shape."""
        return inputs + (self.scale * self.branch(self.depthwise(inputs).movedim(1, -1))).movedim(-1, 1)


def convnext(seed: int, split: str = "test", width: int = 32) -> Problem:
    """Return a ConvNeXt of three blocks."""
    torch.manual_seed(seed)
    blocks = [ConvNeXtBlock(width) for _ in range(3)]
    ends = MeanOf(2, 3), nn.Linear(width, NUM_CLASSES)
    return classification(nn.Sequential(nn.Conv2d(1, width, 2, stride=2), *blocks, *ends), split, seed, 5000)


class Contrastive(nn.Module):
    """An encoder, and the temperature of its similarities, learned too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(196, 128), nn.ReLU(), nn.Linear(128, 32))
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor) -> Tensor:
        """Return directions ``[batch, 32]``."""
        return F.normalize(self.encoder(images), dim=-1)


def contrastive(seed: int, split: str = "test") -> Problem:
    """Return SimCLR (Chen et al., 2020), whose views are shifted and noisy; the error of the nearest neighbour."""
    torch.manual_seed(seed)
    data = clothes()
    known = Batch(*(part[:3000] for part in data["train"]))
    random = generator(seed)

    def view(images: Tensor) -> Tensor:
        shifts = torch.randint(-1, 2, (2,), generator=random).tolist()
        return images.roll(shifts, (-2, -1)) + 0.3 * torch.randn(images.shape, generator=random)

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        similar = model(view(batch.inputs)) @ model(view(batch.inputs)).T * model.log_scale.exp()
        own = torch.arange(len(similar))
        loss = (F.cross_entropy(similar, own) + F.cross_entropy(similar.T, own)) / 2
        if torch.is_grad_enabled():
            return loss, {}
        nearest = known.targets[(model(batch.inputs) @ model(known.inputs).T).argmax(-1)]
        return loss, {"error": 100 * float((nearest != batch.targets).float().mean())}

    return Problem(Contrastive(), endless(data["train"], 64, seed), pieces(data[split]), loss_fn)


class VAE(nn.Module):
    """A variational autoencoder with 16 latent numbers."""

    def __init__(self, width: int = 128, code: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(196, width), nn.ReLU(), nn.Linear(width, 2 * code))
        self.decoder = nn.Sequential(nn.Linear(code, width), nn.ReLU(), nn.Linear(width, 196))

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits of the pixels, and mean and log variance of the code."""
        mean, log_variance = self.encoder(images).chunk(2, -1)
        return self.decoder(mean + noise * (log_variance / 2).exp()), mean, log_variance


def vae(seed: int, split: str = "test") -> Problem:
    """Return a VAE (Kingma and Welling, 2014), and its negative evidence bound, in nats."""
    torch.manual_seed(seed)
    images, low, high = pixels()

    def draw(name: str, random: torch.Generator) -> Batch:
        rows = torch.randint(len(images[name]), (64 if name == "train" else 250,), generator=random)
        return Batch((images[name][rows] - low) / (high - low), torch.randn(len(rows), 16, generator=random))

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        logits, mean, log_variance = model(*batch)
        missed = F.binary_cross_entropy_with_logits(logits, batch.inputs.clamp(0, 1), reduction="none").sum(-1)
        return (missed + 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)).mean()

    train = made(lambda random: draw("train", random), seed)
    return Problem(VAE(), train, of_split(lambda random: draw(split, random), split), loss_fn)


class UNet(nn.Module):
    """A small U-Net with one level and GroupNorm, which is given the time as a channel."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.Sequential(
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.GroupNorm(4, 2 * width), nn.SiLU()
        )
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.out = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 1, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the noise, ``[batch, 1, size, size]``, of images and time ``[batch, 2, size, size]``."""
        fine = F.silu(self.stem(inputs))
        coarse = F.silu(self.down(fine))
        return self.out(torch.cat([fine, self.up(coarse + self.middle(coarse))], 1))


def diffusion(seed: int, split: str = "test") -> Problem:
    """Return denoising diffusion (Ho et al., 2020): the squared error of the predicted noise, cosine schedule."""
    torch.manual_seed(seed)
    data = clothes()

    def draw(name: str, random: torch.Generator) -> Batch:
        images = data[name].inputs
        images = images[torch.randint(len(images), (32 if name == "train" else 250,), generator=random)]
        time, noise = torch.rand(len(images), 1, 1, 1, generator=random), torch.randn(images.shape, generator=random)
        noisy = torch.cos(time * math.pi / 2) * images + torch.sin(time * math.pi / 2) * noise
        return Batch(torch.cat([noisy, time.expand_as(images)], 1), noise)

    train = made(lambda random: draw("train", random), seed)
    return Problem(UNet(), train, of_split(lambda random: draw(split, random), split), squared_error)


class Sine(nn.Module):
    """A layer of SIREN (Sitzmann et al., 2020), with the initial weights of that paper."""

    def __init__(self, num_inputs: int, num_outputs: int, *, bound: float, frequency: float = 30.0) -> None:
        super().__init__()
        self.linear, self.frequency = nn.Linear(num_inputs, num_outputs), frequency
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return sines."""
        return torch.sin(self.frequency * self.linear(inputs))


def _pixels(split: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return coordinates and values, from -1 to 1, of four images side by side; which pixels are trained on."""
    image = 2 * clothes(size=28)["train"].inputs[:4, 0].unflatten(0, (2, 2)).movedim(1, 2).reshape(56, 56) - 1
    axis = torch.linspace(-1, 1, 56)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).flatten(0, 1)
    kind = torch.rand(len(points), generator=generator(SEED_OF_PIXELS))
    measured = (kind > 0.85) if split == "test" else ((kind > 0.7) & (kind <= 0.85))
    return points, image.reshape(-1, 1), torch.stack([kind <= 0.7, measured])


SEED_OF_PIXELS = 1


def siren(seed: int, split: str = "test", width: int = 64) -> Problem:
    """Return a SIREN that learns 70 % of the pixels of a picture, all in each step; the error on others."""
    torch.manual_seed(seed)
    points, values, (train, measured) = _pixels(split)
    hidden = [Sine(width, width, bound=math.sqrt(6 / width) / 30) for _ in range(2)]
    model = nn.Sequential(Sine(2, width, bound=0.5), *hidden, nn.Linear(width, 1))
    batches = [Batch(points[rows], values[rows]) for rows in (train, measured)]
    return Problem(model, batches[:1], batches[1:], squared_error)


def fourier(seed: int, split: str = "test", width: int = 128) -> Problem:
    """Return the same picture with Fourier features (Tancik et al., 2020) and ReLU."""
    torch.manual_seed(seed)
    points, values, (train, measured) = _pixels(split)
    waves = points @ (5 * torch.randn(2, 32, generator=generator(2)))
    features = torch.cat([waves.sin(), waves.cos()], -1)
    sizes = (64, width, width)
    layers = [part for pair in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(*pair), nn.ReLU())]
    batches = [Batch(features[rows], values[rows]) for rows in (train, measured)]
    return Problem(nn.Sequential(*layers, nn.Linear(width, 1)), batches[:1], batches[1:], squared_error)


def _cnn(width: int = 16) -> nn.Sequential:
    layers: list[nn.Module] = []
    for num_inputs, num_outputs in ((1, width), (width, 2 * width)):
        layers += [nn.Conv2d(num_inputs, num_outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(18 * width, 64), nn.ReLU(), nn.Linear(64, NUM_CLASSES // 2))


def _half(name: str, *, second: bool) -> Batch:
    """Return the images of five classes, the first or the last."""
    images, labels = clothes()[name]
    rows = (labels >= NUM_CLASSES // 2) == second
    return Batch(images[rows], labels[rows] % (NUM_CLASSES // 2))


@lru_cache(maxsize=1)
def _pretrained() -> dict[str, Tensor]:
    """Return the weights of a CNN that knows the first five classes."""
    torch.manual_seed(0)
    return pretrain(Problem(_cnn(), endless(_half("train", second=False), 64, 0), [], classify), 600)


def new_classes(seed: int, split: str = "test") -> Problem:
    """Return a pretrained CNN with a new last layer, on 400 images of five other classes."""
    torch.manual_seed(seed)
    model = _cnn()
    last = len(model) - 1
    model.load_state_dict(
        {name: value for name, value in _pretrained().items() if int(name.partition(".")[0]) < last}, strict=False
    )
    train, measured = (_half(name, second=True) for name in ("train", split))
    return Problem(model, endless(Batch(*(part[:400] for part in train)), 32, seed), pieces(measured), classify)


def shifted_images(seed: int, split: str = "test") -> Problem:
    """Return a pretrained CNN, whole, on 400 images of the same five classes, mirrored and with ghosts."""
    torch.manual_seed(seed)
    model = _cnn()
    model.load_state_dict(_pretrained())

    def shifted(name: str) -> Batch:
        images, labels = _half(name, second=False)
        return Batch(0.7 * images.flip(-1) + 0.3 * images.roll(1, -2), labels)

    train = Batch(*(part[:400] for part in shifted("train")))
    return Problem(model, endless(train, 32, seed), pieces(shifted(split)), classify)
