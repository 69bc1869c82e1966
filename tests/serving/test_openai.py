"""OpenAI's own client: completions, chats, streams, lists, and the exceptions that it makes of each error."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from served import Held, alone, engine, folders, model, tokenizer

from peftfn.serving.app import app
from peftfn.serving.asked import Limits
from peftfn.serving.engine import Engine
from peftfn.serving.ticket import Ask

USER = {"role": "user", "content": "the hat"}


class Client:
    """The client in front of a server, and what the server would have to say."""

    def __init__(self, root: Path, **more: Any):
        self.words, base = tokenizer(), model(end=None)
        self.made = folders(root, base, 2)
        self.engine: Engine = engine(base, root, **more)
        self.app = app(self.engine, "tiny", Limits(tokens=32, context=64))

    def ask(self, talk: Callable[[openai.AsyncOpenAI], Awaitable[Any]], retries: int = 0) -> Any:
        async def run() -> Any:
            http = httpx2.AsyncClient(transport=httpx2.ASGITransport(self.app), base_url="http://server")
            async with openai.AsyncOpenAI(
                base_url="http://server/v1", api_key="none", max_retries=retries, http_client=http
            ) as client:
                return await talk(client)

        return asyncio.run(run())

    def said(self, prompt: str, new: int) -> str:
        out: str = self.words.decode(alone(*self.made["user1"], self.words.encode(prompt), new))
        return out


@pytest.fixture(scope="module")
def site(tmp_path_factory: Any) -> Iterator[Client]:
    made = Client(tmp_path_factory.mktemp("openai") / "adapters")
    yield made
    made.engine.close()


def test_completions_and_chats_are_the_adapters(site: Client) -> None:
    how: dict[str, Any] = {"model": "user1", "max_tokens": 7, "temperature": 0}

    async def talk(client: openai.AsyncOpenAI) -> Any:
        told = await client.completions.create(prompt="the hat", **how)
        streamed = [chunk async for chunk in await client.completions.create(prompt="the hat", stream=True, **how)]
        chat = await client.chat.completions.create(messages=[USER], seed=1, user="ann", **how)
        again = await client.chat.completions.create(messages=[USER, chat.choices[0].message, USER], **how)
        dumped = await client.chat.completions.create(
            messages=[USER, chat.choices[0].message.model_dump(), USER],
            **how,  # its fields are null
        )
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = [chunk async for chunk in await client.chat.completions.create(messages=[USER], **usage, **how)]
        return told, streamed, chat, again, dumped, chunks

    told, streamed, chat, again, dumped, chunks = site.ask(talk)
    want = site.said("the hat", 7)
    assert told.choices[0].text == "".join(c.choices[0].text for c in streamed) == want
    assert told.usage.prompt_tokens == len(site.words.encode("the hat")) and told.usage.completion_tokens == 7
    answer = chat.choices[0]
    assert (answer.message.role, answer.message.content) == ("assistant", site.said("<user>the hat>", 7))
    assert answer.finish_reason == "length" and chat.model == "user1" and chat.object == "chat.completion"
    whole = site.said(f"<user>the hat<assistant>{answer.message.content}<user>the hat>", 7)
    assert again.choices[0].message.content == dumped.choices[0].message.content == whole
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == answer.message.content
    assert chunks[-1].choices == [] and chunks[-1].usage == chat.usage


def test_the_clients_own_stream_has_every_event_and_the_whole_answer(site: Client) -> None:
    async def talk(client: openai.AsyncOpenAI) -> Any:
        how: dict[str, Any] = {"model": "user1", "messages": [USER], "temperature": 0, "max_tokens": 7}
        stop = (await client.chat.completions.create(**how)).choices[0].message.content[3:5]
        async with client.chat.completions.stream(**how, stop=stop) as stream:
            kinds = {event.type async for event in stream}
            return stop, kinds, await stream.get_final_completion()

    stop, kinds, told = site.ask(talk)
    want = site.said("<user>the hat>", 7)
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert told.choices[0].message.content == want[: want.index(stop)] and told.choices[0].finish_reason == "stop"


def test_models_are_listed_with_their_base(site: Client) -> None:
    async def talk(client: openai.AsyncOpenAI) -> Any:
        return [m async for m in client.models.list()], await client.models.retrieve("user1")

    listed, one = site.ask(talk)
    assert [(m.id, m.parent) for m in listed] == [("tiny", None), ("user0", "tiny"), ("user1", "tiny")]
    assert one == listed[2]


BAD: dict[str, tuple[dict[str, Any], type[openai.APIStatusError], str | None, str | None]] = {
    "no adapter": ({"model": "nobody"}, openai.NotFoundError, "model", "model_not_found"),
    "a value": ({"temperature": 9}, openai.BadRequestError, "temperature", None),
    "several": ({"n": 2}, openai.BadRequestError, "n", None),
    "tools": ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools", None),
    "a tool's answer": (
        {"messages": [USER, {"role": "tool", "tool_call_id": "x", "content": "3"}]},
        openai.BadRequestError,
        "messages",
        None,
    ),
    "logprobs": ({"logprobs": True, "top_logprobs": 2}, openai.BadRequestError, "logprobs", None),
    "too long": (
        {"messages": [USER | {"content": "a" * 99}]},
        openai.BadRequestError,
        "messages",
        "context_length_exceeded",
    ),
    "an unknown field": ({"extra_body": {"top_k": 3}}, openai.BadRequestError, "top_k", None),
}


@pytest.mark.parametrize("what", BAD)
def test_each_error_is_the_exception_that_the_client_has_for_it(what: str, site: Client) -> None:
    fields, kind, param, code = BAD[what]
    with pytest.raises(kind) as e:
        site.ask(lambda client: client.chat.completions.create(**{"model": "user1", "messages": [USER]} | fields))
    assert (e.value.param, e.value.code) == (param, code)
    assert e.value.body["message"] and e.value.type == (  # type: ignore[index, call-overload]
        "not_found_error" if kind is openai.NotFoundError else "invalid_request_error"
    )


def test_routes_that_are_not_there_say_which_are(site: Client) -> None:
    with pytest.raises(openai.NotFoundError, match=r"POST /v1/responses: .* /v1/chat/completions"):
        site.ask(lambda client: client.responses.create(model="user1", input="a"))


def test_a_full_queue_is_a_rate_limit_that_the_client_waits_for(tmp_path: Path) -> None:
    site = Client(tmp_path / "adapters", rows=1, queue=1)
    held = Held(site.engine, Ask([5], None, 2))
    held.next()
    waiting = Held(site.engine, Ask([6], None, 1))

    async def once(client: openai.AsyncOpenAI) -> Any:
        return await client.completions.create(model="tiny", prompt="a", max_tokens=1)

    with pytest.raises(openai.RateLimitError, match="1 requests wait already") as e:
        site.ask(once)
    assert (e.value.type, e.value.code) == ("rate_limit_error", "queue_full")
    assert 1 <= int(e.value.response.headers["retry-after"]) <= 60

    async def later(client: openai.AsyncOpenAI) -> Any:
        answer = asyncio.create_task(once(client))
        await asyncio.sleep(0.1)
        held.go(), waiting.go()
        return await answer

    assert site.ask(later, retries=5).usage.completion_tokens == 1
    site.engine.close()


def test_an_error_in_a_stream_is_an_exception_of_the_client(tmp_path: Path) -> None:
    site = Client(tmp_path / "adapters")
    prefill, works = site.engine.stepper.prefill, iter([True])

    def first_alone(*of: Any) -> Any:
        if not next(works, False):
            raise RuntimeError("out of memory")
        return prefill(*of)

    site.engine.stepper.prefill = site.engine.stepper.step_ = first_alone  # type: ignore[method-assign, assignment]

    async def talk(client: openai.AsyncOpenAI) -> Any:
        return [c async for c in await client.completions.create(model="tiny", prompt="a", max_tokens=9, stream=True)]

    with pytest.raises(openai.APIError, match="out of memory") as e:
        site.ask(talk)
    assert e.value.type == "server_error"
    site.engine.close()
