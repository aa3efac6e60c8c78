"""Every optimizee equals the torch.nn modules that it stands for, and runs under vmap, grad and compile."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatopt.tasks import (
    CNN,
    MLP,
    Optimizee,
    Params,
    RecurrentLanguageModel,
    RecurrentNet,
    ResidualMLP,
    Transformer,
    VisionTransformer,
    accuracy,
    cross_entropy,
    mean_squared_error,
)
from flatopt.tasks._layers import batch_norm, group_norm, layer_norm
from flatopt.tasks.cnn import conv3x3
from flatopt.tasks.transformer import attention

OPTIMIZEES: dict[str, Optimizee] = {
    "mlp": MLP(sizes=(16, 6, 10)),
    "layernorm-mlp": MLP(sizes=(16, 6, 6, 10), norm="layer", activation="gelu"),
    "sigmoid-he-mlp": MLP(sizes=(16, 6, 10), activation="sigmoid", initialization="he"),
    "cnn": CNN(channels=(4, 8), image_size=4),
    "group-norm-cnn": CNN(channels=(4, 8), image_size=4, norm="group", num_groups=2),
    "batch-norm-cnn": CNN(channels=(4, 8), image_size=4, norm="batch"),
    "lstm": RecurrentNet(width=5, num_rows=4, row_size=4),
    "gru": RecurrentNet(width=5, num_rows=4, row_size=4, cell="gru"),
    "transformer": Transformer(vocab_size=10, width=8, num_heads=2, num_layers=1, context_length=6),
    "vision-transformer": VisionTransformer(image_size=4, patch_size=2, width=8, num_heads=2, num_layers=1),
    "residual-mlp": ResidualMLP(num_inputs=16, width=6, num_blocks=2),
    "gru-language-model": RecurrentLanguageModel(vocab_size=10, width=5),
}
every_optimizee = pytest.mark.parametrize("optimizee", OPTIMIZEES.values(), ids=OPTIMIZEES)


def double(params: Params) -> Params:
    return {name: value.double() for name, value in params.items()}


def make_inputs(optimizee: Optimizee, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    if isinstance(optimizee, Transformer | RecurrentLanguageModel):
        tokens = torch.randint(10, (batch, 7), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]
    inputs = torch.randn(batch, 16, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(10, (batch,), generator=generator)


def loss(optimizee: Optimizee, params: Params, inputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(optimizee.predict(params, inputs), targets)


def reference_loss(module: nn.Module, params: Params, inputs: Tensor) -> Tensor:
    """Run a torch module with the given parameters, which must be exactly its own."""
    module = copy.deepcopy(module).double()
    module.load_state_dict(params)
    return module(inputs)


@every_optimizee
def test_vmapped_gradients_equal_a_loop(optimizee: Optimizee, generator: torch.Generator) -> None:
    many = [double(optimizee.init(generator)) for _ in range(3)]
    data = [make_inputs(optimizee, 5, generator) for _ in range(3)]
    stacked = {name: torch.stack([one[name] for one in many]) for name in many[0]}
    inputs, targets = (torch.stack(part) for part in zip(*data, strict=True))
    step = torch.func.grad(lambda params, x, y: loss(optimizee, params, x, y))
    batched = torch.func.vmap(step)(stacked, inputs, targets)
    for index in range(3):
        leaves = {name: value.requires_grad_() for name, value in many[index].items()}
        gradients = torch.autograd.grad(loss(optimizee, leaves, *data[index]), list(leaves.values()))
        for name, expected in zip(leaves, gradients, strict=True):
            torch.testing.assert_close(batched[name][index], expected, rtol=1e-10, atol=1e-12)


@every_optimizee
def test_the_gradient_equals_finite_differences(optimizee: Optimizee, generator: torch.Generator) -> None:
    params = double(optimizee.init(generator))
    # Away from zero biases, where ReLU has its kinks.
    params = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in params.items()}
    inputs, targets = make_inputs(optimizee, 3, generator)
    direction = {name: torch.randn(value.shape, generator=generator).double() for name, value in params.items()}
    gradient = torch.func.grad(lambda x: loss(optimizee, x, inputs, targets))(params)
    step = 1e-6
    up, down = (
        loss(optimizee, {name: params[name] + s * direction[name] for name in params}, inputs, targets)
        for s in (step, -step)
    )
    reverse = sum((gradient[name] * direction[name]).sum() for name in params)
    torch.testing.assert_close(reverse, (up - down) / (2 * step), rtol=1e-6, atol=1e-8)


@every_optimizee
def test_a_vmapped_gradient_is_one_graph(optimizee: Optimizee, generator: torch.Generator) -> None:
    torch._dynamo.reset()
    params = {name: value.repeat(2, *[1] * value.dim()) for name, value in double(optimizee.init(generator)).items()}
    inputs, targets = (part.repeat(2, *[1] * part.dim()) for part in make_inputs(optimizee, 3, generator))
    step = torch.func.vmap(torch.func.grad(lambda values, x, y: loss(optimizee, values, x, y)))
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(params, inputs, targets), step(params, inputs, targets))


@every_optimizee
def test_init_is_decided_by_the_generator(optimizee: Optimizee) -> None:
    first, again, other = (optimizee.init(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert all(value.dtype == torch.float32 for value in first.values())


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid", "gelu"])
@pytest.mark.parametrize("norm", [None, "layer"])
def test_mlp_equals_sequential(activation: str, norm: str | None, generator: torch.Generator) -> None:
    optimizee = MLP(sizes=(16, 7, 5, 10), activation=activation, norm=norm)  # type: ignore[arg-type]
    params = double(optimizee.init(generator))
    layers: list[nn.Module] = []
    expected_params = []
    for index, (fan_in, fan_out) in enumerate([(16, 7), (7, 5), (5, 10)]):
        layers.append(nn.Linear(fan_in, fan_out))
        expected_params += [params[f"layers.{index}.weight"], params[f"layers.{index}.bias"]]
        if index < 2:
            if norm is not None:
                layers.append(nn.LayerNorm(fan_out))
                expected_params += [params[f"norms.{index}.weight"], params[f"norms.{index}.bias"]]
            layers.append({"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "gelu": nn.GELU}[activation]())
    module = nn.Sequential(*layers)
    assert sum(value.numel() for value in params.values()) == sum(value.numel() for value in module.parameters())
    state = dict(zip(module.state_dict(), expected_params, strict=True))
    inputs = torch.randn(4, 4, 4, generator=generator).double()
    torch.testing.assert_close(optimizee.predict(params, inputs), reference_loss(module, state, inputs.flatten(1)))


@pytest.mark.parametrize("initialization", ["torch", "he"])
def test_initial_weights_have_the_stated_scale(initialization: str, generator: torch.Generator) -> None:
    params = MLP(sizes=(400, 300, 10), initialization=initialization).init(generator)  # type: ignore[arg-type]
    weight, bias = params["layers.0.weight"], params["layers.0.bias"]
    if initialization == "he":
        assert weight.std().item() == pytest.approx((2 / 400) ** 0.5, rel=0.02)
        assert not bias.any()
    else:
        linear = nn.Linear(400, 300)
        assert weight.std().item() == pytest.approx(linear.weight.std().item(), rel=0.02)
        assert weight.abs().max() <= 1 / 20 and bias.abs().max() <= 1 / 20
        assert bias.abs().max() > 0.9 / 20


@pytest.mark.parametrize("size", [1, 4, 7, 8])
def test_conv3x3_equals_conv2d_with_its_gradients(size: int, generator: torch.Generator) -> None:
    inputs = torch.randn(3, size, size, 2, generator=generator).double().requires_grad_()
    weight = torch.randn(5, 2, 3, 3, generator=generator).double().requires_grad_()
    ours = conv3x3(inputs, weight)
    theirs = F.conv2d(inputs.permute(0, 3, 1, 2), weight, stride=2, padding=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.randn(ours.shape, generator=generator).double()
    gradients = [torch.autograd.grad(output, (inputs, weight), cotangent) for output in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_norms_equal_torch(generator: torch.Generator) -> None:
    inputs = 3 + 2 * torch.randn(4, 5, 5, 8, generator=generator).double()
    params = {name: torch.randn(8, generator=generator).double() for name in ("n.weight", "n.bias")}
    expected = F.layer_norm(inputs, (8,), params["n.weight"], params["n.bias"])
    torch.testing.assert_close(layer_norm(params, "n", inputs), expected)
    expected = F.group_norm(inputs.permute(0, 3, 1, 2), 2, params["n.weight"], params["n.bias"]).permute(0, 2, 3, 1)
    torch.testing.assert_close(group_norm(params, "n", inputs, 2), expected)
    channels_first = inputs.permute(0, 3, 1, 2)
    expected = F.batch_norm(channels_first, None, None, params["n.weight"], params["n.bias"], training=True)
    torch.testing.assert_close(batch_norm(params, "n", inputs), expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_cnn_equals_torch_layers(size: int, norm: str, generator: torch.Generator) -> None:
    optimizee = CNN(channels=(4, 6), image_size=size, norm=norm, num_groups=2)  # type: ignore[arg-type]
    params = double(optimizee.init(generator))
    inputs = torch.randn(3, size, size, generator=generator).double()
    hidden = inputs.unsqueeze(1)
    for index in range(2):
        weight, bias = params[f"convs.{index}.weight"], params[f"convs.{index}.bias"]
        hidden = F.conv2d(hidden, weight, bias, stride=2, padding=1)
        scale, shift = params[f"norms.{index}.weight"], params[f"norms.{index}.bias"]
        if norm == "group":
            hidden = F.relu(F.group_norm(hidden, 2, scale, shift))
        else:
            hidden = F.relu(F.batch_norm(hidden, None, None, scale, shift, training=True))
    expected = F.linear(hidden.permute(0, 2, 3, 1).flatten(1), params["head.weight"], params["head.bias"])
    torch.testing.assert_close(optimizee.predict(params, inputs), expected)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_recurrent_net_equals_torch_layers(cell: str, generator: torch.Generator) -> None:
    optimizee = RecurrentNet(width=5, num_rows=6, row_size=3, cell=cell)  # type: ignore[arg-type]
    params = double(optimizee.init(generator))
    module = {"lstm": nn.LSTM, "gru": nn.GRU}[cell](3, 5, batch_first=True).double()
    module.load_state_dict({name[4:]: value for name, value in params.items() if name.startswith("rnn.")})
    inputs = torch.randn(4, 6, 3, generator=generator).double()
    expected = F.linear(module(inputs)[0][:, -1], params["head.weight"], params["head.bias"])
    torch.testing.assert_close(optimizee.predict(params, inputs), expected)


def test_recurrent_language_model_equals_torch_layers(generator: torch.Generator) -> None:
    optimizee = RecurrentLanguageModel(vocab_size=11, width=5)
    params = double(optimizee.init(generator))
    assert params["token_embedding.weight"].std().item() == pytest.approx(1, abs=0.2)  # as nn.Embedding
    module = nn.GRU(5, 5, batch_first=True).double()
    module.load_state_dict({name[4:]: value for name, value in params.items() if name.startswith("rnn.")})
    tokens = torch.randint(11, (4, 6), generator=generator)
    hidden = module(F.embedding(tokens, params["token_embedding.weight"]))[0]
    expected = F.linear(hidden, params["head.weight"], params["head.bias"])
    torch.testing.assert_close(optimizee.predict(params, tokens), expected)


def test_residual_mlp_equals_torch_layers(generator: torch.Generator) -> None:
    optimizee = ResidualMLP(num_inputs=16, width=6, num_blocks=2, num_outputs=3)
    params = double(optimizee.init(generator))
    params = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in params.items()}
    inputs = torch.randn(5, 4, 4, generator=generator).double()

    def affine(name: str, hidden: Tensor) -> Tensor:
        return F.linear(hidden, params[f"{name}.weight"], params[f"{name}.bias"])

    def norm(name: str, hidden: Tensor) -> Tensor:
        return F.layer_norm(hidden, (6,), params[f"{name}.weight"], params[f"{name}.bias"])

    hidden = affine("stem", inputs.flatten(1))
    for index in range(2):
        block = f"blocks.{index}"
        branch = F.gelu(affine(f"{block}.linear1", norm(f"{block}.norm", hidden)))
        assert branch.shape == (5, 12)
        hidden = hidden + affine(f"{block}.linear2", branch)
    torch.testing.assert_close(optimizee.predict(params, inputs), affine("head", norm("norm", hidden)))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_equals_torch(causal: bool, generator: torch.Generator) -> None:
    query, key, value = torch.randn(3, 2, 4, 7, 5, generator=generator).double()
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    torch.testing.assert_close(attention(query, key, value, causal=causal), expected)


def test_vision_transformer_equals_torch_layers(generator: torch.Generator) -> None:
    optimizee = VisionTransformer(image_size=6, patch_size=2, width=8, num_heads=2, num_layers=2)
    params = double(optimizee.init(generator))
    params = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in params.items()}
    images = torch.randn(3, 6, 6, generator=generator).double()
    # A convolution with the patch as kernel and as stride is what most implementations embed patches by.
    kernel = params["stem.weight"].view(8, 1, 2, 2)
    hidden = F.conv2d(images.unsqueeze(1), kernel, params["stem.bias"], stride=2).flatten(2).transpose(1, 2)
    hidden = hidden + params["position_embedding.weight"]
    for index in range(2):
        hidden = encoder_layer(params, f"layers.{index}.")(hidden)
    hidden = F.layer_norm(hidden, (8,), params["norm.weight"], params["norm.bias"]).mean(1)
    expected = F.linear(hidden, params["head.weight"], params["head.bias"])
    torch.testing.assert_close(optimizee.predict(params, images.flatten(1)), expected)


def encoder_layer(params: Params, prefix: str) -> nn.Module:
    """Return torch's block with the parameters that begin with ``prefix``."""
    module = nn.TransformerEncoderLayer(
        8, 2, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    module.load_state_dict(
        {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
    )
    return module


def test_transformer_equals_torch_layers(generator: torch.Generator) -> None:
    optimizee = Transformer(vocab_size=11, width=8, num_heads=2, num_layers=2, context_length=6)
    params = double(optimizee.init(generator))
    params = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in params.items()}
    tokens = torch.randint(11, (3, 5), generator=generator)
    hidden = params["token_embedding.weight"][tokens] + params["position_embedding.weight"][:5]
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    for index in range(2):
        module = encoder_layer(params, f"layers.{index}.")
        hidden = module(hidden, src_mask=mask, is_causal=True)
    hidden = F.layer_norm(hidden, (8,), params["norm.weight"], params["norm.bias"])
    expected = F.linear(hidden, params["head.weight"], params["head.bias"])
    torch.testing.assert_close(optimizee.predict(params, tokens), expected)


@pytest.mark.parametrize("shape", [(6,), (3, 4)])
def test_losses_equal_torch(shape: tuple[int, ...], generator: torch.Generator) -> None:
    logits = torch.randn(*shape, 5, generator=generator).double()
    targets = torch.randint(5, shape, generator=generator)
    torch.testing.assert_close(
        cross_entropy(logits, targets), F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    )
    values = torch.randn(logits.shape, generator=generator).double()
    torch.testing.assert_close(mean_squared_error(logits, values), F.mse_loss(logits, values))
    assert accuracy(logits, logits.argmax(-1)) == 1
    assert accuracy(logits, (logits.argmax(-1) + 1) % 5) == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLP(sizes=(4, 2), activation="swish"), "activation must be one of .* not 'swish'"),  # type: ignore
        (lambda: MLP(sizes=(4, 2), norm="batch"), "norm must be one of"),  # type: ignore[arg-type]
        (lambda: CNN(channels=(6,), image_size=8, norm="group"), "num_groups=4 must divide"),
        (lambda: RecurrentNet(width=2, num_rows=2, row_size=2, cell="sru"), "cell must be"),  # type: ignore[arg-type]
        (
            lambda: Transformer(vocab_size=9, width=9, num_heads=2, num_layers=1, context_length=4),
            "width=9 must be a multiple of num_heads=2",
        ),
        (
            lambda: VisionTransformer(image_size=9, patch_size=2, width=8, num_heads=2, num_layers=1),
            "image_size=9 must be a multiple of patch_size=2",
        ),
    ],
)
def test_impossible_shapes_are_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]
