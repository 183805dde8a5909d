"""Settings: their sources, the order of the sources, and the errors for bad values."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest

from pgtask._cpus import default_procs
from pgtask._settings import SETTINGS, Setting
from pgtask.config import Config, load_config
from pgtask.errors import ConfigError

SAMPLES: dict[str, tuple[Any, Any]] = {
    "app": ("a:b", "a:b"),
    "dsn": ("postgresql:///x", "postgresql:///x"),
    "procs": ("3", 3),
    "concurrency": ("7", 7),
    "batch": ("9", 9),
    "pool_size": ("4", 4),
    "queue": ("one,two", ("one", "two")),
    "lease_timeout": ("90", 90.0),
    "heartbeat_interval": ("1.5", 1.5),
    "burst": ("true", True),
    "burst_horizon": ("0", 0.0),
    "grace": ("0", 0.0),
    "stall": ("0", 0.0),
    "max_tasks": ("1000", 1000),
    "max_rss": ("512", 512),
    "metrics": ("127.0.0.1:9187", ("127.0.0.1", 9187)),
    "pin": ("on", True),
    "preload": ("yes", True),
    "reload": ("1", True),
    "unknown": ("park", "park"),
    "max_step_bytes": ("1000", 1000),
    "listen": ("yes", False),
    "ignore_stop_notify": ("on", True),
    "log": ("json", "json"),
    "log_level": ("DEBUG", "debug"),
}


def load(
    flags: dict[str, Any] | None = None, environ: dict[str, str] | None = None, directory: Path = Path("/nowhere")
) -> Config:
    return load_config(flags, environ=environ or {}, directory=directory)


def test_each_setting_has_a_sample_and_a_field_in_config() -> None:
    assert list(SAMPLES) == [setting.name for setting in SETTINGS] == list(Config.__struct_fields__)
    assert msgspec.structs.asdict(Config()) == {setting.name: setting.default for setting in SETTINGS}


def test_setting_default_has_the_annotated_type() -> None:
    types = get_type_hints(Config)
    for setting in SETTINGS:
        msgspec.convert(setting.default, types[setting.name], strict=True)
        if types[setting.name] is float:
            assert isinstance(setting.default, float), setting.name


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_each_setting_has_three_twins(setting: Setting, tmp_path: Path) -> None:
    text, value = SAMPLES[setting.name]
    assert getattr(load(environ={setting.variable: text}), setting.name) == value
    assert getattr(load({setting.name: text}), setting.name) == value
    (tmp_path / "pyproject.toml").write_text(f"[tool.pgtask]\n{setting.key} = {text!r}\n")
    assert getattr(load(directory=tmp_path), setting.name) == value
    assert setting.flag.startswith("--")


def test_help_of_each_setting_names_its_default() -> None:
    described = {setting.name for setting in SETTINGS if setting.default_words}
    assert described == {"app", "dsn", "procs", "queue", "heartbeat_interval", "metrics"}, (
        "their defaults are no constants"
    )
    helps = {setting.name: setting.help for setting in SETTINGS}
    assert helps["grace"].endswith(" (default: 30)")
    assert helps["max_step_bytes"].endswith(" (default: 524288)")
    assert helps["queue"].endswith(" (default: every queue)")
    assert not any("default" in setting.help for setting in SETTINGS if setting.is_switch)


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[tool.pgtask]\nbatch = 1\nconcurrency = 1\ngrace = 1\nqueue = ["a", "b"]\n'
    )
    config = load({"batch": 3}, {"PGTASK_BATCH": "2", "PGTASK_CONCURRENCY": "2"}, tmp_path)
    assert (config.batch, config.concurrency, config.grace, config.burst_horizon) == (3, 2, 1, 60)
    assert config.queue == ("a", "b")


def test_the_dsn_falls_back_to_database_url() -> None:
    theirs, ours = "postgresql:///theirs", "postgres://us:pw@[::1]:5432,other/ours?host=/tmp"
    assert load(environ={"DATABASE_URL": theirs}).dsn == theirs
    assert load(environ={"DATABASE_URL": "mysql://x", "PGTASK_DSN": ours}).dsn == ours
    assert load().dsn is None


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"PGTASK_PROCS": "0"}, "PGTASK_PROCS='0': expected a whole number, 1 or more"),
        ({"PGTASK_PROCS": "many"}, "PGTASK_PROCS='many': expected a whole number, 1 or more"),
        ({"PGTASK_GRACE": "-1"}, "PGTASK_GRACE='-1': expected seconds, zero or more"),
        ({"PGTASK_STALL": "1.9"}, "PGTASK_STALL='1.9': expected seconds, 2 or more, or 0 for never"),
        ({"PGTASK_STALL": "-1"}, "PGTASK_STALL='-1': expected seconds, 2 or more, or 0 for never"),
        ({"PGTASK_GRACE": "nan"}, "PGTASK_GRACE='nan': expected seconds, zero or more"),
        ({"PGTASK_POOL_SIZE": "0"}, "PGTASK_POOL_SIZE='0': expected a whole number, 1 or more"),
        ({"PGTASK_LOG": "xml"}, "PGTASK_LOG='xml': expected one of text, json"),
        ({"PGTASK_BURST": "maybe"}, "PGTASK_BURST='maybe': expected true or false"),
        ({"PGTASK_QUEUE": "a,,b"}, "queue '' must be a printable string"),
        ({"PGTASK_LEASE_TIMEOUT": "5", "PGTASK_HEARTBEAT_INTERVAL": "5"}, "is not shorter than the lease timeout"),
    ],
)
def test_a_bad_value_is_named_with_its_source(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(environ=environ)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("PGTASK_CONCURENCY", "PGTASK_CONCURRENCY"),
        ("PGTASK_LISTEN", "PGTASK_NO_LISTEN"),
        ("PGTASK_BURSTHORIZON", "PGTASK_BURST_HORIZON"),
        ("PGTASK_LEASETIMEOUT", "PGTASK_LEASE_TIMEOUT"),
        ("PGTASK_DNS", "PGTASK_DSN"),
        ("PGTASK_PORCS", "PGTASK_PROCS"),
        ("PGTASK_DATABASE_URL", "PGTASK_DSN"),
        ("PGTASK_MAIN_DATABASE_URL", "PGTASK_DSN"),
        ("PGTASK_URL", "PGTASK_DSN"),
        ("PGTASK_LEASE", "PGTASK_LEASE_TIMEOUT"),
        ("PGTASK_HORIZON", "PGTASK_BURST_HORIZON"),
    ],
)
def test_a_variable_that_is_nearly_a_setting_is_refused(name: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(environ={name: "4"})
    assert str(caught.value) == f"{name}: there is no such setting; did you mean {meant}?"


def test_foreign_variables_are_ignored() -> None:
    """Kubernetes describes services called `pgtask` and `pgtask-web` so; an empty variable is none; and an app may have
    variables of its own."""
    service = {
        "PGTASK_SERVICE_HOST": "10.0.0.1",
        "PGTASK_SERVICE_PORT": "80",
        "PGTASK_SERVICE_PORT_HTTP": "80",
        "PGTASK_PORT": "tcp://10.0.0.1:80",
        "PGTASK_PORT_80_TCP": "tcp://10.0.0.1:80",
        "PGTASK_PORT_80_TCP_ADDR": "10.0.0.1",
        "PGTASK_WEB_SERVICE_HOST": "10.0.0.1",
        "PGTASK_WEB_PORT_80_TCP": "tcp://10.0.0.1:80",
    }
    others = {"PGTASK_TEST_DSN": "postgresql:///x", "PGTASK_DEBUG": "1", "PGTASK_CONCURENCY": "", "PGTASKS": "1"}
    others |= {"PGTASK_BUCKET": "b", "PGTASK_API_URL": "https://x", "PGTASK_USER": "me", "PGTASK_TOKEN": "t"}
    assert load(environ={**service, **others}) == load()


def test_overridden_value_is_checked_as_well(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.pgtask]\nprocs = 'many'\n")
    for flags, environ in (({"procs": "2"}, {}), ({}, {"PGTASK_PROCS": "2"})):
        with pytest.raises(ConfigError, match=r"^\[tool.pgtask\] procs='many': expected a whole number, 1 or more$"):
            load(flags, environ, tmp_path)
    with pytest.raises(ConfigError, match=r"^PGTASK_PROCS='0': expected"):
        load({"procs": "2"}, {"PGTASK_PROCS": "0"})


@pytest.mark.parametrize(
    ("dsn", "message"),
    [
        (
            "host=/tmp dbname=x password=secret",
            "='host=/tmp dbname=x password=***': use postgresql://USER@HOST/DATABASE",
        ),
        ("mysql://me:secret@h/x", "='mysql://me:***@h/x': use postgresql://"),
        ("postgresql://me:secret@h:port/x", "='postgresql://me:***@h:port/x': h:port is not a host and a port"),
    ],
)
def test_malformed_dsn_is_named_without_its_password(dsn: str, message: str) -> None:
    for source, flags, environ in (("--dsn", {"dsn": dsn}, {}), ("DATABASE_URL", {}, {"DATABASE_URL": dsn})):
        with pytest.raises(ConfigError) as caught:
            load(flags, environ)
        assert str(caught.value).startswith(source + message)
        assert "secret" not in str(caught.value)


def test_the_bound_of_a_number_is_named() -> None:
    for name, message in (
        ("lease_timeout", "--lease-timeout='1e9': expected seconds, more than zero, less than 1,000,000,000"),
        ("grace", "--grace='1e9': expected seconds, zero or more, less than 1,000,000,000"),
        ("batch", "--batch='2147483648': expected a whole number, 1 or more, less than 2,147,483,648"),
    ):
        with pytest.raises(ConfigError) as caught:
            load({name: "2147483648" if name == "batch" else "1e9"})
        assert str(caught.value) == message


def test_the_heartbeat_follows_a_shorter_lease() -> None:
    assert load({"lease_timeout": "3"}).heartbeat_interval == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tool.pgtask]\nprocess = 3\n", "[tool.pgtask] process: there is no such setting; did you mean procs?"),
        ("[tool.pgtask]\nlisten = true\n", "[tool.pgtask] listen: there is no such setting; did you mean no-listen?"),
        ("[tool.pgtask]\nx = 3\n", "[tool.pgtask] x: there is no such setting"),
        ("[tool.pgtask\n", "pyproject.toml: "),
        ("[tool.pgtask]\nprocs = true\n", "[tool.pgtask] procs=True: expected a whole number, 1 or more"),
        ("[tool.pgtask]\nqueue = 3\n", "[tool.pgtask] queue=3: "),
    ],
)
def test_a_bad_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(directory=tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(("limit", "procs"), [("max 100000", 8), ("250000 100000", 2), ("10000 100000", 1)])
def test_default_procs_respect_affinity_and_cgroup(limit: str, procs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read_text = Path.read_text
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(
        Path, "read_text", lambda self, *args: limit if str(self).endswith("cpu.max") else read_text(self, *args)
    )
    assert default_procs() == procs
