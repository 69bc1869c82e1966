"""The server's routes, through ASGI: OpenAI's shapes, what is refused and why, adapters that come and go, counts."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Held, alone, engine, folders, model, prompts, tokenizer

from peftfn.serving.app import app
from peftfn.serving.asked import Limits
from peftfn.serving.engine import Engine
from peftfn.serving.ticket import Ask

BASE = "tiny"
Client = httpx.AsyncClient


class Site:
    """An engine with adapters, and its application."""

    def __init__(self, root: Path, **more: Any):
        self.model, self.words = model(), tokenizer()
        self.made = folders(root, self.model, 3)
        self.engine: Engine = engine(self.model, root, **more)
        self.app = app(self.engine, BASE, Limits(body=4096, tokens=32, context=64))

    def ask(self, talk: Callable[[Client], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            async with Client(transport=httpx.ASGITransport(self.app), base_url="http://server") as client:
                return await talk(client)

        return asyncio.run(run())

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        async def talk(client: Client) -> Any:
            return await client.post(path, json=body, **more)

        return self.ask(talk)

    def complete(self, **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"model": BASE, "prompt": [5, 6], "temperature": 0} | fields)

    def metric(self, name: str) -> float:
        async def talk(client: Client) -> Any:
            return await client.get("/metrics")

        text = self.ask(talk).text
        (value,) = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(value)

    def want(self, name: str, ids: list[int], new: int) -> list[int]:
        net, adapter = self.made.get(name, (self.made["user0"][0], None))
        return alone(net, adapter, ids, new)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path / "adapters")
    yield made
    made.engine.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: Any) -> Iterator[Site]:
    """For requests that leave nothing behind."""
    made = Site(tmp_path_factory.mktemp("root") / "adapters")
    yield made
    made.engine.close()


def test_completions_of_several_adapters_at_once_are_what_generate_gives(shared: Site) -> None:
    asked = [(["user0", "user1", BASE][i % 3], p) for i, p in enumerate(prompts(9))]

    async def talk(client: Client) -> Any:
        how = {"max_tokens": 7, "temperature": 0, "return_token_ids": True}
        bodies = [{"model": name, "prompt": p, **how} for name, p in asked]
        return await asyncio.gather(*[client.post("/v1/completions", json=b) for b in bodies])

    for (name, p), response in zip(asked, shared.ask(talk), strict=True):
        found = response.json()
        (choice,) = found["choices"]
        want = shared.want(name, p, 7)
        assert choice["token_ids"] == want
        assert choice["text"] == shared.words.decode(want, skip_special_tokens=True)
        assert choice["finish_reason"] == ("stop" if want[-1] == 1 else "length")
        n = len(want)
        assert found["usage"] == {"prompt_tokens": len(p), "completion_tokens": n, "total_tokens": len(p) + n}
        assert found["object"] == "text_completion" and found["model"] == name


def events(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_says_what_the_whole_answer_says(shared: Site, chat: bool) -> None:
    where = "/v1/chat/completions" if chat else "/v1/completions"
    said = {"messages": [{"role": "user", "content": "the hat"}]} if chat else {"prompt": "the hat"}
    body = {"model": "user1", "max_tokens": 9, "temperature": 0, **said}
    whole = shared.post(where, body).json()
    chunks = events(shared.post(where, body | {"stream": True, "stream_options": {"include_usage": True}}))
    assert chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"] == []
    assert len({c["id"] for c in chunks}) == 1 and all(c["usage"] is None for c in chunks[:-1])
    choices = [c["choices"][0] for c in chunks[:-1]]
    if chat:
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(c["delta"].get("content", "") for c in choices)
        assert text == whole["choices"][0]["message"]["content"]
        prompt = shared.words.encode("<user>the hat>")
    else:
        text = "".join(c["text"] for c in choices)
        assert text == whole["choices"][0]["text"]
        prompt = shared.words.encode("the hat")
    assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert whole["usage"]["prompt_tokens"] == len(prompt)
    assert text == shared.words.decode(shared.want("user1", prompt, 9), skip_special_tokens=True)


def test_a_stop_ends_the_answer(shared: Site) -> None:
    text = shared.complete(prompt="the hat", max_tokens=20).json()["choices"][0]["text"]
    stop = text[4:6]
    found = shared.complete(prompt="the hat", max_tokens=20, stop=stop).json()
    assert found["choices"][0]["text"] == text[: text.index(stop)]
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] < 20


def test_a_seed_repeats_an_answer(shared: Site) -> None:
    how = {"temperature": 1.7, "top_p": 0.95, "max_tokens": 20}
    one, two, other = (shared.complete(**how, seed=s).json()["choices"][0]["text"] for s in (3, 3, 4))
    assert one == two != other


GOOD: dict[str, Any] = {"model": BASE, "prompt": "a"}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt is missing"),
    ({"model": None}, "model is missing"),
    ({"model": 3}, "model is 3; it must be a text"),
    ({"foo": 1}, r"unknown field 'foo'; supported are max_tokens, model, prompt"),
    ({"\ud800": 1}, "unknown field"),
    ({"messages": []}, "unknown field 'messages'"),
    ({"n": 2}, "n is 2; this server supports 1 alone"),
    ({"n": True}, "n is true; this server supports 1 alone"),
    ({"logprobs": 0}, "logprobs is 0; this server supports false alone"),
    ({"presence_penalty": 0.5}, "presence_penalty is 0.5; this server supports 0 alone"),
    ({"tools": [{"type": "function"}]}, r"tools is \[.*\]; this server supports \[\] alone"),
    ({"tool_choice": "auto"}, 'tool_choice is "auto"; this server supports "none" alone'),
    ({"max_tokens": 0}, "at least 1"),
    ({"max_tokens": True}, "at least 1"),
    ({"max_tokens": 1.5}, "at least 1"),
    ({"max_tokens": 33}, "this server makes at most 32"),
    ({"temperature": -1}, "from 0 to 2"),
    ({"temperature": "hot"}, "from 0 to 2"),
    ({"top_p": 0}, "above 0"),
    ({"seed": 2**63}, "64 bits"),
    ({"stop": [""]}, "1 to 256 characters"),
    ({"stop": ["a"] * 5}, "at most 4"),
    ({"stream": 1}, "true or false"),
    ({"stream_options": {"x": 1}}, "include_usage"),
    ({"stream_options": {"include_usage": True}}, "give stream=true too"),
    ({"prompt": ""}, "has no tokens"),
    ({"prompt": []}, "has no tokens"),
    ({"prompt": ["a", "b"]}, "give one a request"),
    ({"prompt": [1, "a"]}, "a text, or a list of token ids"),
    ({"prompt": [1, True]}, "a text, or a list of token ids"),
    ({"prompt": [261]}, "not in the model's vocabulary, 0 to 260"),
    ({"prompt": [-1]}, "not in the model's vocabulary"),
    ({"prompt": "\ud800"}, "not valid Unicode"),
    ({"prompt": "a" * 64}, "the prompt has 64 tokens; it may have 63"),
    ({"prompt": "a" * 50, "max_tokens": 20}, "together they may be 64"),
    ({"model": "nobody"}, "no adapter 'nobody'"),
    ({"model": "../adapters"}, "cannot name an adapter"),
]


@pytest.mark.parametrize(("fields", "why"), BAD, ids=[json.dumps(f)[:40] for f, _ in BAD])
def test_what_is_not_supported_is_an_error_that_says_what_is(fields: dict[str, Any], why: str, shared: Site) -> None:
    body = json.dumps(GOOD | fields).encode()

    async def talk(client: Client) -> Any:
        return await client.post("/v1/completions", content=body, headers={"content-type": "application/json"})

    response = shared.ask(talk)
    said = response.json()["error"]
    assert response.status_code == (404 if fields.get("model") == "nobody" else 400)
    assert re.search(why, said["message"]) and said.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "at least one message"),
        ("hi", "at least one message"),
        ([{"role": "user"}], "must have a role, which is a text, and content"),
        ([{"role": "user", "content": 1}], "content must be a text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "takes text alone"),
    ],
)
def test_messages_that_are_none_are_refused(messages: Any, why: str, shared: Site) -> None:
    response = shared.post("/v1/chat/completions", {"model": BASE, "messages": messages})
    assert response.status_code == 400 and why in response.json()["error"]["message"]


def test_values_that_ask_for_nothing_are_taken(shared: Site) -> None:
    neutral = {"n": 1, "presence_penalty": 0.0, "logprobs": None, "best_of": 1, "user": "ann", "stop": []}
    assert shared.complete(**neutral, max_tokens=1).status_code == 200
    parts = [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "hat"}]}]
    body = {"model": BASE, "messages": parts, "max_completion_tokens": 1}
    assert shared.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"] == len(
        shared.words.encode("<user>the hat>")
    )


def test_bodies_that_are_no_requests_are_refused(shared: Site) -> None:
    json_ = {"content-type": "application/json"}

    async def talk(client: Client) -> Any:
        async def pieces() -> Any:
            for _ in range(5):
                yield b" " * 1000

        post = "/v1/completions"
        return [
            await client.post(post, content=b"{", headers=json_),
            await client.post(post, content=b'{"temperature": NaN}', headers=json_),
            await client.post(post, content=b"[" * 4000, headers=json_),
            await client.post(post, content=b"[]", headers=json_),
            await client.post(post, content=b" " * 5000, headers=json_),
            await client.post(post, content=pieces(), headers=json_),
            await client.post(post, content=b"{}", headers={"content-type": "text/plain"}),
            await client.get(post),
            await client.get("/nothing"),
        ]

    found = shared.ask(talk)
    assert [r.status_code for r in found] == [400, 400, 400, 400, 413, 413, 415, 405, 404]
    assert all(r.json()["error"]["message"] for r in found)
    assert "this server has /v1/completions, /v1/chat/completions" in found[-1].json()["error"]["message"]


def test_models_are_listed_and_adapters_come_and_go(site: Site) -> None:
    async def talk(client: Client) -> Any:
        listed = (await client.get("/v1/models")).json()["data"]
        assert [(m["id"], m["parent"]) for m in listed] == [(BASE, None), *((f"user{i}", BASE) for i in range(3))]
        assert (await client.get("/v1/models/user1")).json()["id"] == "user1"
        assert (await client.get("/v1/models/nobody")).status_code == 404
        ask = {"prompt": [5, 6], "max_tokens": 5, "temperature": 0, "return_token_ids": True}

        async def tokens(name: str) -> Any:
            response = await client.post("/v1/completions", json={"model": name, **ask})
            return response.json()["choices"][0]["token_ids"] if response.status_code == 200 else response.status_code

        assert await tokens("user1") == site.want("user1", [5, 6], 5)
        assert (await client.delete("/v1/adapters/user1")).json() == {
            "id": "user1",
            "object": "adapter",
            "deleted": True,
        }
        assert await tokens("user1") == 404
        assert (await client.delete("/v1/adapters/user1")).status_code == 404
        assert (await client.post("/v1/adapters/user1", json={"path": "user2"})).status_code == 200
        assert await tokens("user1") == site.want("user2", [5, 6], 5)
        assert (await client.post("/v1/adapters/user1")).status_code == 200
        assert await tokens("user1") == site.want("user1", [5, 6], 5)
        return [
            await client.post("/v1/adapters/x", json={"path": ".."}),
            await client.post("/v1/adapters/..%2Fx", json={"path": "user1"}),
            await client.post("/v1/adapters/x%2Fy", json={"path": "user1"}),
            await client.post("/v1/adapters/a%00b", json={"path": "user1"}),
            await client.post("/v1/adapters/x", json={"path": 3}),
            await client.post("/v1/adapters/x", json={"rank": 3}),
            await client.post(f"/v1/adapters/{BASE}", json={"path": "user1"}),
            await client.post("/v1/adapters/x", json={"path": "none"}),
        ]

    found = site.ask(talk)
    assert [r.status_code for r in found] == [400] * 7 + [404], [r.text for r in found]
    assert all("error" in r.json() and str(site.engine.adapters.root) not in r.text for r in found)


def test_a_full_queue_is_429_with_the_time_to_wait(tmp_path: Path) -> None:
    site = Site(tmp_path / "adapters", rows=1, queue=1)
    held = Held(site.engine, Ask([5], None, 2))
    held.next()
    waiting = Held(site.engine, Ask([6], None, 1))
    response = site.complete()
    assert response.status_code == 429 and 1 <= int(response.headers["retry-after"]) <= 60
    assert response.json()["error"]["type"] == "rate_limit_error"
    assert "1 requests wait already" in response.json()["error"]["message"]
    held.go(), waiting.go()
    waiting.all()
    assert site.complete().status_code == 200
    assert site.metric('peftfn_requests_total{outcome="rejected"}') == 1
    site.engine.close()
    assert site.complete().status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_goes_away_frees_the_row(tmp_path: Path, stream: bool) -> None:
    site = Site(tmp_path / "adapters", rows=1)
    held = Held(site.engine, Ask([5], None, 2))  # so that the request waits when its sender goes
    held.next()
    body = json.dumps({"model": BASE, "prompt": [5, 6], "max_tokens": 30, "stream": stream}).encode()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "asgi": {}}
    scope["headers"] = [(b"content-type", b"application/json")]
    messages = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        while len(messages) == 1 and not site.engine.waiting:
            await asyncio.sleep(0.001)
        return messages.pop(0)

    async def send(_: Any) -> None:
        pass

    asyncio.run(asyncio.wait_for(site.app(scope, receive, send), 30))
    held.go()
    held.all()
    assert site.complete(max_tokens=1).status_code == 200
    assert site.engine.waiting == site.engine.running == 0
    assert site.metric('peftfn_requests_total{outcome="cancelled"}') == 1
    assert site.metric("peftfn_generated_tokens_total") == 1, "it went on for nobody"
    site.engine.close()


def test_metrics_count_what_happened(site: Site) -> None:
    used = [site.complete(model=m, max_tokens=4).json()["usage"] for m in ("user0", "user1", BASE)]
    assert site.complete(n=3).status_code == 400
    assert site.metric('peftfn_requests_total{outcome="answered"}') == 3
    assert site.metric('peftfn_requests_total{outcome="refused"}') == 1
    assert site.metric("peftfn_prompt_tokens_total") == 6
    assert site.metric("peftfn_generated_tokens_total") == sum(u["completion_tokens"] for u in used)
    assert site.metric("peftfn_request_seconds_count") == site.metric("peftfn_first_token_seconds_count") == 3
    assert site.metric("peftfn_resident_adapters") == 2 and site.metric("peftfn_queue_length") == 0


def test_health_tells_whether_requests_are_answered(tmp_path: Path) -> None:
    site = Site(tmp_path / "adapters")

    async def talk(client: Client) -> Any:
        return await client.get("/health")

    assert site.ask(talk).status_code == 200
    site.engine.close()
    assert site.ask(talk).status_code == 503


def test_an_engine_that_fails_on_a_request_is_an_error_in_both_shapes(site: Site) -> None:
    def never(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    site.engine.stepper.prefill = never  # type: ignore[method-assign]
    response = site.complete()
    assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
    (failed,) = events(site.complete(stream=True))
    assert "out of memory" in failed["error"]["message"]
    assert site.metric('peftfn_requests_total{outcome="failed"}') == 2


def test_without_a_tokenizer_there_are_token_ids_alone(tmp_path: Path) -> None:
    site = Site(tmp_path / "adapters", text=False)
    found = site.complete(max_tokens=3).json()["choices"][0]
    assert found["text"] == "" and found["token_ids"] == site.want(BASE, [5, 6], 3)
    chunks = events(site.complete(max_tokens=3, stream=True))
    assert [t for c in chunks for t in c["choices"][0]["token_ids"]] == found["token_ids"]
    for fields, why in (({"prompt": "a"}, "no tokenizer: give a list of token ids"), ({"stop": "a"}, "no tokenizer")):
        assert why in site.complete(**fields).json()["error"]["message"]
    chat = site.post("/v1/chat/completions", {"model": BASE, "messages": [{"role": "user", "content": "a"}]})
    assert chat.status_code == 400 and "no chat template" in chat.json()["error"]["message"]
    site.engine.close()
