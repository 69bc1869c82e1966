"""The guide says of the soak what its record says, and a wrong answer is counted as one."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
with pytest.MonkeyPatch.context() as path:
    path.syspath_prepend(ROOT)
    from benchmarks import soak


def test_the_guide_says_what_the_record_says() -> None:
    page = " ".join((ROOT / "docs" / "serving.md").read_text().split())
    assert soak.said(json.loads(soak.OUT.read_text())) in page, "put in what the soak printed"


@pytest.mark.parametrize("streamed", [False, True])
def test_the_soak_tells_a_wrong_answer_from_a_right_one(streamed: bool) -> None:
    choice = {"choices": [{"token_ids": [3, 4]}]}
    text = f"data: {json.dumps(choice)}\n\ndata: [DONE]\n\n" if streamed else json.dumps(choice)
    asked: list[int] = []

    def answer(_: httpx.Request) -> httpx.Response:
        asked.append(1)
        return httpx.Response(429, headers={"retry-after": "0"}) if len(asked) == 1 else httpx.Response(200, text=text)

    async def run() -> soak.Tally:
        tally = soak.Tally(10, 0)
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://server") as http:
            for want in ([3, 4], [3, 5], [3]):
                await soak._compared(http, {"model": "a"}, want, tally, streamed)
        return tally

    tally = asyncio.run(run())
    assert tally.outcomes == {"told to wait, 429": 1, "right": 1, "wrong": 2}
    assert tally.tokens == 2 and len(tally.wrong) == 2
