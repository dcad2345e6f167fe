#!/usr/bin/env python3
"""The SDKs that callers use, against a real Envoy and Keyward: what works, and what each refusal is to them.

Run it with `make sdk-test`: tests/it/sdks.rs starts it, with the packages of sdk-requirements.txt, for one SDK. It says
on stdout where its stand-in for an LLM listens, then takes one JSON object a line on stdin (keys are no arguments), runs
the part that is named there, prints a line for each thing that is as it should be, and "done". It ends at the first that
is not, with a traceback.
"""

import http.server
import itertools
import json
import sys
import threading
import time

PATIENCE = 10.0  # seconds in which the first half of a stream has to arrive
ATTEMPTS = 3  # of a request that may be repeated
SAID = "Hello from the model."
HALVES = ("Hello from ", "the model.")


def main():
    llm = Llm()
    sdk = SDKS[sys.argv[1]]()
    say(llm.port)
    for line in sys.stdin:
        plan = json.loads(line)
        PARTS[plan["part"]](Check(sdk, llm, plan))
        say("done")


class Check:
    """One SDK, one Envoy, some keys."""

    def __init__(self, sdk, llm, plan):
        self.sdk, self.llm = sdk, llm
        self.url, self.keys, self.messages = plan["url"], plan["keys"], plan["messages"]
        self.sent, self.received = [], []

    def client(self, key, attempts=ATTEMPTS, on_answer=None):
        """A client of the SDK; when its requests leave and how they are answered is kept."""
        self.sent, self.received = [], []

        def answered(response):
            self.received.append(response.status_code)
            if on_answer:
                on_answer(response)

        hooks = {"request": [lambda _: self.sent.append(time.monotonic())], "response": [answered]}
        # Kept, because Google's closes its connections when nobody refers to it, even under a stream that is read.
        self.kept = self.sdk.client(self.url, self.keys[key], attempts, hooks)
        return self.kept

    def answers(self, key, model, **more):
        """The key is let in: in one piece and as a stream, which arrives while it is written."""
        for name, ask in self.sdk.ways():
            said = ask(self.client(key), model, **more)
            equal(said, SAID, f"{name} as {key}")
            say(f"{name} as {key}: answered")
        for name, stream in self.sdk.streams():
            self.llm.await_reader()
            halves = []
            for half in stream(self.client(key), model, **more):
                halves.append(half)
                self.llm.reader_has_first.set()
            equal(tuple(halves), HALVES, f"{name} as {key}")
            equal(self.llm.in_time, True, f"{name}: the first half came before the second was written")
            say(f"{name} as {key}: answered half by half")
        equal(self.llm.credentials, set(), "headers with a key in them that went upstream")

    def refused(self, key, status, code, model="gpt-4o", attempts=1, allowed=ATTEMPTS, **more):
        """The key is refused, as often as the SDK asks of what it is allowed to, with the SDK's own error for it."""
        # Some SDKs send nothing before a stream is read.
        read = [(name, lambda *args, ask=ask, **more: list(ask(*args, **more))) for name, ask in self.sdk.streams()]
        for name, ask in self.sdk.ways() + read:
            what = f"{name} as {key}"
            before = self.llm.requests
            try:
                answer = ask(self.client(key, allowed), model, **more)
            except self.sdk.ANY_ERROR as error:
                self.judge(what, error, status, code)
            else:
                raise AssertionError(f"{what}: answered {answer!r}")
            equal(self.received, [status] * attempts, f"{what}: the answers, one an attempt")
            equal(self.llm.requests, before, f"{what}: requests that went upstream")
            say(f"{what}: {status} {code}, {attempts} of {allowed} attempts")

    def judge(self, what, error, status, code):
        expected = self.sdk.ERRORS[status]
        equal(f"{type(error).__module__}.{type(error).__name__}", f"{expected.__module__}.{expected.__name__}", what)
        facts = self.sdk.facts(error)
        message, request_id = facts.pop("message"), facts.pop("request_id")
        equal(facts, self.sdk.expected(status, code), what)
        if code in self.messages:
            equal(message, self.messages[code], f"{what}: the message")
        else:
            equal(message.endswith("."), True, f"{what}: {message!r} is a sentence")
        equal(message in str(error), True, f"{what}: the traceback shows {message!r}: {error}")
        equal(len(request_id or ""), 36, f"{what}: the request id {request_id!r}")
        equal(request_id, error.response.headers["x-request-id"], f"{what}: the request id")


