"""What the contract checks, on a backend that only records what reaches it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lp_edge.engines.runner import Array, Runner, TensorSpec, to_host
from lp_edge.errors import EngineError, TensorError

IMAGE = TensorSpec("image", np.dtype("uint8"), ("N", 4, "?w", 3))
KP = TensorSpec("kp", np.dtype("float32"), ("N", 5, 2))
OUT = (TensorSpec("a", np.dtype("float32"), ("N",)), TensorSpec("b", np.dtype("float32"), ("N",)))


class Recorder(Runner):
    """Returns the batch size and keeps what it was fed."""

    def __init__(self, returns: tuple[str, ...] = ("a", "b")) -> None:
        super().__init__("net", (IMAGE, KP), OUT)
        self.seen: dict[str, Any] = {}
        self.asked: tuple[str, ...] = ()
        self.closes = 0
        self.returns = returns

    backend = "recorder"
    device = "nowhere"

    def _infer(self, feeds: Mapping[str, Array], outputs: tuple[str, ...]) -> dict[str, Array]:
        self.seen, self.asked = dict(feeds), outputs
        n = feeds["kp"].shape[0]
        return {name: np.full(n, n, np.float32) for name in outputs if name in self.returns}

    def _close(self) -> None:
        self.closes += 1


def feeds(n: int = 2, w: int = 6) -> dict[str, np.ndarray]:
    return {"image": np.zeros((n, 4, w, 3), np.uint8), "kp": np.zeros((n, 5, 2), np.float32)}


def refuse(changes: Mapping[str, Any], *words: str) -> None:
    good: dict[str, Any] = feeds()
    good.update(changes)
    with Recorder() as runner, pytest.raises(TensorError) as caught:
        runner.infer({k: v for k, v in good.items() if v is not None})
    assert not runner.seen, "a refused call must not reach the backend"
    assert caught.value.remedy
    for word in words:
        assert word in str(caught.value)


def test_good_call_gives_all_outputs() -> None:
    with Recorder() as runner:
        assert list(runner.infer(feeds())) == ["a", "b"]
        assert not runner.loans
        assert str(runner.inputs["image"]) == "image uint8 [N, 4, ?w, 3]"


def test_subset_of_outputs() -> None:
    with Recorder() as runner:
        assert list(runner.infer(feeds(), ["b", "b"])) == ["b"]
        assert runner.asked == ("b",)
        for wrong in ([], ["c"], "a"):
            with pytest.raises(TensorError, match="a, b"):
                runner.infer(feeds(), wrong)


def test_names() -> None:
    refuse({"kp": None}, "kp is missing", "float32 [N, 5, 2]")
    refuse({"typo": np.zeros(1)}, "'typo'", "image, kp")


def test_dtypes() -> None:
    refuse({"kp": np.zeros((2, 5, 2))}, "kp", "float64", "expected float32")
    refuse({"kp": np.zeros((2, 5, 2), ">f4")}, "kp", "expected float32")
    refuse({"kp": [[0.0]]}, "kp is a list", "numpy.float32")


def test_shapes() -> None:
    refuse({"kp": np.zeros((2, 5), np.float32)}, "[2, 5]", "3 axes [N, 5, 2]")
    refuse({"kp": np.zeros((2, 6, 2), np.float32)}, "[2, 6, 2]", "axis 1 is 5")
    refuse({"kp": np.zeros((3, 5, 2), np.float32)}, "N = 2, as in image")
    refuse({"image": np.zeros((0, 4, 6, 3), np.uint8)}, "empty")


def test_inputs_become_contiguous_without_losing_values() -> None:
    wide = np.arange(2 * 4 * 12 * 3, dtype=np.uint8).reshape(2, 4, 12, 3)
    with Recorder() as runner:
        runner.infer({**feeds(), "image": wide[:, :, ::2]})
        assert runner.seen["image"].flags.c_contiguous
        np.testing.assert_array_equal(runner.seen["image"], wide[:, :, ::2])
        kp = feeds()["kp"]
        runner.infer({**feeds(), "kp": kp})
        assert runner.seen["kp"] is kp, "a contiguous array is not copied"


def test_device_array_reaches_a_host_backend_as_numpy() -> None:
    class OnDevice:
        shape = (2, 5, 2)
        dtype = "float32"

        def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
            return np.full((2, 5, 2), 7, np.float32)

    with Recorder() as runner:
        runner.infer({**feeds(), "kp": OnDevice()})
        assert isinstance(runner.seen["kp"], np.ndarray) and runner.seen["kp"].min() == 7


def test_to_host_keeps_scalars() -> None:
    assert to_host(np.array(3.0)).shape == ()


def test_backend_that_forgets_an_output_is_named() -> None:
    with Recorder(returns=("a",)) as runner, pytest.raises(EngineError, match="recorder did not return b"):
        runner.infer(feeds())


def test_close_is_idempotent_and_final() -> None:
    runner = Recorder()
    runner.close()
    runner.close()
    assert runner.closes == 1
    with pytest.raises(EngineError, match="closed") as caught:
        runner.infer(feeds())
    assert not isinstance(caught.value, TensorError)


@given(n=st.integers(1, 4), m=st.integers(1, 4), w=st.integers(1, 9), five=st.integers(4, 6))
def test_accepts_exactly_what_fits(n: int, m: int, w: int, five: int) -> None:
    arrays = {"image": np.zeros((n, 4, w, 3), np.uint8), "kp": np.zeros((m, five, 2), np.float32)}
    with Recorder() as runner:
        if n == m and five == 5:
            assert runner.infer(arrays)["a"].shape == (n,)
        else:
            with pytest.raises(TensorError):
                runner.infer(arrays)
