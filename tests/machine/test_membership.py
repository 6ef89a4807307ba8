"""The members of a run, with a thread for each: who is missing, different, lost or stuck is said in one line."""

import contextlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lowrank_jax.config import RunFailure, UsageError
from lowrank_jax.machine import coordinator, membership

FACTS = {"--processes": 2, "config.optim.lr": 0.01, "config.seed": 0}


class Quiet(membership.Member):
    """A member whose process does not quit; it notes the line instead."""

    def _quit(self, line: str) -> None:
        self.quit = line

    def vanish(self) -> None:
        """Close the connection as a kill does, without a word."""
        self._loop.call_soon_threadsafe(self._following.cancel)
        self._loop.call_soon_threadsafe(self._writer.transport.abort)

    def fall_silent(self) -> None:
        self._loop.call_soon_threadsafe(self._heartbeat.cancel)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Seconds become tenths or less."""
    for name, seconds in {"HEARTBEAT": 0.05, "SILENT": 0.6, "DIFFERENCE": 0.5}.items():
        monkeypatch.setattr(coordinator, f"{name}_SECONDS", seconds)
    for name, seconds in {"FIRST_NOTE": 0.3, "NOTE": 0.4, "LOST": 0.1, "ENDED": 0.1}.items():
        monkeypatch.setattr(membership, f"{name}_SECONDS", seconds)


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(membership, "say", lambda line, everyone=False: lines.append(line))
    return lines


@pytest.fixture
def address() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def join(address: str, index: int, count: int = 2, wait: float = 20, received=(), pause: float = 0, **facts) -> Quiet:
    time.sleep(pause)
    mine = Quiet(address, index, count)
    mine.join(
        FACTS | {"--processes": count} | {key.replace("__", "."): x for key, x in facts.items()},
        "start alike",
        wait,
        received,
    )
    return mine


def all_of(*starts) -> list:
    """Run functions at once; return each one's result, or its error."""
    with ThreadPoolExecutor(len(starts)) as pool:
        futures = [pool.submit(start) for start in starts]
        return [future.exception() or future.result() for future in futures]


def joined(address: str, count: int = 2) -> list[Quiet]:
    return all_of(*(lambda i=i: join(address, i, count) for i in range(count)))


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    "others, line",
    [
        ({}, ""),
        ({"config.seed": 1}, "process 1 has config.seed=1, the first process has 0"),
        ({"config.seed": False}, "process 1 has config.seed=false, the first process has 0"),
        ({"new": "x"}, 'process 1 has new="x", the first process has nothing'),
        ({"config.seed": "\x1b[2J"}, 'process 1 has config.seed="\\u001b[2J", the first process has 0'),
        ({"config.optim.lr": 0.02, "config.seed": 1}, "=0.02, the first process has 0.01 (and 1 more: config.seed)"),
        (
            {"sources": "x" * 300 + "b"},
            'process 1 has sources=...xxxxxxxxxxxxxxxxxxxxb", the first process has ...xxxxxxxxxxxxxxxxxxxxa"',
        ),
    ],
)
def test_a_difference_names_process_key_and_both_values(others, line):
    facts = FACTS | {"sources": "x" * 300 + "a"}
    text = coordinator.difference(
        {i: membership.as_json(each) for i, each in enumerate((facts, facts | others, facts))}
    )
    assert line in text and len(text) < 300 and bool(text) == bool(line)


def test_another_value_of_any_key_is_the_same_line_on_all_even_on_one_that_comes_late(address):
    started = time.monotonic()
    ends = all_of(
        lambda: join(address, 0, 3),
        lambda: join(address, 1, 3, config__optim__lr=0.02),
        lambda: join(address, 2, 3, pause=0.3),
    )
    line = "process 1 has config.optim.lr=0.02, the first process has 0.01; start alike"
    assert [(type(e), str(e)) for e in ends] == 3 * [(UsageError, line)] and time.monotonic() - started < 5


@pytest.mark.parametrize("pause", [0, 0.2])
def test_other_numbers_of_processes_are_one_line_before_the_last_has_come(address, pause):
    ends = all_of(lambda: join(address, 0, 3), lambda: join(address, 1, 2, pause=pause))
    line = "process 1 has --processes=2, the first process has 3; start alike"
    assert [(type(e), str(e)) for e in ends] == 2 * [(UsageError, line)]


