"""Which operators a model asks for; needs onnx, not PyTorch."""

from __future__ import annotations

import onnx  # noqa: TID253

from lp_edge.errors import ExportError

__all__ = ["DEFAULT_DOMAINS", "opset_of"]

DEFAULT_DOMAINS = frozenset({"", "ai.onnx"})
"""The two spellings of the domain of ONNX's own operators."""


def opset_of(model: onnx.ModelProto) -> int:
    """Version of ONNX's own operator set that the model asks for.

    Raises:
        ExportError: the model asks for none.
    """
    for entry in model.opset_import:
        if entry.domain in DEFAULT_DOMAINS:
            return int(entry.version)
    raise ExportError("the model names no opset", "expected one of ONNX's own operators", "export it again")