def works_and_is_refused(check):
    check.answers("good", "gpt-4o")
    check.answers("models", "allowed-1")
    check.refused("wrong", 401, "invalid_api_key")
    if check.sdk.without_key:
        check.refused("good", 401, "missing_credentials", headers=check.sdk.without_key)
    check.refused("malformed", 401, "malformed_credentials")
    check.refused("revoked", 401, "key_inactive")
    check.refused("spent", 402, "insufficient_quota")
    check.refused("models", 403, "model_not_allowed")
    check.refused("elsewhere", 403, "endpoint_not_allowed")
    for more in check.sdk.UNCLEAR:
        check.refused("models", 400, "ambiguous_request", **{"model": "allowed-1", **more})


def is_limited_for_guesses(check):
    """Wrong keys in number are 429, which the SDK's own rate limit error tells; the key that is known is answered."""
    check.answers("good", "gpt-4o")
    (_, ask), *_ = check.sdk.ways()
    try:
        raise AssertionError(f"answered {ask(check.client('mistyped'), 'gpt-4o')!r}")
    except check.sdk.ANY_ERROR:
        equal(check.received, [401], "the only guess that is looked at")
    # Once only: an SDK that honours it waits a minute.
    check.refused("wrong", 429, "too_many_attempts", allowed=1)
    check.answers("good", "gpt-4o")


def is_told_to_wait(check):
    """The store is gone: every attempt is made, and no sooner than Keyward says."""
    check.refused("fresh", 503, "unavailable", attempts=ATTEMPTS)
    if check.sdk.HONOURS_RETRY_AFTER:
        pauses = [later - earlier for earlier, later in itertools.pairwise(check.sent)]
        equal([pause >= 1.0 for pause in pauses], [True] * (ATTEMPTS - 1), f"pauses of a second: {pauses}")
        say(f"paused for {', '.join(f'{pause:.2f} s' for pause in pauses)}")


def outlasts_an_outage(check):
    """The store comes back after the first refusal: the caller gets an answer and no error."""

    def on_answer(response):
        if len(check.received) == 1:
            equal(response.status_code, 503, "the store is gone")
            say("refused")

    (_, ask), *_ = check.sdk.ways()
    equal(ask(check.client("fresh", attempts=20, on_answer=on_answer), "gpt-4o"), SAID, "after the outage")
    equal(set(check.received[:-1]), {503}, "the answers before the last")
    say(f"answered at attempt {len(check.received)}")


def finds_nobody(check):
    """Keyward itself is gone: Envoy's own 503, without a word, is repeated as well."""
    (_, ask), *_ = check.sdk.ways()
    try:
        answer = ask(check.client("good"), "gpt-4o")
    except check.sdk.ANY_ERROR as error:
        equal(type(error), check.sdk.ERRORS[503], "the error")
    else:
        raise AssertionError(f"answered {answer!r}")
    equal(check.received, [503] * ATTEMPTS, "the answers, one an attempt")
    say("Envoy's own 503: repeated")


PARTS = {
    "works and is refused": works_and_is_refused,
    "is limited for guesses": is_limited_for_guesses,
    "is told to wait": is_told_to_wait,
    "outlasts an outage": outlasts_an_outage,
    "finds nobody": finds_nobody,
}


