"""A scripted engine process: speaks the socket's frames, generates toy text, fails on command. No torch.

Run as `python fake_engine.py [--mode NAME] --fd N`. The generation repeats the prompt's tokens,
deterministically; the source in `Start` may carry settings: `fake:load_s=0.5,step_s=0.01,eos_after=7`;
with `fim=1` its tokenizer has tokens for filling in the middle. A prompt that contains a trigger word makes
it misbehave: see `TRIGGERS`. Under a grammar it says the grammar's kind and text, and ends; one that contains
REFUSE can't be compiled, and one that contains DEADEND allows four tokens. A prediction is right about every
token that it holds.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from tokenmill.engine.messages import (
    HEADER,
    Abort,
    Add,
    Alive,
    Delta,
    Drain,
    FromEngine,
    LoadFailed,
    Loading,
    Outputs,
    PromptLogprobs,
    Ready,
    Start,
    Stats,
    TokenizerInfo,
    TopLogprobs,
    encode_frame,
    to_engine_decoder,
)

BLOCK_SIZE = 16
TRIGGERS = ("CRASH", "HANG", "NANROW", "GARBAGE")


FIM_TOKENS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>")


def make_tokenizer(fim: bool = False) -> TokenizerInfo:
    """Byte-level, 256 bytes and a few merges, `<s>` before each text, `</s>` at the end of a generation.

    `fim`: with StarCoder's tokens for filling in the middle, the last two of which aren't marked as special.
    """
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    library = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<s>", "</s>"])
    if fim:
        library.add_special_tokens(list(FIM_TOKENS[:2]))
        library.add_tokens(list(FIM_TOKENS[2:]))
    start, end = library.token_to_id("<s>"), library.token_to_id("</s>")
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return TokenizerInfo(
        tokenizer_json=library.to_str(),
        bos_token="<s>",
        eos_token="</s>",
        bos_id=start,
        eos_ids=[end],
        vocab_size=library.get_vocab_size(),
    )


TOKENIZER = make_tokenizer()
FIM_TOKENIZER = make_tokenizer(fim=True)
LIBRARY = Tokenizer.from_str(TOKENIZER.tokenizer_json)
WIDTH = TOKENIZER.vocab_size + 6
EOS = TOKENIZER.eos_ids[0]
BYTES = 256


def next_token(prompt: list[int], made: list[int], seed: int, choice: int) -> int:
    """The toy model: the prompt's bytes over and over, in strides by choice, from a place by seed."""
    plain = [token for token in prompt if token < BYTES] or [LIBRARY.token_to_id("x")]
    return plain[(len(made) * (1 + choice) + seed) % len(plain)]


def logprob(token: int, position: int) -> float:
    """A made-up log-probability that differs by token and place."""
    return -0.125 * (1 + (token * 7 + position * 3) % 16)


def top(token: int, position: int, count: int) -> TopLogprobs:
    """The token itself and its neighbours, best first."""
    ids = [(token + i) % BYTES for i in range(count)]
    pairs = sorted(((logprob(other, position), -other) for other in ids), reverse=True)
    return TopLogprobs([-other for _, other in pairs], [value for value, _ in pairs])


@dataclass
class Sequence:
    """One choice that is being generated."""

    add: Add
    choice: int
    made: list[int] = field(default_factory=list)

    @property
    def grammar_error(self) -> str | None:
        """Why its grammar ends it, if it does."""
        grammar = self.add.params.grammar
        if grammar is not None and "REFUSE" in grammar.text:
            return "it can't be compiled"
        if grammar is not None and "DEADEND" in grammar.text and len(self.made) == 4:
            return "nothing can follow"
        return None

    def step(self, eos_after: int) -> Delta | None:
        """One token more; None while there is none."""
        params, position = self.add.params, len(self.made)
        prompt = self.add.prompt
        token = next_token(prompt, self.made, params.seed or 0, self.choice if params.temperature else 0)
        if params.grammar is not None:
            said = LIBRARY.encode(
                f"{params.grammar.kind}:{params.grammar.text}", add_special_tokens=False
            ).ids
            token = said[position] if position < len(said) else EOS
        if eos_after and position >= max(eos_after, params.min_tokens) and not params.ignore_eos:
            token = EOS
        for banned, bias in params.logit_bias.items():
            token = banned if bias == 100 else token
        delta = Delta(self.add.request, self.choice, [])
        if position == 0 and self.choice == 0:
            delta.cached_tokens = len(prompt) // BLOCK_SIZE * BLOCK_SIZE
            if params.prompt_logprobs is not None:
                count = params.prompt_logprobs
                delta.prompt_logprobs = PromptLogprobs(
                    1,
                    [logprob(t, i) for i, t in enumerate(prompt[1:], 1)],
                    [top(t, i, count) for i, t in enumerate(prompt[1:], 1)],
                )
        if params.max_tokens == 0:
            delta.finish = "length"
            return delta
        self.made.append(token)
        delta.token_ids = [token]
        if self.add.prediction is not None:
            delta.accepted_drafts = int(token in self.add.prediction)
            delta.rejected_drafts = 1 - delta.accepted_drafts
        if params.logprobs is not None:
            delta.logprobs = [logprob(token, position)]
            delta.top = [top(token, position, params.logprobs)]
        stops = (*params.stop_token_ids, *(() if params.ignore_eos else (EOS,)))
        if token in stops and len(self.made) > params.min_tokens:
            delta.finish, delta.stop_token = "stop", token
        elif len(self.made) >= params.max_tokens:
            delta.finish = "length"
        return delta


