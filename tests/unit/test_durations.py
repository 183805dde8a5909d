"""Time spans have one syntax in commands, flags, variables and files."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgtask._cli.main import main
from pgtask._durations import parse_duration
from pgtask.config import load_config
from pgtask.errors import ConfigError

RIGHT = {
    "0": 0,
    "5": 5,
    "90.5": 90.5,
    ".5": 0.5,
    "1e3": 1000,
    "0s": 0,
    "45s": 45,
    "5m": 300,
    "5min": 300,
    "1h30m": 5400,
    "1h 30m": 5400,
    "1.5h": 5400,
    "2d": 172_800,
    "1w1d": 691_200,
    "500ms": 0.5,
    " 5m ": 300,
}
WRONG = ["", " ", "m", "5x", "-5", "-5m", "5M", "30m1h", "5m5m", "nan", "inf", "1_0", "5 minutes", "٣", "1h30", "0x10"]


@pytest.mark.parametrize(("text", "seconds"), RIGHT.items())
def test_time_span_is_read_everywhere(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)
    assert load_config({"grace": text}, environ={}).grace == pytest.approx(seconds)
    assert load_config({}, environ={"PGTASK_GRACE": text}).grace == pytest.approx(seconds)


@pytest.mark.parametrize("text", WRONG)
def test_text_that_is_no_time_span_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="expected a time span such as"):
        parse_duration(text)
    with pytest.raises(
        ConfigError, match=r"--grace=.*: expected seconds, zero or more, or a time span such as 90s, 5m"
    ):
        load_config({"grace": text}, environ={})
    for words in (["prune", f"--older-than={text}"], ["enqueue", "a:b", "C", f"--delay={text}"]):
        assert main(words) == 2
        assert "is not a number of seconds, nor a time span such as 90s, 5m" in capsys.readouterr().err


def test_every_setting_that_is_a_time_takes_units(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.pgtask]\nlease-timeout = "2m"\nstall = 30\n')
    config = load_config({"burst_horizon": "1h"}, environ={"PGTASK_HEARTBEAT_INTERVAL": "500ms"}, directory=tmp_path)
    assert (config.lease_timeout, config.stall, config.burst_horizon, config.heartbeat_interval) == (120, 30, 3600, 0.5)
    with pytest.raises(ConfigError, match="expected seconds, 2 or more, or 0 for never"):
        load_config({"stall": "1900ms"}, environ={})
    with pytest.raises(ConfigError, match="more than zero"):
        load_config({"lease_timeout": "0m"}, environ={})


def test_a_span_has_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="less than 1,000,000,000"):
        load_config({"grace": "9999w"}, environ={})
    assert main(["prune", "--older-than", "9999w"]) == 2
    assert "9999w is too long: give less than 1,000,000,000 seconds" in capsys.readouterr().err