@pytest.mark.parametrize("index", [0, 1])
def test_two_processes_of_one_number_are_one_line_on_all(address, index):
    ends = all_of(
        lambda: join(address, 0, 3),
        lambda: join(address, index or 1, 3, pause=0.2),
        lambda: join(address, index, 3, pause=0.4),
    )
    assert all(isinstance(e, UsageError) and f"two processes have the number {index}, on " in str(e) for e in ends), (
        ends
    )


def test_one_that_comes_after_all_have_joined_is_refused_and_the_others_go_on(address):
    first, second = joined(address)
    with pytest.raises(UsageError, match="two processes have the number 1"):
        join(address, 1)
    with pytest.raises(UsageError, match="the run of 2 processes at this address has begun; start process 3"):
        join(address, 3, 4)
    assert all_of(lambda: first.barrier("later"), lambda: second.barrier("later")) == [True, True]


def test_who_is_missing_is_said_again_and_again_and_at_last_by_all(address, said):
    ends = all_of(lambda: join(address, 0, 4, wait=1.2), lambda: join(address, 2, 4, pause=0.1))
    line = "processes 1, 3 did not join within 1.2 s; start it, or wait longer with --wait=SECONDS"
    assert [(type(e), str(e)) for e in ends] == 2 * [(RunFailure, line)]
    words = [line for line in said if line.startswith("waiting for processes 1, 3 since ") and "of at most" in line]
    assert 2 <= len(words) <= 3  # of one process, of two that wait


def test_one_that_leaves_before_all_have_come_may_come_again(address):
    def come_twice():
        early = Quiet(address, 1, 3)
        with pytest.raises(RunFailure):
            early.join(FACTS | {"--processes": 3}, "", 0.5, ())
        early.vanish()
        return join(address, 1, 3, pause=0.2)

    ends = all_of(lambda: join(address, 0, 3), come_twice, lambda: join(address, 2, 3, pause=1))
    assert [type(e) for e in ends] == 3 * [Quiet], ends


def test_a_member_whose_message_cannot_be_read_is_named_with_the_reason(address):
    first, second = joined(address)
    second._send(barrier="later")  # without its facts
    wait_for(lambda: first.lost)
    assert first.lost == "process 1 has sent a message that cannot be read (KeyError: 'facts')"


def test_a_port_that_a_silent_program_has_is_named(address, monkeypatch):
    monkeypatch.setattr(membership, "ANSWER_SECONDS", 0.2)
    host, port = address.split(":")
    with socket.create_server((host, int(port))), pytest.raises(UsageError, match=f"port {port} cannot be used here"):
        join(address, 0, 2, wait=3)