class OpenAi:
    HONOURS_RETRY_AFTER = True
    # More than Envoy passes on, and what is said to be compressed.
    UNCLEAR = ({"text": "x" * (5 << 20)}, {"headers": {"content-encoding": "gzip"}})

    def __init__(self):
        import openai

        self.module = openai
        self.without_key = {"Authorization": openai.omit}
        self.ANY_ERROR = openai.OpenAIError
        self.ERRORS = {
            400: openai.BadRequestError,
            401: openai.AuthenticationError,
            # There is no class of its own.
            402: openai.APIStatusError,
            403: openai.PermissionDeniedError,
            429: openai.RateLimitError,
            503: openai.InternalServerError,
        }

    def client(self, url, key, attempts, hooks):
        http_client = self.module.DefaultHttpxClient(event_hooks=hooks)
        base_url = f"{url}/v1"
        return self.module.OpenAI(base_url=base_url, api_key=key, max_retries=attempts - 1, http_client=http_client)

    def ways(self):
        def chat(client, model, text="Hello!", headers=None):
            answer = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": text}], extra_headers=headers
            )  # fmt: skip
            return answer.choices[0].message.content

        def response(client, model, text="Hello!", headers=None):
            return client.responses.create(model=model, input=text, extra_headers=headers).output_text

        return [("chat", chat), ("response", response)]

    def streams(self):
        def chat(client, model, text="Hello!", headers=None):
            chunks = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": text}], extra_headers=headers, stream=True
            )  # fmt: skip
            return (chunk.choices[0].delta.content for chunk in chunks)

        def response(client, model, text="Hello!", headers=None):
            events = client.responses.create(model=model, input=text, extra_headers=headers, stream=True)
            return (event.delta for event in events if event.type == "response.output_text.delta")

        return [("streamed chat", chat), ("streamed response", response)]

    def facts(self, error):
        return {
            "status": error.status_code, "code": error.code, "type": error.type, "param": error.param,
            "message": error.body["message"], "request_id": error.request_id,
        }  # fmt: skip

    def expected(self, status, code):
        kinds = {402: "insufficient_quota", 403: "permission_error", 429: "rate_limit_error", 503: "server_error"}
        return {"status": status, "code": code, "type": kinds.get(status, "invalid_request_error"), "param": None}


class Anthropic:
    HONOURS_RETRY_AFTER = True
    UNCLEAR = OpenAi.UNCLEAR

    def __init__(self):
        import anthropic

        self.module = anthropic
        self.without_key = {"Authorization": anthropic.omit}
        self.ANY_ERROR = anthropic.AnthropicError
        self.ERRORS = {
            400: anthropic.BadRequestError,
            401: anthropic.AuthenticationError,
            402: anthropic.PaymentRequiredError,
            403: anthropic.PermissionDeniedError,
            429: anthropic.RateLimitError,
            503: anthropic.ServiceUnavailableError,
        }

    def client(self, url, key, attempts, hooks):
        http_client = self.module.DefaultHttpxClient(event_hooks=hooks)
        return self.module.Anthropic(base_url=url, api_key=key, max_retries=attempts - 1, http_client=http_client)

    def ways(self):
        def message(client, model, text="Hello!", headers=None):
            answer = client.messages.create(
                model=model, max_tokens=64, messages=[{"role": "user", "content": text}], extra_headers=headers
            )  # fmt: skip
            return answer.content[0].text

        return [("message", message)]

    def streams(self):
        def message(client, model, text="Hello!", headers=None):
            messages = [{"role": "user", "content": text}]
            with client.messages.stream(model=model, max_tokens=64, messages=messages, extra_headers=headers) as stream:
                yield from stream.text_stream

        return [("streamed message", message)]

    def facts(self, error):
        return {
            "status": error.status_code, "code": error.error_code, "type": error.type,
            "message": error.api_message, "request_id": error.request_id,
        }  # fmt: skip

    def expected(self, status, code):
        kinds = {401: "authentication_error", 402: "billing_error", 403: "permission_error", 429: "rate_limit_error"}
        kinds[503] = "api_error"
        return {"status": status, "code": code, "type": kinds.get(status, "invalid_request_error")}


