"""A scripted engine process that says what its prompt tells it to, for chats. Run like `fake_engine.py`.

The last «…» of the prompt is the script: choice i says the i-th of its parts, which ||| separates, token by
token, and ends. «PROMPT» says the prompt itself, «GRAMMAR» the grammar that it was given, «NOTHING» nothing; after
HOLD nothing more is said, and no end comes.
Its tokenizer has the markers of calls and thoughts: those in `SPECIAL` are special tokens.
"""

from __future__ import annotations

import argparse
import re
import signal
import socket
from dataclasses import dataclass

import msgspec
from fake_engine import BLOCK_SIZE, FakeEngine, Sequence, logprob, make_tokenizer, top
from tokenizers import Tokenizer

from tokenmill.engine.messages import Add, Delta, PromptLogprobs, Ready, Start

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<think>"]
ADDED = ["<tool_call>", "</tool_call>", "</think>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SCRIPT = re.compile(r"«([^«»]*)»")


def make_chat_library() -> Tokenizer:
    """The toy tokenizer with the markers."""
    library = Tokenizer.from_str(make_tokenizer().tokenizer_json)
    library.add_special_tokens(SPECIAL)
    library.add_tokens(ADDED)
    return library


LIBRARY = make_chat_library()
TOKENIZER = msgspec.structs.replace(
    make_tokenizer(),
    tokenizer_json=LIBRARY.to_str(),
    chat_template=TEMPLATE,
    vocab_size=LIBRARY.get_vocab_size(),
)
EOS = TOKENIZER.eos_ids[0]


def script(add: Add, choice: int) -> list[int]:
    """The tokens that a choice says."""
    prompt = LIBRARY.decode(add.prompt, skip_special_tokens=False)
    found = SCRIPT.findall(prompt)
    parts = found[-1].split("|||") if found else ["ok"]
    said: str = parts[choice % len(parts)]
    if said == "PROMPT":
        said = prompt
    elif said == "GRAMMAR":
        said = add.params.grammar.text if add.params.grammar is not None else "none"
    elif said == "NOTHING":
        said = ""
    ids: list[int] = LIBRARY.encode(said, add_special_tokens=False).ids
    return ids


@dataclass
class ScriptedSequence(Sequence):
    """One choice that says its script."""

    def step(self, eos_after: int) -> Delta | None:
        """One token more; None from HOLD on."""
        params, position = self.add.params, len(self.made)
        said = script(self.add, self.choice)
        if LIBRARY.decode(self.made).endswith("HOLD"):
            return None
        token = said[position] if position < len(said) else EOS
        delta = Delta(self.add.request, self.choice, [token])
        self.made.append(token)
        if position == 0 and self.choice == 0 and params.prompt_logprobs is not None:
            scored = list(enumerate(self.add.prompt))[1:]
            delta.prompt_logprobs = PromptLogprobs(
                1,
                [logprob(token, place) for place, token in scored],
                [top(token, place, params.prompt_logprobs) for place, token in scored],
            )
        if params.logprobs is not None:
            delta.logprobs = [logprob(token, position)]
            delta.top = [top(token, position, params.logprobs)]
        if token == EOS:
            delta.finish, delta.stop_token = "stop", token
        elif len(self.made) >= params.max_tokens:
            delta.finish = "length"
        return delta


class ChatEngine(FakeEngine):
    """The fake engine with the chat tokenizer."""

    def load(self, start: Start) -> None:
        self.max_batch = start.config.max_batch
        self.send(
            Ready(
                tokenizer=TOKENIZER,
                logits_width=TOKENIZER.vocab_size,
                max_context=int(start.config.max_context or 4096),
                block_size=BLOCK_SIZE,
                num_blocks=4096,
                max_batch=self.max_batch,
                fingerprint="fake-1",
                description="a toy that says what it is told",
            )
        )
        self.report()

    def add(self, message: Add) -> None:
        for choice in range(message.params.candidates):
            self.sequences[message.request, choice] = ScriptedSequence(message, choice)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", default="")
    parser.add_argument("--fd", type=int, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ChatEngine(socket.socket(fileno=arguments.fd), arguments.mode).run()
