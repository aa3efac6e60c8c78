"""Named families of inner problems: what a ``TaskConfig`` refers to.

Small enough for two CPU cores, and of all kinds that users have: tables and noisy regression, images and text; plain
and normalised, shallow and deep, narrow and wide, dense, convolutional, recurrent and attending; to classify, to
predict and to reconstruct; with batches of 4 to 256.  Labels are wrong in an eighth of the problems with images or
classes of a table.
"""

from __future__ import annotations

from functools import partial

from ..tasks import (
    CNN,
    MLP,
    Images,
    RecurrentLanguageModel,
    RecurrentNet,
    ResidualMLP,
    Tabular,
    TaskDistribution,
    Text,
    Transformer,
    VisionTransformer,
)
from .config import MetaTrainConfig

# Narrower than the default: deep and recurrent networks do not train from every initial scale.
_images = partial(
    TaskDistribution,
    data=Images(standardize=True),
    batch_size=64,
    min_batch_size=16,
    num_train_range=(1000, 40_000),
    init_scale_range=(0.7, 1.4),
)
_rows = partial(
    TaskDistribution,
    batch_size=64,
    min_batch_size=16,
    num_train_range=(200, 5000),
    input_scale_range=(1.0, 1.0),
    init_scale_range=(0.7, 1.4),
)
_text = partial(
    TaskDistribution,
    data=Text(context_length=24),
    batch_size=16,
    min_batch_size=8,
    num_train_range=(300_000, 1_000_000),
    init_scale_range=(0.7, 1.4),
    label_noise_probability=0.0,
    label_permutation=False,
)

FAMILIES: dict[str, TaskDistribution] = {
    # Tables: classification, and regression with noisy targets.
    "tabular": _rows(model=MLP(sizes=(20, 80, 80, 5)), data=Tabular(num_features=20, num_classes=5, seed=1)),
    "tabular-binary": _rows(
        model=MLP(sizes=(10, 32, 32, 32, 2), initialization="he"), data=Tabular(num_features=10, num_classes=2, seed=2)
    ),
    "tabular-wide": _rows(
        model=MLP(sizes=(40, 256, 10), activation="gelu"),
        data=Tabular(num_features=40, num_classes=10, num_sets=48, seed=3),
        batch_size=128,
    ),
    "regression": _rows(model=MLP(sizes=(12, 64, 64, 1)), data=Tabular(num_features=12, seed=4)),
    "regression-few": _rows(
        model=MLP(sizes=(30, 64, 1), activation="tanh"),
        data=Tabular(num_features=30, seed=5),
        num_train_range=(200, 1000),
    ),
    "regression-noisy": _rows(
        model=MLP(sizes=(16, 48, 48, 1), activation="gelu"),
        data=Tabular(num_features=16, noise_range=(0.5, 2.0), seed=6),
        num_train_range=(200, 1500),
    ),
    # Images, dense: pixels of mean 0 and variance 1 where the family says `_images`, but for `mlp-gelu` and `gru`.
    "mlp": TaskDistribution(model=MLP(sizes=(64, 32, 10))),  # the family of the meta-speed benchmark
    "mlp-gelu": _images(model=MLP(sizes=(64, 96, 10), activation="gelu"), data=Images()),
    # From the scale of torch.nn, where the signal fades, to that of He et al.
    "mlp-deep": _images(model=MLP(sizes=(64, *[48] * 5, 10)), init_scale_range=(1.0, 2.4)),
    "mlp-deeper": _images(model=MLP(sizes=(64, *[32] * 8, 10), initialization="he"), init_scale_range=(0.8, 1.25)),
    "mlp-wide": _images(model=MLP(sizes=(784, 96, 96, 10)), data=Images(size=28, standardize=True)),
    "mlp-wider": _images(
        model=MLP(sizes=(64, 384, 384, 384, 10), initialization="he"),
        batch_size=8,
        min_batch_size=4,
        init_scale_range=(0.8, 1.25),
    ),
    "mlp-sigmoid": _images(model=MLP(sizes=(64, 48, 10), activation="sigmoid")),
    "mlp-tanh": _images(model=MLP(sizes=(64, 64, 64, 10), activation="tanh"), batch_size=256),
    "mlp-layernorm": _images(model=MLP(sizes=(64, *[48] * 4, 10), norm="layer")),
    "mlp-preln": _images(model=ResidualMLP(num_inputs=64, width=48, num_blocks=3)),
    "autoencoder": _images(
        model=MLP(sizes=(64, 64, 12, 64, 64), activation="gelu"),
        data=Images(reconstruct=True, standardize=True),
        input_scale_range=(1.0, 1.0),
    ),
    # Images, convolutional, recurrent and attending.
    "cnn": _images(model=CNN(channels=(16, 32), image_size=8)),
    "cnn-groupnorm": _images(
        model=CNN(channels=(12, 24), image_size=14, norm="group"), data=Images(size=14, standardize=True)
    ),
    "cnn-batchnorm": _images(model=CNN(channels=(16, 24, 24), image_size=8, norm="batch")),
    "lstm": _images(model=RecurrentNet(width=40, num_rows=8, row_size=8)),
    "gru": _images(model=RecurrentNet(width=32, num_rows=8, row_size=8, cell="gru"), data=Images()),
    "vit": _images(model=VisionTransformer(image_size=8, patch_size=2, width=32, num_heads=2, num_layers=2)),
    # Text: the source of Python's standard library, by characters.
    "transformer": _text(model=Transformer(vocab_size=96, width=32, num_heads=2, num_layers=2, context_length=24)),
    "gru-text": _text(model=RecurrentLanguageModel(vocab_size=96, width=40)),
    # The 784-20-10 sigmoid nets that L2O-DM, RNNProp and L2O-Scale were meta-trained on, with Fashion-MNIST.
    "mnist-mlp": TaskDistribution(
        model=MLP(sizes=(784, 20, 10), activation="sigmoid", initialization="small"),
        data=Images(sources=(("fashion-mnist", 1.0),), size=28),
        batch_size=128,
        num_train_range=(50_000, 50_000),
        input_scale_range=(1.0, 1.0),
        init_scale_range=(1.0, 1.0),
        label_noise_probability=0.0,
        label_permutation=False,
    ),
}
"""Every family by the name that configurations use."""


def check_families(config: MetaTrainConfig) -> None:
    """Raise ``ValueError`` for a task that is not the name of a family; the message lists the valid ones."""
    for task in config.tasks:
        if task.name not in FAMILIES:
            raise ValueError(f"unknown task {task.name!r}: valid are {', '.join(FAMILIES)}")
