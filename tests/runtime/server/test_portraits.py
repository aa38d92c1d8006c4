"""The store of portraits: bounds, expiry, pins, and the memory it counts."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from lp_edge.engines.backends import BackendConfig
from lp_edge.errors import ConfigError, LimitError, NotFoundError
from lp_edge.runtime.animator import Animator
from lp_edge.runtime.family import Portrait
from lp_edge.runtime.options import AnimateOptions
from lp_edge.runtime.server.config import Limits
from lp_edge.runtime.server.portraits import PortraitStore, StoredPortrait, memory_of

KIB = 1 << 10


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def never(device: int) -> list[Portrait]:
    raise AssertionError(f"prepared on device {device}")


def add(store: PortraitStore, kib: int = 1, ttl_s: float | None = None, prepare=never) -> StoredPortrait:
    return store.add(np.zeros(kib * KIB, np.uint8), AnimateOptions(), [], {0: []}, ttl_s, prepare=prepare)


def store_of(clock: Clock, portraits: int = 64, mib: int = 1) -> PortraitStore:
    return PortraitStore(Limits(max_portraits=portraits, max_portrait_bytes=mib << 20), 100.0, clock)


# -- memory --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Nested:
    array: np.ndarray
    table: dict[str, object]


class _OnDevice:
    shape, dtype = (2, 3), "float16"

    def __array__(self, *args: object, **kwargs: object) -> np.ndarray:
        raise AssertionError("counting copies nothing")


def test_every_array_counts_once() -> None:
    one, two = np.zeros(100, np.float32), np.zeros((10, 10), np.uint8)
    assert memory_of(_Nested(one, {"again": one, "list": [two, (one, two)]}), one) == 400 + 100


def test_a_view_counts_as_the_array_that_it_keeps_alive() -> None:
    large = np.zeros((100, 100), np.uint8)
    assert memory_of(large[:2], large[5:, ::2]) == 10_000


def test_device_tensors_count_without_a_transfer() -> None:
    assert memory_of({"features": _OnDevice()}) == 12


def test_what_is_no_array_counts_nothing() -> None:
    assert memory_of(None, 1, "text", {"a": [b"bytes"]}, _Nested) == 0


@pytest.mark.parametrize("family", ["toy_bundle", "liveportrait_bundle"])
def test_prepared_portraits_are_measured(family: str, request: pytest.FixtureRequest) -> None:
    bundle: Path = request.getfixturevalue(family)
    rgb = np.zeros((200, 240, 3), np.uint8)
    rgb[60:140, 60:140] = 255
    with Animator(bundle, backend=BackendConfig("cpu", threads=1)) as animator:
        portraits = animator.prepare_source(rgb)
    one = memory_of(portraits)
    parts = [v for v in vars(portraits[0]).values() if isinstance(v, np.ndarray)]
    assert one >= memory_of(parts, portraits[0].motion) > rgb.nbytes
    if family == "liveportrait_bundle":
        features = sum(array.nbytes for array in portraits[0].features.values())
        assert one > memory_of(parts) + features > memory_of(parts), "features lie deeper"
    # Frame and picture are the same pixels.
    assert memory_of(rgb, portraits) == one


# -- finding ---------------------------------------------------------------------------------------------------


def test_a_portrait_is_found_by_its_id(clock: Clock) -> None:
    store = store_of(clock)
    portrait = add(store, 3)
    assert store.get(portrait.id) is portrait
    assert len(portrait.id) == 22
    assert portrait.memory_bytes == store.memory_bytes == 3 * KIB
    assert len({add(store).id for _ in range(50)}) == 50


def test_an_unknown_id_is_told_without_repeating_it(clock: Clock) -> None:
    with pytest.raises(NotFoundError) as caught:
        store_of(clock).get("abcdefghijklmnop\n" * 1000)
    assert "'abcdef…'" in str(caught.value)
    assert len(str(caught.value)) < 200
    with pytest.raises(NotFoundError, match="no portrait ''"):
        store_of(clock).delete("")


def test_the_list_begins_with_the_one_used_last(clock: Clock) -> None:
    store = store_of(clock)
    first, second, third = add(store), add(store), add(store)
    store.get(first.id)
    assert store.list() == (first, third, second)
    with store.pinned(second.id):
        store.get(third.id)
    assert store.list() == (second, third, first)


def test_deleting_forgets(clock: Clock) -> None:
    store = store_of(clock)
    portrait = add(store)
    store.delete(portrait.id)
    assert (store.list(), store.memory_bytes, len(store)) == ((), 0, 0)
    with pytest.raises(NotFoundError):
        store.delete(portrait.id)


# -- expiry ----------------------------------------------------------------------------------------------------


def test_the_time_to_live_counts_from_the_last_use(clock: Clock) -> None:
    store = store_of(clock)
    short, long = add(store, ttl_s=10), add(store)
    clock.seconds += 9
    assert short.expires_at == pytest.approx(short.created_at + 10)
    store.get(short.id)
    assert short.expires_at == pytest.approx(short.created_at + 19)
    clock.seconds += 9
    assert store.get(short.id) is short
    clock.seconds += 10
    with pytest.raises(NotFoundError):
        store.get(short.id)
    assert store.list() == (long,)
    clock.seconds += 90
    store.expire()
    assert (len(store), store.memory_bytes) == (0, 0)


def test_looking_at_the_list_is_no_use(clock: Clock) -> None:
    store = store_of(clock)
    add(store, ttl_s=10)
    clock.seconds += 6
    assert len(store.list()) == 1
    clock.seconds += 6
    assert store.list() == ()


def test_a_portrait_in_use_does_not_expire(clock: Clock) -> None:
    store = store_of(clock)
    portrait = add(store, ttl_s=10)
    with store.pinned(portrait.id) as held, store.pinned(portrait.id):
        assert held is portrait and portrait.active == 2
        clock.seconds += 1000
        store.expire()
        assert store.list() == (portrait,)
        assert portrait.expires_at == pytest.approx(portrait.created_at + 1010)
    assert portrait.active == 0
    clock.seconds += 9
    assert store.list() == (portrait,)
    clock.seconds += 1
    assert store.list() == ()


@pytest.mark.parametrize("ttl", [0, -1, 101, float("nan"), float("inf")])
def test_times_to_live_out_of_range_are_refused(clock: Clock, ttl: float) -> None:
    with pytest.raises(ConfigError, match="at most 100 s"):
        add(store_of(clock), ttl_s=ttl)


# -- bounds ----------------------------------------------------------------------------------------------------


def test_the_one_unused_for_longest_makes_room_for_bytes(clock: Clock) -> None:
    store = store_of(clock)
    first, second, third = (add(store, 300) for _ in range(3))
    store.get(first.id)
    fourth = add(store, 500)
    assert store.list() == (fourth, first)
    assert store.memory_bytes == 800 * KIB
    for gone in (second, third):
        with pytest.raises(NotFoundError):
            store.get(gone.id)


def test_the_one_unused_for_longest_makes_room_for_a_number(clock: Clock) -> None:
    store = store_of(clock, portraits=2)
    add(store)
    second, third = add(store), add(store)
    assert store.list() == (third, second)


def test_what_expired_makes_room_before_what_lives(clock: Clock) -> None:
    store = store_of(clock, portraits=2)
    lives = add(store)
    expires = add(store, ttl_s=1)
    clock.seconds += 2
    newer = add(store)
    assert expires not in store.list()
    assert store.list() == (newer, lives)


def test_one_that_is_too_large_is_refused_and_nothing_goes(clock: Clock) -> None:
    store = store_of(clock)
    portrait = add(store)
    with pytest.raises(LimitError, match="at most 1048576") as caught:
        add(store, 1025)
    assert caught.value.retry_after_s == 0  # no waiting helps
    assert store.list() == (portrait,)


def test_streams_keep_their_portraits_and_the_new_one_is_refused(clock: Clock) -> None:
    store = store_of(clock)
    free, used = add(store, 100), add(store, 900)
    with store.pinned(used.id):
        with pytest.raises(LimitError, match="streams use the others") as caught:
            add(store, 200)
        assert caught.value.retry_after_s > 0
        assert set(store.list()) == {free, used}, "what would not have helped stays"
        add(store, 124)
        assert used in store.list() and free not in store.list()
    add(store, 200)
    assert used not in store.list()


def test_a_deleted_portrait_counts_until_its_stream_lets_go(clock: Clock) -> None:
    store = store_of(clock)
    portrait = add(store, 900)
    with store.pinned(portrait.id):
        store.delete(portrait.id)
        assert store.list() == ()
        with pytest.raises(NotFoundError):
            store.get(portrait.id)
        assert store.memory_bytes == 900 * KIB
        with pytest.raises(LimitError):
            add(store, 200)
    assert store.memory_bytes == 0
    add(store, 1024)


def test_a_pin_is_released_when_its_stream_fails(clock: Clock) -> None:
    store = store_of(clock)
    portrait = add(store)
    with pytest.raises(RuntimeError), store.pinned(portrait.id):
        raise RuntimeError
    assert portrait.active == 0


# -- other devices ---------------------------------------------------------------------------------------------


def on_device(rgb: np.ndarray, kib: int) -> list[Portrait]:
    return [Portrait(rgb, np.zeros(kib * KIB, np.uint8), None)]  # type: ignore[arg-type]


def test_another_device_is_prepared_once_and_counted(clock: Clock) -> None:
    store = store_of(clock)
    calls: list[int] = []

    def prepare(device: int) -> list[Portrait]:
        calls.append(device)
        return on_device(portrait.rgb, 10)

    portrait = add(store, 5, prepare=prepare)
    assert portrait.prepared(0) == []
    with store.pinned(portrait.id):
        barrier, found = threading.Barrier(4), []

        def ask() -> None:
            barrier.wait(10)
            found.append(portrait.prepared(1))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert calls == [1]
    assert len(found) == 4 and all(f[0] is found[0][0] for f in found)
    assert portrait.memory_bytes == store.memory_bytes == 15 * KIB


def test_a_second_copy_makes_room_or_is_refused(clock: Clock) -> None:
    store = store_of(clock)
    portrait = add(store, 500, prepare=lambda device: on_device(portrait.rgb, 300 * device))
    other = add(store, 500)
    with store.pinned(portrait.id):
        portrait.prepared(1)
        assert store.list() == (portrait,) and other.memory_bytes == 500 * KIB
        with pytest.raises(LimitError):
            portrait.prepared(2)
        assert portrait.memory_bytes == store.memory_bytes == 800 * KIB
        assert len(portrait.prepared(1)) == 1


def test_many_threads_leave_the_store_in_order() -> None:
    store = PortraitStore(Limits(max_portraits=5, max_portrait_bytes=1 << 20), 100.0)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(200):
                try:
                    portrait = add(store, int(rng.integers(1, 400)))
                    with store.pinned(portrait.id):
                        if rng.random() < 0.3:
                            store.delete(portrait.id)
                        store.list()
                        assert store.memory_bytes <= 1 << 20
                except (LimitError, NotFoundError):
                    pass
        except BaseException as error:  # noqa: BLE001 - told by the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors
    assert len(store) <= 5
    assert store.memory_bytes == sum(p.memory_bytes for p in store.list())
    assert all(p.active == 0 for p in store.list())
