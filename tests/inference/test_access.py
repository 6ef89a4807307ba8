"""Who may use the server: names of this machine, keys in any spelling, pages of other sites, prompts of other keys."""

import asyncio

import httpx2
import pytest
from test_scheduler import client_of, routes_over, scheduling

MODELS = "/v1/models"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


def ask(tok, requests: list[tuple[str, str, dict]], **access) -> list[httpx2.Response]:
    """Return the responses to (method, path, headers)."""

    async def run():
        async with scheduling() as (scheduler, *_):
            transport = httpx2.ASGITransport(routes_over(tok, scheduler, **access))
            async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
                return [await http.request(method, path, headers=headers) for method, path, headers in requests]

    return asyncio.run(run())


@pytest.mark.parametrize("path", ["/", MODELS, "/metrics", "/healthz", "/v1/nothing"])
def test_without_a_key_only_names_of_this_machine_are_answered(tok, path):
    own = [
        "localhost",
        "localhost:8000",
        "LOCALHOST",
        "a.localhost",
        "127.0.0.1:80",
        "[::1]:80",
        "192.168.1.7",
        "test.",
    ]
    foreign = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "test.example"]
    for host in own:
        (response,) = ask(tok, [("GET", path, {"Host": host, "Origin": f"http://{host}"})])
        assert response.status_code == (404 if path == "/v1/nothing" else 200), host
    for response in ask(tok, [("GET", path, {"Host": host, "Origin": f"http://{host}"}) for host in foreign]):
        assert response.status_code == 403 and response.json()["error"]["code"] == "unknown_host"
    key = {"Authorization": "Bearer k", "Host": "evil.example"}
    assert ask(tok, [("GET", path, key)], keys=("k",))[0].status_code in (200, 404)


def test_pages_of_other_sites_need_a_key_or_their_names_on_the_list(tok):
    page = {"Origin": "https://a.example"}
    other = {"Origin": "https://b.example"}
    key = {"Authorization": "Bearer k"}
    first, preflight = ask(tok, [("GET", MODELS, page), ("OPTIONS", MODELS, page | PREFLIGHT)])
    assert (first.status_code, first.json()["error"]["code"]) == (403, "foreign_origin")
    assert preflight.status_code == 403 and "--allow-origin" in first.json()["error"]["message"]

    for access in ({"keys": ("k",)}, {"origins": ("https://a.example",)}, {"origins": ("*",)}):
        preflight, answer = ask(tok, [("OPTIONS", MODELS, page | PREFLIGHT), ("GET", MODELS, page | key)], **access)
        assert preflight.status_code == 200 and "POST" in preflight.headers["access-control-allow-methods"]
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] in ("*", "https://a.example"), access
    # The page can read the reason.
    (refused,) = ask(tok, [("GET", MODELS, page)], keys=("k",))
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "*"

    listed = {"origins": ("https://a.example",), "keys": ("k",)}
    preflight, answer = ask(tok, [("OPTIONS", MODELS, other | PREFLIGHT), ("GET", MODELS, other | key)], **listed)
    assert preflight.status_code == 400 and answer.status_code == 403


def test_each_of_several_keys_is_an_owner(tok):
    async def run(**access):
        async with scheduling() as (scheduler, *_):
            owners, submit = [], scheduler.submit
            scheduler.submit = lambda requests: (owners.extend(r.owner for r in requests), submit(requests))[1]
            app = routes_over(tok, scheduler, **access)
            for key in ("k", "l", "k"):
                await client_of(app, key).completions.create(model="m", prompt=[500], max_tokens=1)
            return owners

    first, second, third = asyncio.run(run(keys=("k", "l"), reuses_prefixes_of_all=False))
    assert first == third != second
    assert set(asyncio.run(run(keys=("k", "l")))) == {""}
    assert set(asyncio.run(run(reuses_prefixes_of_all=False))) == {""}


def test_the_responses_api_is_a_404_that_names_the_other(tok):
    (response,) = ask(tok, [("POST", "/v1/responses", {})])
    assert response.status_code == 404 and "/v1/chat/completions" in response.json()["error"]["message"]
