"""Which frames of a video become images."""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple, Self


class Times(NamedTuple):
    """When the n frames of a video are shown, in the order of display: ticks of `unit` seconds."""

    ticks: Sequence[int]
    unit: Fraction

    @classmethod
    def of_frames(cls, stamps: list[int | None], unit: Fraction, average: Fraction) -> Self:
        """By the frames' time stamps or, where they do not rise, `average` seconds a frame."""
        if None in stamps or any(a >= b for a, b in zip(stamps, stamps[1:], strict=False)):
            return cls(range(len(stamps)), average)
        return cls(stamps, unit)


class Sampling(NamedTuple):
    """`num_frames`, evenly spaced; with `fps` those that many times a second, or `max_frames`."""

    num_frames: int = 8
    fps: Fraction | None = None
    max_frames: int = 32

    def __str__(self) -> str:
        if self.fps is None:
            return str(self.num_frames)
        return f"{self.fps} a second, at most {self.max_frames}"

    def choose(self, times: Times) -> list[int]:
        """
        The numbers of the frames to take, rising; (num_frames,) or with `fps` (<= max_frames,).

        Evenly spaced are floor(i * n / num_frames): a short video repeats frames. With `fps` they
        are those on the screen 0, 1 / fps, 2 / fps, ... seconds after the first frame is, until the
        last frame comes; none is taken twice. Of k of them, if these are too many, floor(i * k /
        max_frames) are left.
        """
        shown: Sequence[int] = range(len(times.ticks))
        number = self.num_frames
        if self.fps is not None and shown:
            shown = self._on_screen(times)
            number = min(len(shown), self.max_frames)
        return [shown[i * len(shown) // number] for i in range(number)] if shown else []

    def _on_screen(self, times: Times) -> list[int]:
        """
        Frames that are shown at a multiple of 1 / fps: frame i from its time until that of the
        next. In integers, since a float may be a frame off.
        """
        scale = times.unit * self.fps
        first, last = times.ticks[0], times.ticks[-1]
        due = [-((first - tick) * scale.numerator // scale.denominator) for tick in times.ticks]
        due.append((last - first) * scale.numerator // scale.denominator + 1)
        return [i for i in range(len(times.ticks)) if due[i] < due[i + 1]]