class Google:
    # It waits by its own clock.
    HONOURS_RETRY_AFTER = False
    # The path names the model here, whatever the body is like.
    UNCLEAR = ({"model": "allowed-1;v=2"},)

    def __init__(self):
        from google import genai
        from google.genai import errors, types

        self.module, self.types = genai, types
        # There is no client without a key.
        self.without_key = None
        self.ANY_ERROR = errors.APIError
        self.ERRORS = dict.fromkeys((400, 401, 402, 403, 429), errors.ClientError) | {503: errors.ServerError}

    def client(self, url, key, attempts, hooks):
        retry = self.types.HttpRetryOptions(attempts=attempts, initial_delay=0.1, max_delay=1.0, jitter=0.0)
        options = self.types.HttpOptions(base_url=url, retry_options=retry, client_args={"event_hooks": hooks})
        return self.module.Client(api_key=key, http_options=options)

    def ways(self):
        def generate(client, model):
            return client.models.generate_content(model=model, contents="Hello!").text

        return [("content", generate)]

    def streams(self):
        def generate(client, model):
            return (chunk.text for chunk in client.models.generate_content_stream(model=model, contents="Hello!"))

        return [("streamed content", generate)]

    def facts(self, error):
        reason, request = error.details["error"]["details"]
        return {
            "code": error.code, "status": error.status, "reason": reason["reason"], "message": error.message,
            "request_id": request["requestId"],
        }  # fmt: skip

    def expected(self, status, code):
        names = {401: "UNAUTHENTICATED", 402: "RESOURCE_EXHAUSTED", 403: "PERMISSION_DENIED"}
        names |= {429: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE"}
        return {"code": status, "status": names.get(status, "INVALID_ARGUMENT"), "reason": code.upper()}


SDKS = {"openai": OpenAi, "anthropic": Anthropic, "google": Google}


class Llm:
    """Answers as the three services do, in JSON and in events; one stream at a time."""

    def __init__(self):
        self.requests = 0
        self.credentials = set()
        self.reader_has_first = threading.Event()
        self.in_time = None
        llm = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                llm.requests += 1
                carriers = {"authorization", "x-api-key", "api-key", "x-goog-api-key"}
                llm.credentials |= carriers & {name.lower() for name in self.headers}
                answer, events = SERVICES[self.path.partition("?")[0].rpartition("/")[2].rpartition(":")[2]]
                if body.get("stream") or ":stream" in self.path:
                    self.stream(events)
                else:
                    self.answer(answer)

            def answer(self, answer):
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def stream(self, events):
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                # The end of the connection is the end of the stream.
                self.send_header("connection", "close")
                self.end_headers()
                before, after = events
                self.wfile.write(before)
                llm.in_time = llm.reader_has_first.wait(PATIENCE)
                self.wfile.write(after)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def await_reader(self):
        self.reader_has_first.clear()
        self.in_time = None


def events(*items):
    """Server-sent events; Anthropic's and OpenAI's newer ones also have their type as a name."""
    written = b""
    for item in items:
        name = f"event: {item['type']}\n" if "type" in item else ""
        written += f"{name}data: {json.dumps(item)}\n\n".encode()
    return written


def chat_chunk(text):
    delta = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [delta]}


def response_delta(text):
    return {"type": "response.output_text.delta", "item_id": "m1", "output_index": 0, "content_index": 0, "delta": text}


def message(content):
    usage = {"input_tokens": 1, "output_tokens": 1}
    return {"id": "m1", "type": "message", "role": "assistant", "model": "m", "content": content, "usage": usage}


def message_delta(text):
    return {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}


def candidate(text):
    return {"candidates": [{"index": 0, "content": {"role": "model", "parts": [{"text": text}]}}]}


# By the last word of the path: the answer in one piece, and as events before and after the reader has the first half.
FIRST, SECOND = HALVES
SERVICES = {
    "completions": (
        {"id": "c1", "object": "chat.completion", "created": 1, "model": "m",
         "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": SAID}}]},
        (events(chat_chunk(FIRST)), events(chat_chunk(SECOND)) + b"data: [DONE]\n\n"),
    ),
    "responses": (
        {"id": "r1", "object": "response", "created_at": 1, "model": "m", "output": [
            {"id": "m1", "type": "message", "role": "assistant", "status": "completed",
             "content": [{"type": "output_text", "text": SAID, "annotations": []}]}]},
        (events(response_delta(FIRST)), events(response_delta(SECOND))),
    ),
    "messages": (
        message([{"type": "text", "text": SAID}]),
        (
            events(
                {"type": "message_start", "message": message([])},
                {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
                message_delta(FIRST),
            ),
            events(
                message_delta(SECOND),
                {"type": "content_block_stop", "index": 0},
                {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
                {"type": "message_stop"},
            ),
        ),
    ),
    "generateContent": (candidate(SAID), None),
    "streamGenerateContent": (None, (events(candidate(FIRST)), events(candidate(SECOND)))),
}  # fmt: skip


def equal(got, expected, what):
    if got != expected:
        raise AssertionError(f"{what}\n  expected {expected!r}\n  got      {got!r}")


def say(what):
    print(what, flush=True)


if __name__ == "__main__":
    main()