class FakeEngine:
    """Reads frames on a thread, steps on the main one."""

    def __init__(self, connection: socket.socket, mode: str) -> None:
        self.connection = connection
        self.mode = mode
        self.settings: dict[str, float] = {}
        self.lock = threading.Lock()
        self.sequences: dict[tuple[int, int], Sequence] = {}
        self.max_batch = 256
        self.draining = False
        self.step_number = self.generated = self.prompted = 0
        self.muted = False

    def send(self, message: FromEngine) -> None:
        try:
            self.connection.sendall(encode_frame(message))
        except OSError:
            os._exit(0)

    def run(self) -> None:
        stream = self.connection.makefile("rb")
        start = self.receive(stream)
        assert isinstance(start, Start)
        self.load(start)
        threading.Thread(target=self.read, args=(stream,), daemon=True).start()
        self.serve()

    def receive(self, stream: object) -> object:
        header = stream.read(HEADER.size)  # type: ignore[attr-defined]
        if len(header) < HEADER.size:
            os._exit(0)
        return to_engine_decoder.decode(stream.read(HEADER.unpack(header)[0]))  # type: ignore[attr-defined]

    def load(self, start: Start) -> None:
        _, _, text = start.config.source.partition(":")
        self.settings = {
            key: float(value) for key, value in (part.split("=") for part in text.split(",") if part)
        }
        self.max_batch = start.config.max_batch
        self.send(Loading("weights", 0.0))
        if self.mode == "crash_loading":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.mode.startswith("hang_loading:"):
            # The first process to come hangs; those after it find the file.
            marker = Path(self.mode.partition(":")[2])
            if not marker.exists():
                marker.touch()
                time.sleep(3600)
        load_s = self.settings.get("load_s", 0.0)
        news_s = self.settings.get("news_s", load_s) or 1.0
        for done in range(round(load_s / news_s)):
            self.live(news_s)
            self.send(Loading("weights", (done + 1) * news_s / load_s))
        if self.mode == "load_failed":
            self.send(LoadFailed("model.safetensors: truncated; download it again"))
            os._exit(0)
        self.send(
            Ready(
                tokenizer=FIM_TOKENIZER if self.settings.get("fim") else TOKENIZER,
                logits_width=WIDTH,
                max_context=int(start.config.max_context or 256),
                block_size=BLOCK_SIZE,
                num_blocks=int(start.config.num_blocks or 4096),
                max_batch=self.max_batch,
                fingerprint="fake-1",
                description="a toy",
                model_type="fake",
                load_seconds=0.1,
            )
        )
        self.report()

    def live(self, seconds: float) -> None:
        """Take so long, with signs of life and no other news."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.send(Alive())
            time.sleep(min(left, 0.5))

    def read(self, stream: object) -> None:
        while True:
            message = self.receive(stream)
            with self.lock:
                if isinstance(message, Add):
                    self.add(message)
                elif isinstance(message, Abort):
                    keys = [key for key in self.sequences if key[0] == message.request]
                    for key in keys:
                        if message.choice in (None, key[1]):
                            del self.sequences[key]
                elif isinstance(message, Drain):
                    self.draining = True

    def add(self, message: Add) -> None:
        text = LIBRARY.decode(message.prompt)
        if "CRASH" in text:
            os.kill(os.getpid(), signal.SIGKILL)
        if "GARBAGE" in text:
            self.connection.sendall(HEADER.pack(3) + b"\xc1\xc1\xc1")
        self.muted |= "HANG" in text
        self.prompted += len(message.prompt)
        for choice in range(message.params.candidates):
            self.sequences[message.request, choice] = Sequence(message, choice)

    def serve(self) -> None:
        while True:
            with self.lock:
                deltas = self.step()
                self.report_due(bool(deltas))
                if deltas:
                    self.send(Outputs(deltas))
                if self.draining and not self.sequences:
                    os._exit(0)
            time.sleep(self.settings.get("step_s", 0.001) if deltas else 0.002)

    def step(self) -> list[Delta]:
        if self.muted:
            return []
        deltas: list[Delta] = []
        eos_after = int(self.settings.get("eos_after", 0))
        for key, sequence in list(self.sequences.items())[: self.max_batch]:
            if "NANROW" in LIBRARY.decode(sequence.add.prompt) and len(sequence.made) == 3:
                delta = Delta(*key, [], finish="error", error="NaN in the logits of /secret/path")
            elif sequence.grammar_error is not None:
                delta = Delta(*key, [], finish="error", error=sequence.grammar_error, invalid=True)
            elif (step := sequence.step(eos_after)) is not None:
                delta = step
            else:
                continue
            self.generated += len(delta.token_ids)
            if delta.finish is not None:
                del self.sequences[key]
            deltas.append(delta)
        return deltas

    def report_due(self, stepped: bool) -> None:
        self.step_number += 1
        if not self.muted and self.step_number % (5 if stepped else 20) == 0:
            self.report()

    def report(self) -> None:
        running = min(len(self.sequences), self.max_batch)
        used = sum(1 + len(sequence.add.prompt) // BLOCK_SIZE for sequence in self.sequences.values())
        self.send(
            Stats(
                step=self.step_number,
                running=running,
                waiting=len(self.sequences) - running,
                used_blocks=used,
                cached_blocks=0,
                free_blocks=4096 - used,
                prompt_tokens=self.prompted,
                cached_tokens=0,
                generated_tokens=self.generated,
                preemptions=0,
                step_seconds={"forward": 0.5},
            )
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", default="")
    parser.add_argument("--fd", type=int, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    FakeEngine(socket.socket(fileno=arguments.fd), arguments.mode).run()
