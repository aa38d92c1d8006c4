"""Arrays on a chosen stream of a simulated device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lp_edge.engines.cuda import Cuda, CudaStream
from lp_edge.engines.device import DeviceArray, device_array


def to_device(cuda: Cuda, array: npt.NDArray[Any], stream: CudaStream) -> DeviceArray:
    """A copy of ``array`` on the device, queued on ``stream``; errors as of ``Cuda.alloc`` and ``Cuda.copy_to_device``."""
    result = device_array(cuda, array.shape, array.dtype, stream)
    cuda.copy_to_device(np.asarray(array, order="C"), result.buffer, stream)
    return result