def test_an_unknown_host_is_named_as_such(monkeypatch):
    async def look_up(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(membership.asyncio, "open_connection", look_up)
    with pytest.raises(RunFailure, match="the first process, at nowhere:80 .Name or service not known., did not join"):
        join("nowhere:80", 1, 2, wait=0.5)


def test_a_first_process_that_is_not_there_is_named_with_its_address(address, said):
    with pytest.raises(
        RunFailure, match=f"the first process, at {address} .Connection refused., did not join within 0.5 s"
    ):
        join(address, 1, wait=0.5)
    assert len(said) == 1 and f"the first process, at {address}" in said[0]


def test_another_program_at_the_address_is_named(address, said):
    with socket.create_server(("127.0.0.1", int(address.split(":")[1]))) as server, ThreadPoolExecutor(1) as pool:
        accepted = []  # a connection that is closed with unread data is reset, and loses the greeting

        def greet():
            with contextlib.suppress(OSError):
                while True:
                    accepted.append(server.accept()[0])
                    accepted[-1].sendall(b"SSH-2.0-x\r\n")

        pool.submit(greet)
        try:
            with pytest.raises(RunFailure, match="something else answers there"):
                join(address, 1, wait=0.5)
            with pytest.raises(UsageError, match="cannot be used here .Address already in use.; choose a free port"):
                join(address, 0)
        finally:
            server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("text", ["host", "host:", "host:0x1", ":1234", "host:99999"])
def test_an_address_without_host_or_port_is_refused(text):
    with pytest.raises(UsageError, match="must be HOST:PORT"):
        membership.Member(text, 0, 2)


def test_a_signal_ends_the_waiting_at_once(address, said):
    with pytest.raises(SystemExit) as e:
        join(address, 0, received=[15])
    assert e.value.code == 143 and said == ["SIGTERM: ending, while process 1 had not come"]


def test_a_signal_before_the_first_step_ends_all_and_a_later_one_waits(address, said):
    received = []
    both = all_of(lambda: join(address, 0), lambda: join(address, 1, received=received))
    received.append(2)
    for each in both:
        each.record_progress(is_step=True)
    assert all_of(*(lambda each=each: each.barrier("save") for each in both)) == [True, True]
    for each in both:
        each._last_progress = 0.0
    ends = all_of(lambda: both[0].barrier("compile"), lambda: time.sleep(0.2) or both[1].barrier("other"))
    assert [(type(e), e.code) for e in ends] == 2 * [(SystemExit, 130)]
    assert sum("SIGINT: ending" in line for line in said) == 1
    for each in both:
        each.leave(130)


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("how", ["vanish", "fall_silent"])
def test_a_process_that_is_killed_or_stopped_ends_the_others_with_a_line(address, lost, how):
    both = joined(address)
    gone, other = both[lost], both[1 - lost]
    getattr(gone, how)()
    if how == "fall_silent" and lost == 0:  # the coordinator stops with the first process
        gone._loop.call_soon_threadsafe(gone._watch.cancel)
    name = "the first process" if lost == 0 and how == "fall_silent" else f"process {lost}"
    reason = coordinator.GONE if how == "vanish" else coordinator.SILENT
    with pytest.raises(RunFailure) as e:  # it waits for the other one
        other.barrier("step")
    assert str(e.value) == f"{name} {reason}"
    wait_for(lambda: getattr(other, "quit", "") == str(e.value))  # in JAX no exception would reach it


def test_a_process_that_fails_tells_the_others_which_end_a_little_later(address):
    first, second = joined(address)
    second.leave(2)
    wait_for(lambda: getattr(first, "quit", ""))
    assert first.quit == "process 1 has ended with status 2; its output says why" and not first.lost


@pytest.mark.parametrize("status", [0, 143])
def test_processes_that_end_together_say_nothing_of_each_other(address, status):
    both = joined(address)
    all_of(*(lambda each=each: each.leave(status) for each in both))
    for each in both:
        each.vanish()
    time.sleep(0.4)
    assert not any(each.lost or each.ended or hasattr(each, "quit") for each in both)


def test_a_run_that_makes_no_progress_after_a_step_ends(address, monkeypatch):
    both = joined(address)
    monkeypatch.setattr(coordinator, "STUCK_SECONDS", 0.3)
    time.sleep(0.6)
    assert not any(each.lost for each in both)  # no step yet: the data may be on its way
    for each in both:
        each.record_progress(is_step=True)
    for _ in range(5):
        both[1].record_progress()  # one of them makes progress
        time.sleep(0.1)
    assert not any(each.lost for each in both)
    wait_for(lambda: all(each.lost == coordinator.STUCK for each in both))


def test_a_place_with_a_time_limit_tells_who_came_alone(address):
    first, second = joined(address)
    assert not first.barrier("alone", seconds=0.3)
    assert all_of(lambda: first.barrier("both", seconds=5), lambda: second.barrier("both", seconds=5)) == [True, True]
    ends = all_of(lambda: first.barrier("data", {"hash": "a"}, "fix it"), lambda: second.barrier("data", {"hash": "b"}))
    assert {str(e) for e in ends} == {'process 1 has hash="b", the first process has "a"; fix it'}


def test_jax_is_reached_through_the_same_port_and_never_sees_its_connection_close(address):
    first, second = joined(address)
    host, port = first.service.split(":")
    with (
        socket.create_server((host, int(port))) as service,
        socket.create_connection(second.service.split(":")) as client,
    ):
        behind, _ = service.accept()
        client.sendall(b"ask")
        assert behind.recv(10) == b"ask"
        behind.sendall(b"answer")
        assert client.recv(10) == b"answer"
        behind.close()
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(10)
