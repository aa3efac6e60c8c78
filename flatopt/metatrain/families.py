"""Named families of inner problems: what a ``TaskConfig`` refers to.

Small enough for two CPU cores, and different enough in kind that what is learned carries over: plain and normalised,
shallow and deep, dense, convolutional, recurrent and attending.  All reported optimizees are other ones.
"""

from __future__ import annotations

from collections.abc import Callable

from ..tasks import CNN, MLP, RecurrentNet, TaskDistribution, Transformer


def mlp() -> TaskDistribution:
    """Return 64-32-10 ReLU nets on 8x8 images: the family of the meta-speed benchmark."""
    return TaskDistribution(model=MLP(sizes=(64, 32, 10)))


def mlp_deep() -> TaskDistribution:
    """Return plain ReLU nets with four hidden layers."""
    return TaskDistribution(model=MLP(sizes=(64, 24, 24, 24, 24, 10), initialization="he"), init_scale_range=(0.7, 1.4))


def mlp_deeper() -> TaskDistribution:
    """Return plain, narrow ReLU nets with eight hidden layers."""
    return TaskDistribution(model=MLP(sizes=(64, *[16] * 8, 10), initialization="he"), init_scale_range=(0.8, 1.25))


def mlp_wide() -> TaskDistribution:
    """Return ReLU nets with one hidden layer on 14x14 images: five times the parameters of the others."""
    return TaskDistribution(model=MLP(sizes=(196, 64, 10)), size=14)


def mlp_sigmoid() -> TaskDistribution:
    """Return sigmoid nets with one hidden layer."""
    return TaskDistribution(model=MLP(sizes=(64, 24, 10), activation="sigmoid"))


def mlp_layernorm() -> TaskDistribution:
    """Return deep nets with LayerNorm before each ReLU and no skip connections."""
    return TaskDistribution(model=MLP(sizes=(64, 24, 24, 24, 24, 10), norm="layer"))


def mlp_residual() -> TaskDistribution:
    """Return residual nets with LayerNorm and GELU."""
    return TaskDistribution(model=MLP(sizes=(64, 24, 24, 24, 10), norm="layer", residual=True, activation="gelu"))


def cnn() -> TaskDistribution:
    """Return plain convolutional nets on 8x8 images."""
    return TaskDistribution(model=CNN(channels=(8, 16), image_size=8), batch_size=32)


def lstm() -> TaskDistribution:
    """Return LSTMs that read 8x8 images row by row."""
    return TaskDistribution(
        model=RecurrentNet(width=16, num_rows=8, row_size=8), batch_size=32, init_scale_range=(0.7, 1.4)
    )


def transformer() -> TaskDistribution:
    """Return one-layer transformers on the characters of Python source."""
    return TaskDistribution(
        model=Transformer(vocab_size=96, width=16, num_heads=2, num_layers=1, context_length=16),
        sources=(("text", 1.0),),
        batch_size=16,
        num_train_range=(20_000, 1_000_000),
        init_scale_range=(0.7, 1.4),
        label_noise_probability=0.0,
        label_permutation=False,
    )


def mnist_mlp() -> TaskDistribution:
    """Return the 784-20-10 sigmoid nets that L2O-DM, RNNProp and L2O-Scale were meta-trained on, with Fashion-MNIST."""
    return TaskDistribution(
        model=MLP(sizes=(784, 20, 10), activation="sigmoid", initialization="small"),
        sources=(("fashion-mnist", 1.0),),
        size=28,
        batch_size=128,
        num_train_range=(50_000, 50_000),
        input_scale_range=(1.0, 1.0),
        init_scale_range=(1.0, 1.0),
        label_noise_probability=0.0,
        label_permutation=False,
    )


FAMILIES: dict[str, Callable[[], TaskDistribution]] = {
    "mlp": mlp,
    "mlp-deep": mlp_deep,
    "mlp-deeper": mlp_deeper,
    "mlp-wide": mlp_wide,
    "mlp-sigmoid": mlp_sigmoid,
    "mlp-layernorm": mlp_layernorm,
    "mlp-residual": mlp_residual,
    "cnn": cnn,
    "lstm": lstm,
    "transformer": transformer,
    "mnist-mlp": mnist_mlp,
}
"""Every family by the name that configurations use."""
