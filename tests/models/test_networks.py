"""Networks: shapes, and the convolution against XLA's."""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nodepint_mpi.errors import ProblemError
from nodepint_mpi.models.networks import Conv3x3, make_conv, make_dense

DENSE: dict[str, Any] = dict(width=8, depth=1, activation="tanh", time_dependent=True)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("sides", [(7, 7), (8, 5)])
def test_convolution_by_patches_equals_xla(key, stride, sides):
    conv = Conv3x3(3, 4, stride=stride, key=key)
    image = jax.random.normal(key, (*sides, 3))
    wanted = jax.lax.conv_general_dilated(
        image[None],
        conv.weight.reshape(3, 3, 3, 4),
        (stride, stride),
        [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )[0]
    np.testing.assert_allclose(conv(image), wanted, atol=1e-13)


@pytest.mark.parametrize("sides", [(28, 28), (8, 8), (9, 6)])
def test_conv_model_maps_images_to_classes(key, sides):
    model = make_conv(key, input_shape=sides, output_size=10, channels=4)
    u = model.encoder(jnp.ones(sides))
    assert u.shape == (-(-sides[0] // 4), -(-sides[1] // 4), 4)
    assert model.processor(jnp.array(0.5), u, None).shape == u.shape
    assert model.decoder(u).shape == (10,)


def test_a_positive_state_evolves_in_logarithms(key):
    model = make_dense(key, input_shape=(2,), output_size=2, positive=True, **DENSE)
    x = jnp.array([0.2, 3.0])
    np.testing.assert_allclose(model.decoder(model.encoder(x)), x, rtol=1e-14)
    early, late = (model.processor(jnp.array(t), model.encoder(x), None) for t in (0.0, 1.0))
    assert np.any(early != late)


def test_a_layered_field_in_euler_steps_is_a_residual_network(key):
    model = make_conv(key, input_shape=(8, 8), output_size=3, channels=2, layers=4)
    state = model.encoder(jax.random.normal(key, (8, 8)))
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(model.processor), diffrax.Euler(), 0.0, 4.0, 1.0, state
    )
    assert solution.ys is not None
    processor: Any = model.processor
    weights = processor.layers
    wanted = np.asarray(state)
    for n in range(4):
        seen = wanted
        for conv, outer in ((weights.first, np.tanh), (weights.second, lambda x: x)):
            kernel = np.asarray(conv.weight[n]).reshape(3, 3, 3, 2)[:, :, :2]  # time is zero
            padded = np.pad(seen, ((1, 1), (1, 1), (0, 0)))
            patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(0, 1))
            seen = outer(np.einsum("xycij,ijco->xyo", patches, kernel) + np.asarray(conv.bias[n]))
        wanted = wanted + seen
    np.testing.assert_allclose(solution.ys[0], wanted, atol=1e-12)


def test_a_dense_model_maps_images_to_classes(key):
    options = DENSE | {"positive": False, "latent": 6}
    model = make_dense(key, input_shape=(5, 4), output_size=3, **options)
    image = jax.random.normal(key, (5, 4))
    u = model.encoder(image)
    affine: Any = model.encoder
    np.testing.assert_allclose(
        u, affine.linear.weight @ np.ravel(image) + affine.linear.bias, atol=1e-13
    )
    assert model.processor(jnp.array(0.5), u, None).shape == u.shape == (6,)
    assert model.decoder(u).shape == (3,)


def test_networks_refuse_samples_of_another_kind(key):
    with pytest.raises(ProblemError, match="gray images"):
        make_conv(key, input_shape=(3,), output_size=10, channels=4)
    with pytest.raises(ProblemError, match="observed vector itself"):
        make_dense(key, input_shape=(2,), output_size=3, positive=False, **DENSE)
