"""Reads off a TensorRT module what it exports: the facts that the fake of its version is made of.

    python tests/fake_tensorrt/dump.py MODULE [FILE]      # adds to facts.json, or to FILE

``MODULE`` is ``tensorrt`` or ``tensorrt_bindings``. NVIDIA's bindings (wheels ``tensorrt==8.5.3.1``,
``tensorrt-bindings==8.6.1``, ``tensorrt-cu12-bindings==10.3.0``, ``tensorrt-cu13-bindings==11.4.0.106``) load without a GPU,
and without the libraries when shared libraries of the same names with the few functions that they want (``nm -D
--undefined-only tensorrt.so``) stand in for them. That is how facts.json was written. The file names for every version the
names of the module and, for the classes that matter here, members (``m`` method, ``p`` property, ``r`` read-only property, ``c``
anything else), or, for enumerations, their members in order.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

FACTS = Path(__file__).with_name("facts.json")
CLASSES = (
    "Builder", "BuilderFlag", "DataType", "ErrorCodeTRT", "ExecutionContextAllocationStrategy",
    "HardwareCompatibilityLevel", "IBuilderConfig", "ICudaEngine", "IErrorRecorder", "IExecutionContext", "IHostMemory",
    "ILayer", "ILogger", "INetworkDefinition", "IOptimizationProfile", "IProgressMonitor", "ITensor", "ITimingCache",
    "LayerType", "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParser", "OnnxParserFlag", "ParserError",
    "PreviewFeature", "Runtime", "TensorIOMode",
)  # fmt: skip


def dump(module: Any) -> dict[str, Any]:
    """What the module exports: ``{"names": [...], "classes": {class: {member: kind} or [members of an enumeration]}}``."""
    classes: dict[str, Any] = {}
    for name in CLASSES:
        kind = getattr(module, name, None)
        if kind is not None:
            members = getattr(kind, "__members__", None)
            classes[name] = _members(kind) if members is None else list(members)
    return {"names": sorted(n for n in dir(module) if not n.startswith("_")), "classes": classes}


def _members(kind: type) -> dict[str, str]:
    """Kinds of the members; those that add a layer are left out, because the ONNX parser adds them all."""
    found = {}
    for name in dir(kind):
        if not name.startswith(("_", "add_")) or name == "add_optimization_profile":
            member = inspect.getattr_static(kind, name)
            if isinstance(member, property):
                found[name] = "p" if member.fset else "r"
            else:
                found[name] = "m" if callable(getattr(kind, name)) and not isinstance(member, type) else "c"
    return found


def main(arguments: list[str]) -> None:
    """Adds a module to the file of facts."""
    module = importlib.import_module(arguments[0])
    file = Path(arguments[1]) if arguments[1:] else FACTS
    facts = json.loads(file.read_text()) if file.is_file() else {}
    facts[module.__version__] = dump(module)
    file.write_text(encode(facts))


def encode(facts: dict[str, Any]) -> str:
    """As JSON, one line for each class."""
    lines = []
    for version in sorted(facts, key=lambda text: [int(part) for part in text.split(".")]):
        classes = [f'   "{name}": {json.dumps(value)}' for name, value in facts[version]["classes"].items()]
        names = json.dumps(facts[version]["names"])
        lines.append(
            f' "{version}": {{\n  "names": {names},\n  "classes": {{\n' + ",\n".join(classes) + "\n  }\n }"
        )
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main(sys.argv[1:])
