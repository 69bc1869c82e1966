"""What a server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from peftfn.serving.engine import Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
OUTCOMES = ("answered", "refused", "rejected", "failed", "cancelled")
"""A whole answer; an error of the request; a full queue; an error of the server; whoever asked went away."""


class Metrics:
    """Counters of one server, in a registry of their own. No adapter is a label: there may be thousands."""

    def __init__(self, engine: Engine):
        self.registry = r = CollectorRegistry()
        self.requests = Counter("peftfn_requests", "Requests by how they ended", ["outcome"], registry=r)
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        self.prompt = Counter("peftfn_prompt_tokens", "Tokens of the prompts of accepted requests", registry=r)
        self.generated = Counter("peftfn_generated_tokens", "Tokens of answers", registry=r)
        self.first = Histogram(
            "peftfn_first_token_seconds", "From arrival to the first token", registry=r, buckets=_SECONDS
        )
        self.whole = Histogram("peftfn_request_seconds", "From arrival to the last token", registry=r, buckets=_SECONDS)
        for name, what, value in (
            ("peftfn_queue_length", "Requests that wait", lambda: engine.waiting),
            ("peftfn_running_requests", "Rows of the running batch", lambda: engine.running),
            ("peftfn_resident_adapters", "Adapters in slots", lambda: engine.adapters.resident),
            ("peftfn_registered_adapters", "Names whose adapters were read", lambda: engine.adapters.registered),
        ):
            Gauge(name, what, registry=r).set_function(value)

    def text(self) -> bytes:
        out: bytes = generate_latest(self.registry)
        return out
