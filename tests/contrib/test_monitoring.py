"""contrib/monitoring: what Prometheus and Grafana make of it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from backyfs.engine import metrics
from tests.parts import require

MONITORING = Path(__file__).parent.parent.parent / "contrib" / "monitoring"
RULES = MONITORING / "backyfs.rules.yml"
HERE = Path(__file__).parent


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(
        [require("promtool", "knows the rules"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_are_rules() -> None:
    promtool("check", "rules", RULES)


@pytest.mark.parametrize("name", ["rules.test.yml", "rules-long.test.yml"])
def test_alerts_fire_when_they_should(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text((HERE / name).read_text().replace("[RULES]", f"[{RULES}]"))
    promtool("test", "rules", path)


def test_every_alert_is_tested() -> None:
    alerts = set(re.findall(r"alert: (\w+)", RULES.read_text()))
    short = (HERE / "rules.test.yml").read_text()
    tested = set(
        re.findall(r'alertname="(\w+)"', short + (HERE / "rules-long.test.yml").read_text())
    )
    assert alerts == tested | {"BackyfsMetricsAbsent"}
    assert alerts == set(re.findall(r"alertname: (\w+)", short)), "quiet when all is well"


@pytest.mark.parametrize("name", ["backyfs.rules.yml", "grafana.json"])
def test_metrics_that_are_used_exist(name: str) -> None:
    known = set(re.findall(r'"(job_\w+|quarantine_\w+)"', Path(metrics.__file__).read_text()))
    written = {f"backyfs_{name}" for name in known}
    written |= set(re.findall(r'"(backyfs_\w+)"', Path(metrics.__file__).read_text()))
    written |= {f"{name}_total" for name in written if name.startswith("backyfs_backup_")}
    used = set(re.findall(r"\bbackyfs_\w+", (MONITORING / name).read_text()))
    assert used <= written, used - written


def test_the_dashboard_asks_for_its_data_source() -> None:
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    assert dashboard["__inputs"][0]["pluginId"] == "prometheus"
    names = {item["name"] for item in dashboard["templating"]["list"]}
    assert names == {"tenant", "job"}
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == "${DS_PROMETHEUS}"
        assert panel["targets"]
