"""What csrc/module.cpp defines."""

from typing import Any, Literal

def build_info() -> dict[str, Any]: ...
def calls() -> dict[str, dict[str, int]]: ...
def install_triton(launchers: object) -> None: ...
def cuda_class_borders(
    *,
    dtype: Literal["float32", "float64", "bfloat16", "float16"],
    pass_: Literal["forward", "forward_with_gradient", "backward"],
    columns: bool,
    general: bool,
    positions: int,
    most: int,
) -> list[int]: ...
