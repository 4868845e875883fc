"""The multi-layer perceptron, with its gradients derived by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trainer.models.mlp import MLP


def build(**options):
    model = MLP(**{"input_size": 12, "num_classes": 5, "hidden_sizes": [8, 7], **options})
    model.reset_parameters(torch.Generator().manual_seed(0))
    return model


def test_hand_derived_gradients_match_autograd():
    """dL/dz = softmax(z) - onehot for L = -log softmax(z)[label]; then per layer, from the top, with y = W x + b:
    dL/dW = dL/dy x^T, dL/db = dL/dy, dL/dx = W^T dL/dy, and through a ReLU only where its input was positive."""
    rng = np.random.default_rng(0)
    inputs, labels = rng.normal(size=(6, 3, 4)), rng.integers(0, 5, 6)
    model = build().double()
    logits = model({"inputs": torch.tensor(inputs)})
    F.cross_entropy(logits, torch.tensor(labels), reduction="sum").backward()

    layers = [*model.hidden, model.head]
    weights = [layer.weight.detach().numpy() for layer in layers]
    biases = [layer.bias.detach().numpy() for layer in layers]
    activations = [inputs.reshape(6, 12)]
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        activations.append(np.maximum(activations[-1] @ weight.T + bias, 0))
    z = activations[-1] @ weights[-1].T + biases[-1]
    np.testing.assert_allclose(z, logits.detach().numpy(), atol=1e-12)

    exponentials = np.exp(z - z.max(axis=1, keepdims=True))
    upstream = exponentials / exponentials.sum(axis=1, keepdims=True) - np.eye(5)[labels]
    for index in reversed(range(3)):
        np.testing.assert_allclose(layers[index].weight.grad.numpy(), upstream.T @ activations[index], atol=1e-12)
        np.testing.assert_allclose(layers[index].bias.grad.numpy(), upstream.sum(axis=0), atol=1e-12)
        upstream = (upstream @ weights[index]) * (activations[index] > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_of_any_shape_are_taken_in_the_parameters_precision(dtype):
    model = build().to(dtype)
    inputs = torch.rand(2, 3, 4)
    assert model({"inputs": inputs}).dtype == dtype
    torch.testing.assert_close(model({"inputs": inputs}), model({"inputs": inputs.view(2, 12)}))


def test_without_hidden_layers_it_is_a_linear_classifier():
    model, inputs = build(hidden_sizes=[]), torch.rand(2, 12)
    torch.testing.assert_close(model({"inputs": inputs}), inputs @ model.head.weight.T + model.head.bias)


def test_dropout_works_in_training_only():
    model, batch = build(dropout=0.5), {"inputs": torch.rand(2, 12)}
    torch.manual_seed(0)
    assert not torch.equal(model(batch), model(batch))
    model.eval()
    assert torch.equal(model(batch), model(batch))


def test_initial_deviations_keep_the_variance_through_relus():
    model = build(input_size=300, hidden_sizes=[400])
    assert math.isclose(model.hidden[0].weight.std().item(), math.sqrt(2 / 300), rel_tol=0.03)
    assert (model.hidden[0].bias == 0).all()


def test_flops_count_every_matrix():
    assert build().flops_per_sample() == 6 * (12 * 8 + 8 * 7 + 7 * 5)
