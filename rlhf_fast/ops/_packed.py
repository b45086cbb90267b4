"""A frozen bfloat16 weight on the CPU, packed once for many products with few rows, as in sampling."""

import torch
from torch import Tensor

from . import _native
from ._dispatch import forced_backend
from ._native import Term
from ._rows import flat_rows


class PackedWeight:
    """The weight (O, I) of a linear layer in the layout in which it is multiplied, by the engine or by oneDNN.

    To pack a plain weight in every product would take as long as a product with few rows. The results are bitwise those
    of the plain weight.
    """

    def __init__(self, weight: Tensor) -> None:
        self._features = weight.shape[0]
        self._by_engine = _native.pack_bfloat16(weight.T) if _engine_packs() else None
        self._by_onednn = None if self._by_engine else torch.ops.mkldnn._reorder_linear_weight(weight, None)

    @staticmethod
    def can_pack(weight: Tensor) -> bool:
        if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
            return False
        onednn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return _engine_packs() or onednn

    def linear(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """hidden (..., I) x weight^T + bias (O,) -> (..., O), bfloat16. Not differentiable."""
        if self._by_engine is None:
            output: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self._by_onednn, bias, "none", [], "")
            return output
        rows = flat_rows(hidden)
        out = rows.new_empty(rows.shape[0], self._features)
        _native.bfloat16_product(out, [Term(rows, self._by_engine.pairs, packed=self._by_engine)], bias)
        return out.view(*hidden.shape[:-1], self._features)


def _engine_packs() -> bool:
    return forced_backend() != "torch" and _native.prefers_bfloat16()
