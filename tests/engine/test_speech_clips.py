"""Clips take turns, utterance by utterance, and come out in the format that each wants."""

from __future__ import annotations

import io
import wave

import numpy as np
import pytest

from tokenmill.engine.messages import PCM16_RATE, AudioFormat, Say, Spoken
from tokenmill.engine.resample import Samples
from tokenmill.engine.speech_clips import PAUSE_S, SILENCE_S, Clips

RATE = 24000
SENTENCE = "The mill stands by the old river. "


class Toy:
    """Each character is a hundred samples; what isn't ASCII can't be spoken, and `!` fails."""

    sample_rate = RATE
    voices = ("0", "1")
    parameters = 0

    def __init__(self) -> None:
        self.said: list[tuple[str, str, int | None]] = []

    def speak(self, text: str, voice: str, seed: int | None) -> Samples:
        self.said.append((text, voice, seed))
        if "!" in text:
            raise RuntimeError("no samples")
        return np.full(100 * len(text) if text.isascii() else 0, 0.5, np.float32)


@pytest.fixture
def toy() -> Toy:
    return Toy()


@pytest.fixture
def clips(toy: Toy) -> Clips:
    return Clips(toy, {"alloy": "1", "0": "0", "1": "1"})


def run(clips: Clips) -> list[Spoken]:
    made = []
    while clips.has_work:
        spoken = clips.step()
        if spoken is not None:
            made.append(spoken)
    return made


def frames(data: bytes) -> int:
    with wave.open(io.BytesIO(data)) as file:
        return file.getnframes()


def whole(text: str, form: AudioFormat = "wav", seed: str = "", voice: str = "") -> Say:
    return Say(1, text, True, voice, form, seed)


def test_a_file_comes_once_at_the_end(clips: Clips) -> None:
    (spoken,) = run(_with(clips, whole(SENTENCE * 2)))
    assert (spoken.clip, spoken.last, spoken.error) == (1, True, None)
    assert frames(spoken.data) == 2 * 100 * len(SENTENCE.strip()) + round(PAUSE_S * RATE)


def test_pcm16_comes_as_it_is_made_and_says_the_same(clips: Clips) -> None:
    made = run(_with(clips, whole(SENTENCE * 3, "pcm16")))
    assert [spoken.last for spoken in made] == [False, False, True]
    sizes = [len(spoken.data) // 2 for spoken in made]
    pause = round(PAUSE_S * PCM16_RATE)
    assert sizes == [100 * len(SENTENCE.strip()) + (pause if i else 0) for i in range(3)]


def test_a_text_may_come_in_pieces(clips: Clips, toy: Toy) -> None:
    for character in SENTENCE * 2:
        clips.say(Say(1, character, False, "alloy", "pcm16", "5"))
    clips.say(Say(1, "", True))
    run(clips)
    pieces = list(toy.said)
    toy.said.clear()
    run(_with(clips, whole(SENTENCE * 2, "pcm16", "5", "alloy")))
    assert toy.said == pieces
    assert [(text, voice) for text, voice, _ in pieces] == [(SENTENCE.strip(), "1")] * 2


def test_each_utterance_has_its_own_seed_and_the_same_one_next_time(clips: Clips, toy: Toy) -> None:
    for _ in range(2):
        run(_with(clips, whole(SENTENCE * 2, seed="7/0")))
    run(_with(clips, whole(SENTENCE, seed="7/1")))
    run(_with(clips, whole(SENTENCE)))
    seeds = [seed for _, _, seed in toy.said]
    assert seeds[:2] == seeds[2:4]
    assert len({*seeds[:2], seeds[4]}) == 3
    assert all(isinstance(seed, int) and 0 <= seed < 1 << 63 for seed in seeds[:5])
    assert seeds[5] is None


def test_the_default_voice_is_the_first(clips: Clips, toy: Toy) -> None:
    run(_with(clips, whole("a")))
    run(_with(clips, whole("a", voice="0")))
    assert [voice for _, voice, _ in toy.said] == ["1", "0"]


def test_clips_take_turns(clips: Clips, toy: Toy) -> None:
    clips.say(Say(1, SENTENCE * 3, True))
    clips.say(Say(2, "Short.", True))
    made = run(clips)
    assert [spoken.clip for spoken in made] == [2, 1]
    assert [text for text, _, _ in toy.said][1] == "Short."


def test_a_clip_that_waits_for_text_holds_nobody_up(clips: Clips) -> None:
    clips.say(Say(1, "An unfinished", False))
    assert not clips.has_work
    clips.say(Say(2, "Short.", True))
    assert [spoken.clip for spoken in run(clips)] == [2]
    clips.say(Say(1, " sentence", True))
    assert [spoken.clip for spoken in run(clips)] == [1]


def test_a_hushed_clip_is_gone(clips: Clips, toy: Toy) -> None:
    clips.say(Say(1, SENTENCE * 3, True))
    assert clips.step() is None
    clips.hush(1)
    clips.hush(99)
    assert not clips.has_work
    assert len(toy.said) == 1


def test_a_failure_ends_one_clip(clips: Clips) -> None:
    clips.say(Say(1, SENTENCE + "Stop!", True))
    clips.say(Say(2, "Go on.", True))
    failed, spoken = sorted(run(clips), key=lambda spoken: spoken.clip)
    assert (failed.last, failed.data, failed.error) == (True, b"", "RuntimeError")
    assert (spoken.last, spoken.error) == (True, None)


@pytest.mark.parametrize("text", ["", "  ", "水車", "水車。" * 30])
@pytest.mark.parametrize("form", ["wav", "pcm16", "mp3"])
def test_what_cannot_be_spoken_is_a_moment_of_silence(clips: Clips, text: str, form: AudioFormat) -> None:
    (spoken,) = run(_with(clips, whole(text, form)))
    assert spoken.last
    assert spoken.data
    if form == "wav":
        assert frames(spoken.data) == round(SILENCE_S * RATE)
    elif form == "pcm16":
        assert spoken.data == bytes(2 * round(SILENCE_S * PCM16_RATE))


def test_no_pause_stands_for_what_was_left_out(clips: Clips) -> None:
    (spoken,) = run(_with(clips, whole(f"水車が川のそばにあって、いつまでも回っている。\n\n{SENTENCE}")))
    assert frames(spoken.data) == 100 * len(SENTENCE.strip())


def _with(clips: Clips, say: Say) -> Clips:
    clips.say(say)
    return clips
