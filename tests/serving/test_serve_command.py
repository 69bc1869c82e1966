"""`peftfn serve` as a process: real sockets, a stream that is cut, a clean stop; and what it refuses at once."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import alone, folders, model, tokenizer

from peftfn.__main__ import main


@pytest.fixture(scope="module")
def root(tmp_path_factory: Any) -> Path:
    """A model with a tokenizer, without an end; and adapters of it."""
    made: Path = tmp_path_factory.mktemp("serve")
    base = model(end=None, max_position_embeddings=2048)
    base.save_pretrained(made / "tiny")
    tokenizer().save_pretrained(made / "tiny")
    folders(made / "adapters", base, 3)
    return made


@pytest.fixture
def server(root: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    command = [sys.executable, "-m", "peftfn", "serve", str(root / "tiny"), "--adapters", str(root / "adapters")]
    process = subprocess.Popen(
        [*command, "--port", "0", "--rows", "2", "--max-tokens", "2000", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    try:
        assert line.startswith("peftfn serve: tiny at http://127.0.0.1:") and "/v1, 3 adapters" in line, line
        with httpx.Client(base_url=line.split()[4].removesuffix("/v1,"), timeout=60, trust_env=False) as client:
            yield process, client
    finally:
        process.kill()
        process.communicate()


def test_a_server_answers_streams_and_stops(server: Any, root: Path) -> None:
    process, client = server
    base = model(end=None, max_position_embeddings=2048)
    made = folders(root / "again", base, 3)
    body = {"model": "user1", "prompt": [5, 6], "temperature": 0, "return_token_ids": True}
    whole = client.post("/v1/completions", json=body | {"max_tokens": 9}).json()
    assert whole["choices"][0]["token_ids"] == alone(*made["user1"], [5, 6], 9)
    with client.stream("POST", "/v1/completions", json=body | {"max_tokens": 2000, "stream": True}) as response:
        first = next(line for line in response.iter_lines() if line.startswith("data: "))
        assert json.loads(first[6:])["choices"][0]["token_ids"] == whole["choices"][0]["token_ids"][:1]
    for _ in range(600):  # the stream is closed: its row is free before 2000 tokens are made
        metrics = client.get("/metrics").text
        if "peftfn_running_requests 0.0" in metrics:
            break
        time.sleep(0.05)
    assert 'peftfn_requests_total{outcome="cancelled"} 1.0' in metrics
    made_tokens = float(metrics.partition("\npeftfn_generated_tokens_total ")[2].split()[0])
    assert made_tokens < 1900
    with client.stream("POST", "/v1/completions", json=body | {"max_tokens": 300, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]", "a stop cut an answer off"
    assert process.wait(timeout=60) == 0
    said = process.stderr.read()
    assert "Traceback" not in said and "ERROR" not in said, said


def refused(capsys: Any, *arguments: str) -> str:
    assert main(["serve", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("peftfn serve: ") and said.count("\n") == 1
    return said


def test_bad_input_is_one_line_and_code_2(root: Path, capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    tiny, adapters = str(root / "tiny"), str(root / "adapters")
    assert "none is no folder; give one whose sub-folders are adapters" in refused(
        capsys, tiny, "--adapters", str(root / "none")
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen at port {port} of 127.0.0.1: Address already in use" in refused(
            capsys, tiny, "--port", port
        )
    any_port = ("--port", "0", "--device", "cpu")
    assert "--port is 99999; give one from 0 to 65535" in refused(capsys, tiny, "--port", "99999")
    assert "no/where" in refused(capsys, str(tmp_path / "no/where"), *any_port)
    assert "has no config.json" in refused(capsys, adapters, *any_port)
    assert "--context is 4000, and the model has 2048 positions" in refused(
        capsys, tiny, "--context", "4000", *any_port
    )
    assert "give at least as many slots (--resident) as rows (--rows)" in refused(
        capsys, tiny, "--resident", "2", *any_port
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
    assert "cannot load it as a causal language model" in refused(capsys, str(tmp_path), *any_port)
    monkeypatch.setattr("peftfn.cli.serve.find_spec", lambda name: None if name == "fastapi" else True)
    assert "it needs fastapi: pip install 'peftfn[serve]'" in refused(capsys, tiny)
    with pytest.raises(SystemExit) as ended:
        main(["serve", tiny, "--rows", "0"])
    assert ended.value.code == 2
