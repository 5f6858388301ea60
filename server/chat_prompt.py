"""From a conversation to a prompt, and to the way in which its answer must be written and read.

The completions routes use it too: with `tools` their prompt becomes one user message (`completion_as_chat`).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from tokenmill.engine.sampling_params import Grammar
from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.server.admission import Job
from tokenmill.server.chat_format import ChatFormat
from tokenmill.server.chat_lark import answer_grammar, answer_rule
from tokenmill.server.chat_messages import TemplateMessage, template_messages
from tokenmill.server.chat_parse import ChatInput, template_variables
from tokenmill.server.chat_protocol import Message
from tokenmill.server.chat_text import ChatText
from tokenmill.server.errors import bad_request
from tokenmill.server.loaded_engine import Engine
from tokenmill.server.plan import Variant
from tokenmill.server.prompts import by_size, check_length, encode_texts
from tokenmill.server.protocol import CompletionRequest
from tokenmill.server.reasoning import ReasoningParser, is_open
from tokenmill.server.tool_grammar import CallGrammar
from tokenmill.server.tool_protocol import ToolSet, read_tools


class ChatPrompt(msgspec.Struct, frozen=True):
    """A rendered conversation."""

    ids: list[int]
    style: ChatFormat
    tools: ToolSet | None
    opened: bool
    """Whether the prompt ends within the model's thoughts."""

    def adapt(self, job: Job, tokenizer: Tokenizer) -> Job:
        """The job with what tools and thoughts need: grammar, stop, visible markup. Raises `ApiError` 400."""
        grammar = self._grammar(job, tokenizer)
        params = msgspec.structs.replace(job.params, grammar=grammar)
        param = job.grammar_param if self.tools is None else "tools"
        closing = self.style.form.closing
        single = self.tools is not None and not self.tools.parallel
        # The first call's end is the answer's; in thoughts it would be nobody's end.
        if single and closing is not None and grammar is None and self.style.tags is None:
            params = msgspec.structs.replace(params, stop=(*params.stop, closing))
        shown = self.style.tokenizer(self.tools is not None)
        return msgspec.structs.replace(job, params=params, grammar_param=param, tokenizer=shown)

    def _grammar(self, job: Job, tokenizer: Tokenizer) -> Grammar | None:
        """What the answer must follow, in place of what the request says of its content."""
        wanted = job.params.grammar
        tags = self.style.tags
        if self.tools is None:
            return answer_grammar(wanted, tokenizer, tags, self.opened) if wanted else None
        calls = CallGrammar(tokenizer, self.style.form, self.tools.tools, self.tools.parallel)
        if self.tools.required:
            return calls.required(tags, self.opened)
        if wanted is None:
            return calls.strict()
        answer = answer_rule(wanted)
        # Without a marker a call and a JSON answer begin alike, and the grammar can't tell them apart.
        if answer is None or self.style.form.opening is None:
            message = f"tools that may be called or not don't go with {job.grammar_param}; say tool_choice"
            raise bad_request(message, "tool_choice")
        return calls.or_answer(answer, tags, self.opened)

    def new_text(self, job: Job) -> ChatText:
        """What reads the text of one of the job's choices."""
        tags, tools = self.style.tags, self.tools
        reasoning = parser = None
        # A grammar in the client's own words has no place for thoughts.
        if tags is not None and job.grammar_param != "guided_grammar":
            reasoning = ReasoningParser(tags, self.opened)
        if tools is not None:
            parser = self.style.form.parser(tools.functions, None if tools.parallel else 1, tools.required)
        return ChatText(reasoning, parser)


async def chat_prompt(chat: ChatInput, variant: Variant, engine: Engine) -> ChatPrompt:
    """The prompt of a chat request. Raises `ApiError` 400: no template, its refusal, no tools here."""
    if chat.tools is not None and not variant.tools:
        raise bad_request(f"tools: {variant.name} takes none", "tools")
    style = engine.chat(variant.chat_template, variant.tool_parser)
    size = sum(len(message.content or "") for message in chat.messages)
    text, opened = await by_size(size, _render, chat, style)
    if not text:
        raise bad_request("messages: the chat template makes an empty prompt of them", "messages")
    keep = chat.completion.truncate_prompt_tokens
    if keep is None:
        check_length([text], engine)
    bos = engine.tokenizer.info.bos_token
    adds = chat.completion.add_special_tokens and not (bos and text.startswith(bos))
    (ids,) = await encode_texts(engine.tokenizer, [text], adds)
    return ChatPrompt(ids, style, chat.tools, opened)


async def completion_as_chat(
    request: CompletionRequest, variant: Variant, engine: Engine
) -> list[ChatPrompt]:
    """The prompts of a completion with `tools`, each as the one user message of a chat.

    For `/v1/completions`: the ids replace the prompts, `ChatPrompt.adapt` completes the job, and a
    `ChatPrompt.new_text` reads each choice. Prompts must be texts. Raises `ApiError` 400.
    """
    tools, variables = read_tools(request), template_variables(request)
    if any(not isinstance(prompt, str) for prompt in request.prompt):
        raise bad_request("prompt: with tools it must be text, since it becomes a chat message", "prompt")
    completion = request.model_copy(update={"add_special_tokens": False})
    chats = [
        ChatInput([Message.model_validate({"role": "user", "content": prompt})], tools, variables, completion)
        for prompt in request.prompt
    ]
    return [await chat_prompt(chat, variant, engine) for chat in chats]


def _render(chat: ChatInput, style: ChatFormat) -> tuple[str, bool]:
    """The prompt's text, and whether it ends within thoughts."""
    messages = template_messages(chat.messages, style, chat.tools)
    tools = None
    if chat.tools is not None and style.knows_tools:
        tools = [tool.function.definition() for tool in chat.tools.tools]
    if chat.continue_final_message:
        text, written = _continued(messages, tools, style, chat.variables)
        opened = style.tags is not None and is_open(written, style.tags)
    else:
        text = style.render(messages, tools, chat.add_generation_prompt, chat.variables)
        opened = style.tags is not None and text.rstrip().endswith(style.tags.open)
    return text, opened


def _continued(
    messages: list[TemplateMessage],
    tools: Sequence[dict[str, object]] | None,
    style: ChatFormat,
    variables: dict[str, Any],
) -> tuple[str, str]:
    """The prompt up to the end of the last message, and that message as it was written.

    A mark stands in for the message while the template runs: templates strip and split what they are given.
    """
    mark = f"mark{secrets.token_hex(8)}"
    written = str(messages[-1]["content"])
    text = style.render([*messages[:-1], {**messages[-1], "content": mark}], tools, False, variables)
    before, found, _ = text.partition(mark)
    if not found:
        message = "continue_final_message: the chat template leaves the last message out"
        raise bad_request(message, "continue_final_message")
    return before + written, written
