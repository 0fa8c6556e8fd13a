"""What an engine knows of a network: its sizes and its parts, not the class that they make."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from fastphi.config import UNetConfig


class Network(Protocol):
    """A denoiser of `config`'s sizes, as an engine sees it (`fastphi.UNet` is one).

    Its parts are modules named enc1 ... mid ... up{b}, dec{b} ... dec1: lists of layers with `weight`,
    `bias`, `gamma`, and up-samplings with `weight`, `bias`.
    """

    config: UNetConfig
    backend: str
    _modules: dict[str, Any]
    WALK: ClassVar[tuple[str, ...]]
    """Its methods that call the parts, and that an engine stands in for."""

    def twin(self) -> Any:
        """A network as its configuration says, without values (on torch's device meta)."""
        ...

    def get_submodule(self, target: str) -> nn.Module: ...
    def named_modules(self) -> Iterator[tuple[str, Any]]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]: ...


def parameters_of(model: Network) -> list[Tensor]:
    """The parameters in network order, as `parameters` gives them, in a tenth of its time."""
    blocks = model._modules.values()
    parts = (part for block in blocks for part in (block, *block._modules.values()))
    return [p for part in parts for p in part._parameters.values() if p is not None]
