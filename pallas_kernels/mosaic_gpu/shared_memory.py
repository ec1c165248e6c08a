"""How 16-bit matrices lie in shared memory."""

from jax.experimental.pallas import mosaic_gpu as plgpu


def swizzled(columns: int) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """As copies write a matrix of so many columns and matrix instructions read it, in the widest swizzle there is."""
    swizzle = plgpu.find_swizzle(columns * 16)
    return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]
