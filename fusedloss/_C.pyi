"""What csrc/module.cpp defines."""

from types import ModuleType
from typing import Any, Literal

fusedloss: ModuleType
fusedloss_triton: ModuleType

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
