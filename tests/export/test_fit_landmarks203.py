"""The fit of the eye and lip ratios: it finds a known map, and the constants in the runtime are what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lp_edge.export.mesh.fit_landmarks203 import EYE_FLOOR, STEEPEST, Ratios, fit, main, report
from lp_edge.runtime.landmarks203 import CALIBRATION, RatioMap

TRUE = RatioMap(EYE_FLOOR, 0.08, 0.22, 0.7, 0.9)


def clip(frames: int, seed: int, noise: float = 0.0) -> Ratios:
    rng = np.random.default_rng(seed)
    eyes, lips = rng.uniform(0.02, 0.35, (frames, 2)), rng.uniform(0, 1.2, frames)
    return Ratios(
        eyes,
        lips,
        TRUE.eye(eyes) + noise * rng.normal(size=eyes.shape),
        TRUE.lip(lips) + noise * rng.normal(size=lips.shape),
    )


def test_finds_a_known_map() -> None:
    made = fit([clip(80, 0), clip(40, 1)])
    np.testing.assert_allclose(
        [made.eye_shut, made.eye_open, made.lip_limit, made.lip_gain], [0.08, 0.22, 0.7, 0.9], atol=2e-3
    )
    noisy = fit([clip(400, 2, 0.02), clip(400, 3, 0.02)])
    x = np.linspace(0, 0.35, 50)
    assert np.abs(noisy.eye(x) - TRUE.eye(x)).max() < 0.015
    assert np.abs(noisy.lip(3 * x) - TRUE.lip(3 * x)).max() < 0.01


def test_the_map_of_the_eyes_is_never_steeper_than_allowed() -> None:
    x = np.linspace(0.0, 0.4, 200)
    step = np.where(x > 0.2, x, EYE_FLOOR)
    made = fit([Ratios(np.stack([x, x], 1), x, np.stack([step, step], 1), TRUE.lip(x))])
    assert made.eye_shut < 0.2 < made.eye_open
    assert np.diff(made.eye(x)).max() / np.diff(x).max() <= STEEPEST + 0.05


def test_every_clip_weighs_alike() -> None:
    a, b = clip(60, 4, 0.05), clip(60, 5, 0.05)
    longer = Ratios(
        *(np.concatenate([getattr(b, f)] * 5) for f in ("eyes", "lips", "wanted_eyes", "wanted_lips"))
    )
    assert fit([a, longer]) == fit([a, b])


def test_left_out_clips_are_left_out() -> None:
    """A clip whose ratios mean something else spoils the fitted figures of the others, not its own left-out ones."""
    good = {str(i): clip(60, i) for i in range(2)}
    odd = clip(60, 9)
    odd = Ratios(odd.eyes, odd.lips, odd.wanted_eyes + 0.2, odd.wanted_lips)
    figures = report({**good, "odd": odd})["clips"]
    assert isinstance(figures, dict)
    assert figures["odd"]["eyes"]["left_out"]["mean_abs"] == pytest.approx(0.2, abs=2e-3)
    assert figures["odd"]["eyes"]["fitted"]["mean_abs"] < 0.19


def test_no_clips() -> None:
    with pytest.raises(ValueError, match="no clip"):
        fit([])


def test_runtime_constants_are_what_the_samples_give(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--samples", str(shared / "samples" / "driving")])
    printed = json.loads(capsys.readouterr().out)
    made = RatioMap(**printed["calibration"])
    x = np.linspace(0, 0.4, 41)
    # backends round differently: the curves count, not the last digit
    np.testing.assert_allclose(made.eye(x), CALIBRATION.eye(x), atol=4e-3)
    np.testing.assert_allclose(made.lip(3 * x), CALIBRATION.lip(3 * x), atol=4e-3)
    for name, figures in printed["clips"].items():
        eyes, lips = figures["eyes"], figures["lips"]
        assert eyes["left_out"]["mean_abs"] < 0.045, name
        assert eyes["left_out"]["shut_mean_abs"] < 0.6 * eyes["raw"]["shut_mean_abs"], name
        assert lips["left_out"]["mean_abs"] < 0.06, name
        assert lips["left_out"]["mean_abs"] < lips["raw"]["mean_abs"], name
