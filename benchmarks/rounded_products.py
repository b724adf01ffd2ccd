"""`repro` on a CPU, with the operands of every float32 matrix product rounded as an accelerator would round them.

    python benchmarks/rounded_products.py 7 reproduce pocket ...     # bfloat16, a TPU's way
    python benchmarks/rounded_products.py 10 reproduce pocket ...    # TensorFloat-32, an Ampere GPU's and later

That is what `jax_default_matmul_precision` leaves to the device: sums stay in float32, and so do all other operations.
A CPU has one precision, whatever is asked for.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
from jax.extend.core.primitives import dot_general_p
from jax.interpreters import mlir

FLOAT32_EXPONENT_BITS = 8


def round_products(mantissa_bits: int) -> None:
    """Round the operands of every float32 matrix product that this process compiles from now on, gradients' included.

    The lowering is replaced, because only there are the products of gradients, loops and libraries all in sight.

    Args:
        mantissa_bits: what is left of float32's 23.
    """
    plain = mlir._platform_specific_lowerings["cpu"][dot_general_p].rule

    def rounded(operand: jax.Array) -> jax.Array:
        return jax.lax.reduce_precision(operand, FLOAT32_EXPONENT_BITS, mantissa_bits)

    def lower(ctx: mlir.LoweringRuleContext, *operands: Any, **parameters: Any) -> Any:
        values = []
        for operand, aval in zip(operands, ctx.avals_in, strict=True):
            if aval.dtype == jax.numpy.float32:
                alone = ctx.replace(avals_in=[aval], avals_out=[aval])
                (operand,) = mlir.lower_fun(rounded, multiple_results=False)(alone, operand)
            values.append(operand)
        return plain(ctx, *values, **parameters)

    mlir.register_lowering(dot_general_p, lower, platform="cpu")


def main() -> int:
    from repro.__main__ import main as run

    if len(sys.argv) < 3 or not sys.argv[1].isdecimal():
        raise SystemExit(__doc__)
    round_products(int(sys.argv[1]))
    return run(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
