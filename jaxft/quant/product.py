"""The product with a quantised kernel, which keeps nothing of it for the backward pass but the kernel itself."""

import jax

from .leaf import Quantized


@jax.custom_vjp
def product(x: jax.Array, kernel: Quantized) -> jax.Array:
    """Return `x dequantize(kernel)`, computed in the dtype of `x`.

    Without a rule of its own the backward pass would keep the dequantised kernels of all layers. It makes them anew,
    and gives a gradient to `x` alone.

    Args:
        x: `[..., in]`.
        kernel: Of `(in, out)`.

    Returns:
        `[..., out]`.
    """
    return kernel.times(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def _forward(x: jax.Array, kernel: Quantized) -> tuple[jax.Array, Quantized]:
    return product(x, kernel), kernel


def _backward(kernel: Quantized, dy: jax.Array) -> tuple[jax.Array, None]:
    return kernel.times_transposed(dy.reshape(-1, dy.shape[-1])).reshape(*dy.shape[:-1], -1), None


product.defvjp(_forward, _backward)
