"""Writes down what PyNvVideoCodec exports, so that the fake can be held to it: ``facts.json``.

The native module needs ``libcuda.so.1``, but calls nothing of it while it is imported: without a driver a library with
empty functions of the names that it wants (``nm -D --undefined-only``) will do. From the folder of an unpacked wheel::

    LD_LIBRARY_PATH=<stub>:PyNvVideoCodec:pynvvideocodec. python -m lp_edge.tests.fake_nvcodec.dump 2.2.4 PyNvVideoCodec 130

The wheel holds one module for drivers from 570 on (130) and one for older ones (121); they load one per process.

The names of the encoder's options are no exports: they are words of the native module and keys of NVIDIA's samples.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

FACTS = Path(__file__).with_name("facts.json")
OPTIONS = ("gpu_id", "codec", "preset", "tuning_info", "rc", "cq", "bf", "gop", "idrperiod", "fps")


def dump(module: Any) -> dict[str, Any]:
    """Names of the module; of its classes the members, of its functions the signatures."""
    classes, functions, others = {}, {}, []
    for name in sorted(n for n in dir(module) if not n.startswith("_")):
        value = getattr(module, name)
        if isinstance(value, type):
            classes[name] = sorted(m for m in dir(value) if not m.startswith("__"))
        elif callable(value):
            lines = (value.__doc__ or "").splitlines()
            functions[name] = [line.strip() for line in lines if " -> " in line and name in line]
        else:
            others.append(name)
    return {"classes": classes, "functions": functions, "names": others}


if __name__ == "__main__":
    version, folder, generation = sys.argv[1:]
    (file,) = Path(folder).glob(f"PyNvVideoCodec_{generation}.*.so")
    spec = importlib.util.spec_from_file_location("_PyNvVideoCodec", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    facts = json.loads(FACTS.read_text()) if FACTS.is_file() else {}
    facts |= {"version": version, "encoder_options": OPTIONS, generation: dump(module)}
    FACTS.write_text(json.dumps(facts, indent=1) + "\n")
