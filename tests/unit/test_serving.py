"""Settings of a server: file, environment and flags fill one value; nothing is ignored or guessed."""

import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from omniserve.base.environment import environment, server_environment
from omniserve.base.errors import ConfigError
from omniserve.base.serving import ServerLimits, ServerOptions, server_options
from tests.cli.commands import ROOT, Ran, check_refusal
from tests.cli.conftest import run

__all__ = ["run"]


def test_the_environment_fills_options_and_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "PORT": "0",
        "API_KEY": "one, two",
        "UI": "off",
        "SHUTDOWN_TIMEOUT": "2.5",
        "MAX_NUM_QUEUED_TOKENS": "7",
        "LOG_JSON": "true",
        "LIMIT_MAX_CONNECTIONS": "10",
        "LIMIT_HEADER_DEADLINE": "0.5",
        "SEED": "3",
    }.items():
        monkeypatch.setenv(f"OMNISERVE_{name}", text)
    assert environment() == {"seed": 3}
    made = server_options(server_environment(), origin="environment")
    limits = ServerLimits(max_connections=10, header_deadline=0.5)
    assert made == ServerOptions(
        port=0,
        api_key=("one", "two"),
        ui=False,
        shutdown_timeout=2.5,
        max_num_queued_tokens=7,
        log_json=True,
        limits=limits,
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("OMNISERVE_PROT", "1", r"unknown option OMNISERVE_PROT \(did you mean port\?\)"),
        ("OMNISERVE_LIMIT_MAX_CONECTIONS", "1", r"did you mean limit_max_connections\?"),
        ("OMNISERVE_LIMITS", "1", "unknown option OMNISERVE_LIMITS"),
        ("OMNISERVE_PORT", "many", "OMNISERVE_PORT='many': must be a number"),
        ("OMNISERVE_PORT", "-1", "environment: port='-1': must be a whole number, 0 or more"),
        ("OMNISERVE_PORT", "70000", "environment: port=70000: must be 0 to 65535"),
        ("OMNISERVE_API_KEY", "one,,two", "api_key must be a text or a list of texts, none of them empty"),
        ("OMNISERVE_UI", "maybe", "OMNISERVE_UI='maybe': must be true or false"),
        ("OMNISERVE_LOG_LEVEL", "loud", "log_level='loud': must be one of debug, info, warning, error"),
        ("OMNISERVE_LIMIT_MAX_BODY_BYTES", "0", "environment: limits: max_body_bytes=0: must be above 0"),
        ("OMNISERVE_MAX_NUM_QUEUED_REQS", "0", "max_num_queued_reqs=0: must be above 0"),
        ("OMNISERVE_LIMIT_PING", "inf", "environment: limits: ping='inf': must be a number, 0 or more"),
    ],
)
def test_wrong_variables_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, text: str, message: str) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=message):
        server_options(server_environment(), origin="environment")


def test_what_may_be_zero() -> None:
    made = server_options({"port": 0, "shutdown_timeout": 0, "limits": {"key_requests_per_minute": 0}}, origin="file")
    assert (made.port, made.shutdown_timeout, made.limits) == (0, 0.0, ServerLimits())


def test_every_flag_of_the_server_is_a_setting() -> None:
    """So that it may stand in a file or in the environment."""
    from omniserve.cli.serve import ServerFlags

    assert {one.name for one in fields(ServerFlags)} <= {one.name for one in fields(ServerOptions)}


def test_every_limit_is_documented() -> None:
    rows = (ROOT / "docs" / "serving.md").read_text().split("| limit | default |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", rows)) == {one.name for one in fields(ServerLimits)}


def test_limits_are_merged_one_by_one() -> None:
    base = server_options({"limits": {"ping": 1, "max_headers": 5}}, origin="file")
    made = server_options({"limits": {"ping": 2}}, origin="environment", base=base)
    assert made.limits == ServerLimits(ping=2.0, max_headers=5)


def test_where_each_setting_comes_from(
    run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Environment over file; keys are counted, not shown; what belongs to the server disturbs no other command."""
    (tmp_path / "c.yaml").write_text("port: 1\napi-key: [sesame, open]\nlimits: {ping: 3, max_headers: 9}\nseed: 2\n")
    monkeypatch.setenv("OMNISERVE_PORT", "2")
    monkeypatch.setenv("OMNISERVE_LIMIT_PING", "4")
    ran = run("doctor", "--config", "c.yaml", "--json")
    assert ran.code == 0, ran.err
    settings = json.loads(ran.out)["settings"]
    assert settings["port"] == {"value": 2, "origin": "OMNISERVE_PORT"}
    assert settings["limits.ping"] == {"value": 4.0, "origin": "OMNISERVE_LIMIT_PING"}
    assert settings["limits.max_headers"] == {"value": 9, "origin": "c.yaml"}
    assert settings["api_key"] == {"value": "2 keys", "origin": "c.yaml"}
    assert settings["seed"] == {"value": 2, "origin": "c.yaml"}
    assert settings["shutdown_timeout"] == {"value": 30.0, "origin": "default"}
    assert "sesame" not in run("doctor", "--config", "c.yaml").out
    (tmp_path / "bad.yaml").write_text("limits: {pong: 3}\n")
    check_refusal(run("doctor", "--config", "bad.yaml"), "bad.yaml: limits: unknown option 'pong'", "ping")
